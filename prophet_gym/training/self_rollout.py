"""Training on the model's own rollouts: chunks that start from an imagined frame and an imagined history.

Trained on recorded frames alone, a model never meets its own mistakes, and a rollout of several chunks piles them up.
Here a rollout leads to the chunk as it does in :meth:`ProphetWorldModel.predict` (no gradient, current weights, but
nothing of ``still_below``); the target stays the recorded video.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..world_model.codec import VideoCodec
from ..world_model.sampler import flow_schedule, integrate
from ..world_model.transformer import ProphetTransformer
from .chunks import ChunkBatch, ChunkSampler
from .config import ObjectiveConfig


class SelfRollout:
    """Batches that follow one or two imagined chunks; batch i is a function of (seed, i) and the weights.

    Args:
        sampler: source of clips.
        transformer: the denoiser in training.
        vae: its codec.
        config: the run.
    """

    def __init__(
        self, sampler: ChunkSampler, transformer: ProphetTransformer, vae: Any, config: ObjectiveConfig
    ) -> None:
        self.sampler, self.transformer, self.codec, self.config = sampler, transformer, VideoCodec(vae), config

    def due(self, step: int) -> bool:
        """Whether a step trains on a rollout: in a share of steps that grows over the first fifth of the run."""
        share = self.config.self_rollout * min(1.0, 5.0 * step / self.config.loop.steps)
        return bool(np.random.default_rng([self.config.loop.seed, 2, step]).random() < share)

    @torch.no_grad()
    def __call__(self, step: int, batch_size: int) -> ChunkBatch:
        """Clips (as :class:`ChunkBatch`) whose first latent and history a rollout of 4 to 32 frames has made."""
        rng = np.random.default_rng([self.config.loop.seed, 3, step])
        generator = torch.Generator().manual_seed(self.config.loop.seed * 1_000_003 + step + 500_000)
        stride, commands = VideoCodec.temporal_stride, self.sampler.commands
        longest = min(self.sampler.chunk_length, commands - stride) // stride
        leads = [stride * int(rng.integers(1, longest + 1))]
        room = (commands - leads[0] - stride) // stride
        if room > 0 and rng.random() < 0.5:
            leads.append(stride * int(rng.integers(1, min(longest, room) + 1)))
        length = min(self.sampler.draw_length(rng), commands - sum(leads))
        episodes, starts = self.sampler.draw(rng, batch_size, length, lead=sum(leads))
        at = starts - sum(leads)
        age, nobody = self.sampler.draw_age(rng, at // stride), np.zeros(batch_size, int)
        batch = self.sampler.gather(episodes, at, leads[0], nobody, age)
        for lead, following in zip(leads, [*leads[1:], length], strict=True):
            noise = torch.randn(batch.latents[:, :, 1:].shape, generator=generator)
            start, history = self.advance(batch, noise)
            at = at + lead
            batch = self.sampler.gather(episodes, at, following, nobody, at // stride)
            latents = torch.cat([start.to(batch.latents), batch.latents[:, :, 1:]], dim=2)
            batch = replace(batch, latents=latents, history=history)
        return batch

    def advance(self, batch: ChunkBatch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Imagine the chunk of a batch from noise (B, z, T - 1, h, w).

        Returns:
            The next chunk's start latent (B, z, 1, h, w) and history (B, z, T_hist, h, w).
        """
        device = self.transformer.device
        start, history = batch.latents[:, :, :1].to(device), batch.history.to(device)
        drawn = None if batch.action_frames is None else batch.action_frames.to(device)
        condition = self.transformer.condition(batch.actions.to(device), drawn, history)
        mask = torch.zeros_like(batch.latents[:, :1]).to(device)
        mask[:, :, 0] = 1.0

        def velocity(z_t: Tensor, t: float) -> Tensor:
            times = torch.full((len(start), 1 + z_t.shape[2]), t, device=device)
            times[:, 0] = 0.0
            return self.transformer(torch.cat([start, z_t], dim=2), mask, times, condition)[:, :, 1:].float()

        chunk = integrate(velocity, noise.to(device), flow_schedule(self.config.num_inference_steps))
        latents = torch.cat([start, chunk], dim=2)
        with torch.autocast(device.type, enabled=False):
            last = self.codec.decode(latents[:, :, -2:].float())[:, -1:]
            begin = self.codec.encode(last)
        return begin, torch.cat([history, chunk], dim=2)[:, :, -history.shape[2] :]
