"""Few-step samplers for the rectified flow z_t = (1 - t) z_0 + t eps; N steps cost exactly N network evaluations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def flow_schedule(num_steps: int, shift: float = 1.0) -> list[float]:
    """Times 1 = t_0 > ... > t_N = 0 with t = shift u / (1 + (shift - 1) u) on a uniform grid u.

    Raises:
        ValueError: ``num_steps`` below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: expected at least 1")
    grid = [1.0 - i / num_steps for i in range(num_steps)]
    return [shift * u / (1.0 + (shift - 1.0) * u) for u in grid] + [0.0]


def karras_schedule(num_steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0) -> list[float]:
    """Cosmos-Predict2's noise levels as flow times t = sigma / (1 + sigma), ending at 0."""
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: expected at least 1")
    ramp = [i / max(num_steps - 1, 1) for i in range(num_steps)]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = [(high + r * (low - high)) ** rho for r in ramp]
    return [s / (1.0 + s) for s in sigmas] + [0.0]


def integrate(velocity: Velocity, noise: Tensor, times: list[float], solver: str = "euler") -> Tensor:
    """Solve dz/dt = v from ``times[0]`` down to ``times[-1]``.

    Args:
        velocity: maps (z_t, t) to v.
        noise: z at ``times[0]``, any shape.
        times: decreasing times; one evaluation for each but the last.
        solver: "euler" (first order) or "ab2" (two-step Adams-Bashforth, second order).

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in ("euler", "ab2"):
        raise ValueError(f'solver={solver!r}: expected "euler" or "ab2"')
    z, previous, previous_step = noise, None, 0.0
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v, step = velocity(z, t), t - t_next
        slope = v if previous is None or solver == "euler" else v + 0.5 * step / previous_step * (v - previous)
        z, previous, previous_step = z - step * slope, v, step
    return z


def slot_noise(seeds: Tensor, env_steps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape): slot i depends on its reset seed and env step alone, never on the batch."""
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for i, (seed, step) in enumerate(zip(seeds.tolist(), env_steps.tolist(), strict=True)):
        generator.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        noise[i] = torch.randn(shape, generator=generator)
    return noise
