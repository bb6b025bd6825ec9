"""The flow head as a stochastic policy: schedule, ODE and SDE steps, log-probabilities, exact KL. Pure functions.

Convention (as in pi0 and SD3): ``x_t = (1 - t) a + t eps``, velocity ``v = eps - a``; sampling runs t: 1 -> 0 in K
flow steps of length ``dt_k = t_k - t_{k+1} > 0``. Every flow step is a Gaussian with ``mean = c_x x + c_v v`` and a
standard deviation that comes from the schedule alone. The path x_1, ..., x_0 is the policy's random choice; its
initial noise has no parameters and is left out of the log-probability (Eq. 14 sums over the K steps).

A step with ``std = 0`` (an ODE last step, or noise level 0) is deterministic: log-probability 0, KL 0, weight 0.

Departure from the paper: it leaves the SDE open ("up to a constant", Eq. 20); this is the one of Flow-GRPO, whose
marginals equal those of the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "FlowSchedule",
    "Generators",
    "LastStep",
    "draw_noise",
    "kl_divergence",
    "log_prob",
    "path_mean",
    "sample_path",
    "schedule",
    "sde_step",
    "step_mean",
]

LastStep = Literal["sde", "ode"]
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
Velocity = Callable[[Tensor, Tensor], Tensor]


class FlowSchedule(NamedTuple):
    """Numbers of the K flow steps; ``mean = c_x x + c_v v``.

    Attributes:
        t: (K+1,) flow times from 1 down to 0.
        dt: (K,) step lengths, positive.
        std: (K,) standard deviation of the noise injected by each step.
        c_x: (K,) coefficient of the current point.
        c_v: (K,) coefficient of the velocity, negative.
    """

    t: Tensor
    dt: Tensor
    std: Tensor
    c_x: Tensor
    c_v: Tensor


def schedule(
    num_flow_steps: int,
    noise_level: float,
    *,
    last_step: LastStep = "sde",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FlowSchedule:
    """Returns the uniform schedule of K flow steps, computed in float64.

    ``sigma = a sqrt(t / (1 - t))`` (at t = 1 the denominator uses the next time), ``g = sigma^2 / 2t``,
    ``mean = x (1 - g dt) - v (1 + g (1 - t)) dt``, ``std = sigma sqrt(dt)``. Hence ``std_1 = a`` and
    ``std_K = a / sqrt(K (K - 1))``.

    Args:
        num_flow_steps: K, at least 1.
        noise_level: a, at least 0; 0 gives the ODE.
        last_step: "sde", or "ode" for a last step without noise (smaller ratios, less jitter in the commands).
        device: device of the result.
        dtype: float32 or float64.

    Raises:
        ValueError: K < 1, a negative or not finite, an unknown last step, or a dtype below float32.
    """
    if num_flow_steps < 1:
        raise ValueError(f"num_flow_steps is {num_flow_steps}, expected at least 1; deployment values are 5 to 10")
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise ValueError(f"noise_level is {noise_level}, expected a finite number >= 0; 0.5 is the default, 0 the ODE")
    if last_step not in ("sde", "ode"):
        raise ValueError(f"last_step is {last_step!r}, expected 'sde' or 'ode'")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"schedule dtype is {dtype}, expected float32 or float64: lower precision quantises ratios")
    t = torch.arange(num_flow_steps, -1, -1, dtype=torch.float64) / num_flow_steps
    now, dt = t[:-1], t[:-1] - t[1:]
    sigma = noise_level * torch.sqrt(now / (1 - torch.where(now < 1, now, t[1:])))
    if last_step == "ode":
        sigma[-1] = 0.0
    g = sigma**2 / (2 * now)
    numbers = t, dt, sigma * dt.sqrt(), 1 - g * dt, -(1 + g * (1 - now)) * dt
    return FlowSchedule(*(number.to(device=device, dtype=dtype) for number in numbers))


def step_mean(x: Tensor, velocity: Tensor, c_x: Tensor | float, c_v: Tensor | float) -> Tensor:
    """Returns the mean ``c_x x + c_v v`` of one flow step; x and velocity (..., CH, D)."""
    return c_x * x + c_v * velocity


def sde_step(x: Tensor, velocity: Tensor, noise: Tensor, flow: FlowSchedule, k: int) -> tuple[Tensor, Tensor]:
    """Takes flow step k (counted from 0) of the SDE.

    Args:
        x: (..., CH, D) current point.
        velocity: (..., CH, D) velocity at (x, t_k).
        noise: (..., CH, D) standard normal.
        flow: the schedule.
        k: which step.

    Returns:
        (next point, mean of the step), both (..., CH, D).
    """
    mean = step_mean(x, velocity, flow.c_x[k], flow.c_v[k])
    return mean + flow.std[k] * noise, mean


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns the log-density of Normal(mean, std) at x_next, element by element; 0 where std is 0.

    Args:
        x_next: point after the step; broadcastable with mean.
        mean: mean of the step (Eq. 14's factor k).
        std: standard deviation, broadcastable: (K, 1, 1) against (B, K, CH, D).
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    density = -0.5 * ((x_next - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, density, torch.zeros_like(density))


def kl_divergence(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """Returns the exact KL per element and step, ``(mean - mean_ref)^2 / (2 std^2)``; 0 where std is 0.

    Both policies share the schedule, hence std; the sum over k is the KL of the path (the KL term of Eq. 18).
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    kl = 0.5 * ((mean - mean_ref) / safe) ** 2
    return torch.where(std > 0, kl, torch.zeros_like(kl))


def draw_noise(
    shape: Sequence[int], generator: Generators, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draws standard normal noise of the given shape (B, ...).

    Args:
        shape: shape of the result, batch first.
        generator: one generator for the batch, or a sequence of B generators, one per row: then a row's noise does
            not depend on its neighbours, nor on the size of the batch.
        device: where the result lives; the draw happens on the generator's own device.
        dtype: float32 or float64.

    Raises:
        ValueError: another number of generators than rows.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: pass one in all, or one per row")
    rows = [torch.randn(*shape[1:], generator=one, device=one.device, dtype=dtype).to(device) for one in generator]
    return torch.stack(rows)


def sample_path(
    velocity: Velocity, shape: Sequence[int], flow: FlowSchedule, generator: Generators
) -> tuple[Tensor, Tensor]:
    """Samples a whole path from noise to action chunk, with the log-probability of each step.

    Args:
        velocity: maps (x (B, CH, D), scalar t) to the velocity (B, CH, D).
        shape: (B, CH, D).
        flow: schedule; its dtype and device are those of the path.
        generator: see :func:`draw_noise`. Steps without noise draw none.

    Returns:
        path (B, K+1, CH, D), its last entry the action chunk; log-probabilities (B, K, CH, D).
    """
    device, dtype = flow.std.device, flow.std.dtype
    x = draw_noise(shape, generator, device=device, dtype=dtype)
    path, log_probs = [x], []
    for k, noisy in enumerate((flow.std > 0).tolist()):
        v = velocity(x, flow.t[k]).to(dtype)
        noise = draw_noise(shape, generator, device=device, dtype=dtype) if noisy else torch.zeros_like(x)
        x, mean = sde_step(x, v, noise, flow, k)
        path.append(x)
        log_probs.append(log_prob(x, mean, flow.std[k]))
    return torch.stack(path, dim=1), torch.stack(log_probs, dim=1)


def path_mean(velocity: Velocity, path: Tensor, flow: FlowSchedule) -> Tensor:
    """Returns the means (B, K, CH, D) of all steps along a given path, differentiable in the velocity's weights.

    The steps are evaluated one by one, with the shapes of :func:`sample_path`: matrix products of another shape round
    differently, and before the first update the ratio has to be 1 to the bit.

    Args:
        velocity: as in :func:`sample_path`.
        path: (B, K+1, CH, D).
        flow: the schedule under which the path was sampled.
    """
    means = []
    for k in range(len(flow.dt)):
        x = path[:, k].contiguous()
        means.append(step_mean(x, velocity(x, flow.t[k]).to(flow.std.dtype), flow.c_x[k], flow.c_v[k]))
    return torch.stack(means, dim=1)
