"""The energy score: a loss for denoisers of one step, under which noise decides what is open.

Trained on velocity, a denoiser of one step shows the mean of what may happen: a block that may be lifted or missed is
faintly in both places. The energy score of two samples (Gneiting & Raftery 2007, Eq. 21, beta = 1) is least, in
expectation, for samples of the true distribution: one outcome or the other, each as often as it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..world_model.transformer import ProphetTransformer
from .chunks import ChunkBatch
from .config import ObjectiveConfig
from .objective import ChunkNoise, NoisyChunks

_FLAT = 0.01  # root mean square, in units of latents


def energy_score(samples: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Energy score E|x - y| - E|x - x'| / 2 of two samples: the less, the better; a proper score.

    Distances are taken in each cell of a latent frame, in each neighbourhood of 3 x 3 cells over all latent frames, and
    over the chunk: near ones see a block that is in one place or another, far ones that it is not in both.

    Args:
        samples: (2, B, z, T, h, w).
        truth: (B, z, T, h, w).
        weight: of latent positions, (B, T, h, w), above 0. Were it to follow from the truth, the score were not
            proper.

    Returns:
        (B,), mean over the three scales.
    """
    first = _distances(samples[0], truth, weight)
    second = _distances(samples[1], truth, weight)
    apart = _distances(samples[0], samples[1], weight)
    return (first + second - apart) / 2.0


def _distances(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Root mean square differences (B,) of latents (B, z, T, h, w), weighted mean over places, mean over scales."""
    square = (a - b).square().mean(dim=1)
    share = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
    cell = (share * _root(square)).sum(dim=(1, 2, 3))
    near = F.avg_pool2d(square.mean(dim=1), 3, stride=1, padding=1, count_include_pad=False)
    neighbourhood = (share.sum(dim=1) * _root(near)).sum(dim=(1, 2))
    chunk = _root((share * square).sum(dim=(1, 2, 3)))
    return (cell + neighbourhood + chunk) / 3.0


def _root(square: Tensor) -> Tensor:
    """Square root that is flat below a hundredth of a latent's spread, where differences are rounding."""
    return (square + _FLAT**2).sqrt() - _FLAT


def energy_loss(
    model: Callable[..., Tensor],
    transformer: ProphetTransformer,
    batch: ChunkBatch,
    config: ObjectiveConfig,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Energy score of two one-step samples of each chunk; all noise follows from (seed, step).

    Places weigh by ``object_weight`` alone: ``motion_weight`` and ``presence_weight`` follow from what happened.
    """
    generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
    noise = ChunkNoise.draw(batch.latents.shape, batch.history.shape, replace(config, first_step=1.0), generator)
    other = replace(noise, target=torch.randn(noise.target.shape, generator=generator))
    given = [NoisyChunks.of(batch.latents, batch.history, drawn) for drawn in (noise, other)]
    inputs, history, mask, times = (
        torch.cat([getattr(part, field.name) for part in given]).to(transformer.device) for field in fields(NoisyChunks)
    )
    drawn = None if batch.action_frames is None else batch.action_frames.to(transformer.device).repeat(2, 1, 1, 1, 1)
    condition = transformer.condition(batch.actions.to(transformer.device).repeat(2, 1, 1, 1), drawn, history)
    velocity = model(inputs, mask, times, condition)[:, :, 1:].float()
    samples = (inputs[:, :, 1:] - velocity).unflatten(0, (2, -1))
    truth = batch.latents[:, :, 1:].to(samples)
    weight = 1.0 + config.object_weight * batch.coverage.to(samples)
    apart = (samples[0] - samples[1]).square().mean(dim=1)
    numbers = {"sample_mse": (samples - truth).square().mean().item(), "sample_spread": apart.mean().item() / 2.0}
    coverage = batch.coverage.to(samples)
    if coverage.any():
        error = (samples - truth).square().mean(dim=(0, 2))
        numbers["sample_mse_object"] = ((coverage * error).sum() / coverage.sum()).item()
        numbers["sample_spread_object"] = ((coverage * apart).sum() / coverage.sum()).item() / 2.0
    return energy_score(samples, truth, weight).mean(), numbers
