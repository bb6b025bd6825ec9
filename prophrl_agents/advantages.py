"""From rewards and episode ends to advantages and masks (Eqs 15, 31, 32). Pure functions.

A group is ``group_size`` consecutive rollouts of one task from one initial snapshot. Rollouts whose judge abstained
are passed as ``valid=False``: they enter no statistic and get advantage 0.

Departures from the paper: groups are per snapshot (the paper normalises "over a batch"); Eq. 15 masks whole policy
calls, the mask here ends inside the chunk, with the command after which the episode is over.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prophrl_agents.shapes import check_shape

__all__ = ["AdvantageNorm", "chunk_mask", "dynamic_sampling_mask", "group_advantages", "zero_variance_groups"]

AdvantageNorm = Literal["population", "none", "rloo"]


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    valid: Tensor | None = None,
    norm: AdvantageNorm = "population",
    eps: float = 1e-6,
) -> Tensor:
    """Returns one advantage per rollout, relative to the valid members of its group (Eq. 31).

    Args:
        rewards: (B,) rewards; B is a multiple of group_size, groups are consecutive.
        group_size: members per group, at least 2.
        valid: (B,) bool; False where the judge abstained (the reward there may be anything, NaN included).
        norm: "population": ``(R - mean) / (population std + eps)`` (GRPO); "none": ``R - mean`` (Dr.GRPO);
            "rloo": R minus the mean of the other valid members (leave-one-out).
        eps: of the division.

    Returns:
        (B,) advantages in the dtype of the rewards (float32 for integers and bools). Exactly 0 in groups whose valid
        rewards are all equal, for invalid members, and where fewer than two members are valid.

    Raises:
        ValueError: wrong shape, group_size below 2, B not a multiple, unknown norm, non-finite valid reward.
    """
    if norm not in ("population", "none", "rloo"):
        raise ValueError(f"norm is {norm!r}, expected 'population' (GRPO), 'none' (Dr.GRPO) or 'rloo'")
    groups, members = _groups(rewards, group_size, valid)
    count = members.sum(dim=1, keepdim=True).clamp(min=1).to(groups.dtype)
    mean = groups.sum(dim=1, keepdim=True) / count
    centred = torch.where(members, groups - mean, 0.0)
    if norm == "population":
        centred = centred / ((centred.square().sum(dim=1, keepdim=True) / count).sqrt() + eps)
    elif norm == "rloo":
        centred = centred * (count / (count - 1).clamp(min=1))
    # max == min, not std == 0: the mean of equal floats need not equal them.
    flat = _is_flat(groups, members)[:, None]
    return torch.where(flat, 0.0, centred).reshape(-1)


def zero_variance_groups(rewards: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """Returns (B / group_size,) bool: True for groups that teach nothing.

    These are the groups whose valid rewards are all equal (all succeed or all fail), or with fewer than two valid
    members. Arguments and errors as in :func:`group_advantages`.
    """
    return _is_flat(*_groups(rewards, group_size, valid))


def dynamic_sampling_mask(rewards: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """Returns (B,) bool: True for the valid rollouts of groups that are not of zero variance (DAPO).

    Arguments and errors as in :func:`group_advantages`. Dropping the others changes the denominator of the loss, not
    the direction of its gradient.
    """
    groups, members = _groups(rewards, group_size, valid)
    return (members & ~_is_flat(groups, members)[:, None]).reshape(-1)


def chunk_mask(done: Tensor) -> Tensor:
    """Returns (B, S, CH) bool: True up to and including the command after which the episode is over (Eq. 15).

    Args:
        done: (B, S, CH) bool, True at a command after which the episode is over (later entries do not matter).

    Raises:
        ValueError: wrong number of axes, or not bool.
    """
    check_shape("done", done, "B S CH", {})
    if done.dtype != torch.bool:
        raise ValueError(f"done has dtype {done.dtype}, expected torch.bool; pass done.bool()")
    ends = done.flatten(1).long()
    return (ends.cumsum(dim=1) - ends == 0).reshape(done.shape)


def _groups(rewards: Tensor, group_size: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns rewards (G, group_size) with invalid ones set to 0, and the valid members, after the checks."""
    sizes: dict[str, int] = {}
    check_shape("rewards", rewards, "B", sizes)
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}, expected at least 2 (default 8): one rollout has nothing to be compared with"
        )
    if sizes["B"] % group_size:
        raise ValueError(
            f"{sizes['B']} rewards, expected a multiple of group_size {group_size}: pass whole groups, in order"
        )
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    check_shape("valid", valid, "B", sizes)
    if valid.dtype != torch.bool:
        raise ValueError(f"valid has dtype {valid.dtype}, expected torch.bool; pass valid.bool()")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    rewards = torch.where(valid, rewards, 0.0)
    if not rewards.isfinite().all():
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"rewards {bad} are not finite; where the judge abstained pass valid=False")
    return rewards.reshape(-1, group_size), valid.reshape(-1, group_size)


def _is_flat(groups: Tensor, members: Tensor) -> Tensor:
    """Returns (G,) bool: all valid rewards of the group are equal (or there are none)."""
    low = torch.where(members, groups, torch.inf).amin(dim=1)
    high = torch.where(members, groups, -torch.inf).amax(dim=1)
    return high <= low
