"""The loss of the denoiser: rectified-flow velocity, weighted where something happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ..world_model.transformer import ProphetTransformer
from .chunks import ChunkBatch
from .config import ObjectiveConfig


@dataclass(frozen=True, eq=False)
class ChunkNoise:
    """Everything random about the loss of B chunks, drawn on the CPU, so that it is the same on every device.

    Attributes:
        level: standard deviation of the noise on what is clean, (B, 1, 1, 1, 1).
        start: unit noise on the start frame, (B, z, 1, h, w).
        history: unit noise on the history, (B, z, T_hist, h, w).
        time: t in [0, 1], (B,).
        target: the noise that is to be removed, (B, z, T - 1, h, w).
    """

    level: Tensor
    start: Tensor
    history: Tensor
    time: Tensor
    target: Tensor

    @classmethod
    def draw(
        cls, latents: torch.Size, history: torch.Size, config: ObjectiveConfig, generator: torch.Generator
    ) -> ChunkNoise:
        """Draw for latents of shape (B, z, T, h, w) and a history of shape (B, z, T_hist, h, w)."""
        b, z, frames, h, w = latents
        level = config.condition_noise * torch.rand(b, 1, 1, 1, 1, generator=generator)
        start = torch.randn(b, z, 1, h, w, generator=generator)
        past = torch.randn(history, generator=generator)
        u = torch.rand(b, generator=generator)
        t = config.timestep_shift * u / (1.0 + (config.timestep_shift - 1.0) * u)
        t = torch.where(torch.rand(b, generator=generator) < config.first_step, 1.0, t)
        return cls(level, start, past, t, torch.randn(b, z, frames - 1, h, w, generator=generator))

    @classmethod
    def joined(cls, parts: Sequence[ChunkNoise]) -> ChunkNoise:
        """Noise of several batches as that of one."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class NoisyChunks:
    """What the denoiser is given beside the commands; shapes as in :meth:`ProphetTransformer.forward`."""

    inputs: Tensor
    history: Tensor
    mask: Tensor
    times: Tensor

    @classmethod
    def of(cls, latents: Tensor, history: Tensor, noise: ChunkNoise) -> NoisyChunks:
        """Noise on clean latents (B, z, T, h, w), whose frame 0 is the start frame, and on a history."""
        b, _, frames, h, w = latents.shape
        t = noise.time.view(b, 1, 1, 1, 1)
        start = latents[:, :, :1] + noise.level * noise.start
        noisy = (1.0 - t) * latents[:, :, 1:] + t * noise.target
        mask = latents.new_zeros(b, 1, frames, h, w)
        mask[:, :, 0] = 1.0
        times = torch.cat([torch.zeros(b, 1), noise.time[:, None].expand(-1, frames - 1)], dim=1)
        return cls(torch.cat([start, noisy], dim=2), history + noise.level * noise.history, mask, times)


class ChunkDenoiser(nn.Module):
    """Condition and denoiser in one forward: wrappers that gather or reduce gradients see every parameter used in it.

    Args:
        transformer: the denoiser.
    """

    def __init__(self, transformer: ProphetTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        actions: Tensor,
        action_frames: Tensor | None,
        history: Tensor,
        inputs: Tensor,
        mask: Tensor,
        times: Tensor,
    ) -> Tensor:
        """Predict the velocity (B, z, T, h, w); arguments as of the transformer's ``condition`` and ``forward``."""
        condition = self.transformer.condition(actions, action_frames, history)
        return self.transformer(inputs, mask, times, condition).clone()  # FSDP2 hooks into it, and warns of views


def mean_velocity_error(
    denoiser: Callable[..., Tensor],
    batch: ChunkBatch,
    noise: ChunkNoise,
    device: torch.device,
) -> Tensor:
    """Rectified-flow loss ||v - (eps - z_0)||^2, mean over all latent frames but the first: no place weighs more.

    Args:
        denoiser: a :class:`ChunkDenoiser`, wrapped or not.
        batch: clean chunks.
        noise: of as many chunks.
        device: of the denoiser.
    """
    given = NoisyChunks.of(batch.latents, batch.history, noise)
    drawn = None if batch.action_frames is None else batch.action_frames.to(device)
    tensors = (part.to(device) for part in (given.history, given.inputs, given.mask, given.times))
    velocity = denoiser(batch.actions.to(device), drawn, *tensors)
    wanted = noise.target - batch.latents[:, :, 1:]
    return (velocity[:, :, 1:].float() - wanted.to(device)).square().mean()


def velocity_loss(
    model: Callable[..., Tensor],
    transformer: ProphetTransformer,
    batch: ChunkBatch,
    config: ObjectiveConfig,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Rectified-flow loss over all latent frames but the first, weighted; all noise follows from (seed, step)."""
    generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
    noise = ChunkNoise.draw(batch.latents.shape, batch.history.shape, config, generator)
    given = NoisyChunks.of(batch.latents, batch.history, noise)
    device = transformer.device
    drawn = None if batch.action_frames is None else batch.action_frames.to(device)
    condition = transformer.condition(batch.actions.to(device), drawn, given.history.to(device))
    velocity = model(given.inputs.to(device), given.mask.to(device), given.times.to(device), condition)
    clean = batch.latents.to(device)
    error = (velocity[:, :, 1:].float() - (noise.target.to(device) - clean[:, :, 1:])).square().mean(dim=1)
    change = (clean[:, :, 1:] - clean[:, :, :1]).square().mean(dim=1)
    coverage, presence = batch.coverage.to(device), batch.presence.to(device)
    near = config.object_weight * coverage + config.presence_weight * presence
    weight = 1.0 + config.motion_weight * change.clamp(max=1.0) + near
    moving = change > 0.25
    numbers = {"velocity_mse": error.mean().item()}
    if moving.any():
        numbers["velocity_mse_moving"] = error[moving].mean().item()
    for name, place in (("object", coverage), ("presence", presence)):
        if place.any():
            numbers[f"velocity_mse_{name}"] = ((place * error).sum() / place.sum()).item()
    return (weight * error).sum() / weight.sum(), numbers
