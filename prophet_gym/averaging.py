"""Weighted means of networks' weights ("model soups", Wortsman et al. 2022), one network in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["shares_of", "weighted_mean"]


def shares_of(weights: Sequence[float] | None, count: int, what: str) -> list[float]:
    """Shares of a mean, which add up to 1.

    Args:
        weights: one for each of ``count``, above 0, relative to one another; all the same by default.
        count: of what is averaged, at least 2.
        what: their name in messages, in the plural.

    Raises:
        ValueError: fewer than two to average, or bad weights.
    """
    if count < 2:
        raise ValueError(f"{count} to average; expected at least 2 {what}")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} {what}; give one each, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights {weights}: expected numbers above 0; leave one of the {what} out to give it none")
    return [weight / sum(weights) for weight in weights]


def weighted_mean(states: Iterable[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Mean of state dicts with the same names and shapes, ``shares`` adding up to 1; they may be made one by one."""
    total: dict[str, Tensor] = {}
    for state, share in zip(states, shares, strict=True):
        for name, value in state.items():
            total[name] = share * value if name not in total else total[name] + share * value
    return total
