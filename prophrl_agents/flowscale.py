"""FlowScale: weights that balance the flow steps' contributions to the gradient (Eqs 20-22, 29). Pure function.

The score of a Gaussian step grows as 1 / std (Eq. 25), so late, quiet flow steps dominate the update; ``w ~ std`` evens
them out. Weights are constants for the gradient and enter the losses straight-through (``losses.py``).

Departure from the paper: "mean weight 1 by construction" fails in Eq. 22 once the clip binds; ``renorm="project"``
restores it inside the bounds, ``renorm=None`` is Eq. 22 as printed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["flowscale_weights"]

_BISECTIONS = 60


@torch.no_grad()
def flowscale_weights(
    std: Tensor,
    *,
    p: float = 0.5,
    alpha: float = 0.1,
    w_min: float = 0.1,
    w_max: float = 5.0,
    eps: float = 1e-8,
    renorm: Literal["project"] | None = "project",
) -> Tensor:
    """Returns one weight per flow step, computed in float64 (Eq. 22 and Alg. 2, lines 3-8).

    ``w~ = (std^2 + eps)^p``, ``w_mix = alpha + (1 - alpha) w~ / mean_k w~``, ``w = clip(c w_mix, w_min, w_max)``; c = 1
    for ``renorm=None``, and for "project" the c that makes the mean over k exactly 1. Steps with std 0 get weight 0
    and are left out of the means.

    Args:
        std: (..., K) standard deviations of the flow steps.
        p: dependence on the noise; 0.5 gives w~ proportional to std (Eq. 29).
        alpha: share of the uniform weight; 1 switches FlowScale off.
        w_min: lower bound.
        w_max: upper bound.
        eps: added to the variance.
        renorm: "project" or None.

    Returns:
        (..., K) weights in the dtype of std, without gradient.

    Raises:
        ValueError: negative or non-finite std, p < 0, alpha outside [0, 1], eps < 0, bounds that are out of order, or
            that exclude the mean 1 under "project".
    """
    if std.ndim < 1 or not std.is_floating_point() or not bool(((std >= 0) & std.isfinite()).all()):
        raise ValueError(
            f"std of shape {tuple(std.shape)} and dtype {std.dtype} must be (..., K) floats, finite and >= 0; "
            "take it from flow_sde.schedule"
        )
    if p < 0 or eps < 0 or not 0 <= alpha <= 1:
        raise ValueError(f"p={p}, eps={eps}, alpha={alpha}, expected p >= 0, eps >= 0 and 0 <= alpha <= 1")
    if not 0 <= w_min <= w_max:
        raise ValueError(f"bounds [{w_min}, {w_max}] are out of order, expected 0 <= w_min <= w_max")
    if renorm not in ("project", None):
        raise ValueError(f"renorm is {renorm!r}, expected 'project' or None")
    if renorm == "project" and not w_min <= 1 <= w_max:
        raise ValueError(f"bounds [{w_min}, {w_max}] exclude the mean weight 1; widen them or use renorm=None")
    noisy = std > 0
    count = noisy.sum(dim=-1, keepdim=True).clamp(min=1)
    raw = torch.where(noisy, (std.double() ** 2 + eps) ** p, 0.0)
    mean = raw.sum(dim=-1, keepdim=True) / count
    mixed = alpha + (1 - alpha) * raw / torch.where(mean > 0, mean, 1.0)
    if renorm == "project":
        mixed = _projection_scale(mixed, noisy, count, w_min, w_max) * mixed
    return torch.where(noisy, mixed.clamp(w_min, w_max), 0.0).to(std.dtype)


def _projection_scale(mixed: Tensor, noisy: Tensor, count: Tensor, w_min: float, w_max: float) -> Tensor:
    """Returns c (..., 1) with ``mean clip(c mixed, w_min, w_max) = 1`` over the noisy steps.

    The mean rises with c, is at most 1 at c = 1 / max and at least 1 at c = 1 / min: bisection in log c, then the
    closed form on the steps that the clip leaves free.
    """
    low = -torch.where(noisy, mixed, -torch.inf).amax(dim=-1, keepdim=True).clamp(min=1e-300).log()
    high = -torch.where(noisy, mixed, torch.inf).amin(dim=-1, keepdim=True).clamp(min=1e-300, max=1e300).log()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        total = torch.where(noisy, (middle.exp() * mixed).clamp(w_min, w_max), 0.0).sum(dim=-1, keepdim=True)
        low = torch.where(total < count, middle, low)
        high = torch.where(total < count, high, middle)
    scale = ((low + high) / 2).exp()
    scaled = scale * mixed
    free = noisy & (scaled > w_min) & (scaled < w_max)
    bound = torch.where(noisy & ~free, scaled.clamp(w_min, w_max), 0.0).sum(dim=-1, keepdim=True)
    free_sum = torch.where(free, mixed, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(free_sum > 0, (count - bound) / torch.where(free_sum > 0, free_sum, 1.0), scale)
