"""The loss of the denoiser: rectified-flow velocity, weighted where something happens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..world_model.transformer import ProphetTransformer
from .chunks import ChunkBatch
from .config import ObjectiveConfig


def velocity_loss(
    model: Callable[..., Tensor],
    transformer: ProphetTransformer,
    batch: ChunkBatch,
    config: ObjectiveConfig,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Rectified-flow loss ||v - (eps - z_0)||^2 over all latent frames but the first.

    All noise follows from (seed, step) and is drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
    clean, b = batch.latents, len(batch.latents)
    level = config.condition_noise * torch.rand(b, 1, 1, 1, 1, generator=generator)
    start = clean[:, :, :1] + level * torch.randn(clean[:, :, :1].shape, generator=generator)
    history = batch.history + level * torch.randn(batch.history.shape, generator=generator)
    u = torch.rand(b, generator=generator)
    t = config.timestep_shift * u / (1.0 + (config.timestep_shift - 1.0) * u)
    t = torch.where(torch.rand(b, generator=generator) < config.first_step, 1.0, t)
    noise = torch.randn(clean[:, :, 1:].shape, generator=generator)
    t_full = t.view(b, 1, 1, 1, 1)
    noisy = (1.0 - t_full) * clean[:, :, 1:] + t_full * noise
    mask = clean.new_zeros(b, 1, *clean.shape[2:])
    mask[:, :, 0] = 1.0
    times = torch.cat([torch.zeros(b, 1), t[:, None].expand(-1, clean.shape[2] - 1)], dim=1)
    device = transformer.device
    drawn = None if batch.action_frames is None else batch.action_frames.to(device)
    condition = transformer.condition(batch.actions.to(device), drawn, history.to(device))
    inputs = torch.cat([start, noisy], dim=2).to(device)
    velocity = model(inputs, mask.to(device), times.to(device), condition)[:, :, 1:].float()
    clean = clean.to(device)
    error = (velocity - (noise.to(device) - clean[:, :, 1:])).square().mean(dim=1)
    change = (clean[:, :, 1:] - clean[:, :, :1]).square().mean(dim=1)
    coverage = batch.coverage.to(device)
    weight = 1.0 + config.motion_weight * change.clamp(max=1.0) + config.object_weight * coverage
    moving = change > 0.25
    numbers = {"velocity_mse": error.mean().item()}
    if moving.any():
        numbers["velocity_mse_moving"] = error[moving].mean().item()
    if coverage.any():
        numbers["velocity_mse_object"] = ((coverage * error).sum() / coverage.sum()).item()
    return (weight * error).sum() / weight.sum(), numbers
