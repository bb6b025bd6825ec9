"""The mean of several policies that were reinforced from the same one.

Runs that differ in their seed leave their common start in different directions, part of which is noise; the mean of
their weights keeps what they share (Ramé et al. 2024, "WARP"). Whether it is better is to be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prophet_gym.averaging import shares_of, weighted_mean
from prophrl_agents.policies.small import SmallFlowPolicy

__all__ = ["average_policies"]


def average_policies(policies: Sequence[str | Path], weights: Sequence[float] | None = None) -> SmallFlowPolicy:
    """Loads policies and averages their weights, one at a time.

    Args:
        policies: as :meth:`SmallFlowPolicy.from_pretrained` takes them, of one configuration and normalisation.
        weights: of each policy, above 0, relative to one another; all the same by default.

    Returns:
        The policy, float32 on the CPU.

    Raises:
        ValueError: fewer than two policies, bad weights, or policies that differ in more than weights.
    """
    shares = shares_of(weights, len(policies), "policies")
    first = SmallFlowPolicy.from_pretrained(policies[0])

    def states() -> Iterator[dict[str, Tensor]]:
        yield first.state_dict()
        for path in policies[1:]:
            policy = SmallFlowPolicy.from_pretrained(path)
            _require_alike(first, policy, policies[0], path)
            yield policy.state_dict()

    kept = {f"normalizer.{name}": value.clone() for name, value in first.normalizer.state_dict().items()}
    first.load_state_dict(weighted_mean(states(), shares) | kept)  # a mean of equals is equal only up to rounding
    return first


def _require_alike(first: SmallFlowPolicy, other: SmallFlowPolicy, one: str | Path, two: str | Path) -> None:
    """Requires one architecture and one meaning of states and commands."""
    mine, theirs = dataclasses.asdict(first.config), dataclasses.asdict(other.config)
    differ = [f"config.{name}" for name in mine if mine[name] != theirs[name]]
    if not differ:
        pairs = zip(first.normalizer.state_dict().items(), other.normalizer.state_dict().values(), strict=True)
        differ = [f"normalizer.{name}" for (name, left), right in pairs if not torch.equal(left, right)]
    if differ:
        raise ValueError(
            f"{two} differs from {one} in {', '.join(differ)}; expected the same, as in policies that learned from one "
            "start (--policy)"
        )
