"""Losses for denoisers of one step: the most likely outcome, or samples of what may happen.

Trained on velocity, a denoiser of one step shows the mean of what may happen: a block that may be lifted or missed is
faintly in both places. Distances, not their squares, from the truth are least for the (geometric) median, which of two
outcomes is the likelier one. The energy score of two samples (Gneiting & Raftery 2007, Eq. 21, beta = 1) is least for
samples of the true distribution: one outcome or the other, each as often as it happens.

Where a block may end in many places, the likeliest of each is none of them, and the median has no block. Distances of
mean colours around each place (``colour_weight``) are less for a block somewhere near than for none.
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
_AROUND = (3, 5)  # cells across, over which colours are averaged


def energy_score(samples: Tensor, truth: Tensor, weight: Tensor, colours: Tensor | None = None) -> Tensor:
    """Energy score E|x - y| - E|x - x'| / 2 of two samples: the less, the better; a proper score.

    Distances are taken in each cell of a latent frame, in each neighbourhood of 3 x 3 cells over all latent frames, and
    over the chunk: near ones see a block that is in one place or another, far ones that it is not in both.

    Args:
        samples: (2, B, z, T, h, w).
        truth: (B, z, T, h, w).
        weight: of latent positions, (B, T, h, w), above 0. Were it to follow from the truth, the score were not
            proper.
        colours: (z, 3), see :func:`colour_distances`; None leaves them out.

    Returns:
        (B,), mean over the three scales; with colours, that of theirs added.
    """
    first = _distances(samples[0], truth, weight, colours)
    second = _distances(samples[1], truth, weight, colours)
    apart = _distances(samples[0], samples[1], weight, colours)
    return (first + second - apart) / 2.0


def _distances(a: Tensor, b: Tensor, weight: Tensor, colours: Tensor | None) -> Tensor:
    """Root mean square differences (B,) of latents (B, z, T, h, w), weighted mean over places, mean over scales."""
    square = (a - b).square().mean(dim=1)
    share = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
    cell = (share * _root(square)).sum(dim=(1, 2, 3))
    near = F.avg_pool2d(square.mean(dim=1), 3, stride=1, padding=1, count_include_pad=False)
    neighbourhood = (share.sum(dim=1) * _root(near)).sum(dim=(1, 2))
    chunk = _root((share * square).sum(dim=(1, 2, 3)))
    distance = (cell + neighbourhood + chunk) / 3.0
    return distance if colours is None else distance + colour_distances(a, b, weight, colours)


def colour_distances(a: Tensor, b: Tensor, weight: Tensor, colours: Tensor) -> Tensor:
    """Differences of mean colours around each place: over 3 x 3 cells, 5 x 5 cells and the frame.

    Averaged before distances are taken, so that a thing elsewhere near differs less from the truth than none.

    Args:
        a: latents (B, z, T, h, w).
        b: the same.
        weight: of latent positions, (B, T, h, w), above 0.
        colours: (z, 3), from latents of a cell to its colour (:func:`fit_latent_colours`), times their weight.

    Returns:
        (B,), root mean squares over colours, weighted mean over places, mean over the three scales.
    """
    difference = torch.einsum("bzthw,zc->btchw", a - b, colours)
    share = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
    total = difference.mean(dim=(-2, -1)).square().mean(dim=2)
    distance = (share.sum(dim=(2, 3)) * _root(total)).sum(dim=1)
    for size in _AROUND:
        pooled = F.avg_pool2d(difference.flatten(0, 1), size, stride=1, padding=size // 2, count_include_pad=False)
        square = pooled.unflatten(0, share.shape[:2]).square().mean(dim=2)
        distance = distance + (share * _root(square)).sum(dim=(1, 2, 3))
    return distance / (1 + len(_AROUND))


def _root(square: Tensor) -> Tensor:
    """Square root that is flat below a hundredth of a latent's spread, where differences are rounding."""
    return (square + _FLAT**2).sqrt() - _FLAT


def one_step_loss(
    model: Callable[..., Tensor],
    transformer: ProphetTransformer,
    batch: ChunkBatch,
    config: ObjectiveConfig,
    step: int,
    colours: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Distance of one sample of each chunk from the truth ("median"), or energy score of two ("energy").

    Samples of a chunk take one denoising step and differ in the noise they start from alone; all noise follows from
    (seed, step). Places weigh by ``object_weight``, which start frames and commands decide. ``colours`` is the map
    (z, 3) of :func:`fit_latent_colours`, needed where ``colour_weight`` is above 0.

    Raises:
        ValueError: colours have a weight and there is no map, or there is one and they have none.
    """
    if (colours is None) != (config.colour_weight == 0):
        given = "no map" if colours is None else "a map"
        raise ValueError(f"colour_weight={config.colour_weight} with {given} of colours; expected one with the other")
    count = 2 if config.objective == "energy" else 1
    generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
    noise = ChunkNoise.draw(batch.latents.shape, batch.history.shape, replace(config, first_step=1.0), generator)
    others = [replace(noise, target=torch.randn(noise.target.shape, generator=generator)) for _ in range(count - 1)]
    given = [NoisyChunks.of(batch.latents, batch.history, each) for each in (noise, *others)]
    device = transformer.device
    inputs, history, mask, times = (
        torch.cat([getattr(part, field.name) for part in given]).to(device) for field in fields(NoisyChunks)
    )
    drawn = None if batch.action_frames is None else batch.action_frames.to(device).repeat(count, 1, 1, 1, 1)
    condition = transformer.condition(batch.actions.to(device).repeat(count, 1, 1, 1), drawn, history)
    velocity = model(inputs, mask, times, condition)[:, :, 1:].float()
    samples = (inputs[:, :, 1:] - velocity).unflatten(0, (count, -1))
    truth, coverage = batch.latents[:, :, 1:].to(samples), batch.coverage.to(samples)
    weight = 1.0 + config.object_weight * coverage
    colours = None if colours is None else config.colour_weight * colours.to(samples)
    numbers = _with_near("sample_mse", (samples - truth).square().mean(dim=(0, 2)), coverage)
    if count == 1:
        return _distances(samples[0], truth, weight, colours).mean(), numbers
    spread = (samples[0] - samples[1]).square().mean(dim=1) / 2.0
    score = energy_score(samples, truth, weight, colours).mean()
    return score, {**numbers, **_with_near("sample_spread", spread, coverage)}


def _with_near(name: str, values: Tensor, coverage: Tensor) -> dict[str, float]:
    """Mean of values (B, T, h, w), and that near hands and objects where there are any."""
    numbers = {name: values.mean().item()}
    if coverage.any():
        numbers[f"{name}_object"] = ((coverage * values).sum() / coverage.sum()).item()
    return numbers
