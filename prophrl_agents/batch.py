"""``Start`` and ``RolloutBatch``: where a group of rollouts begins, and what a batch of rollouts leaves behind.

Collected by ``rollout.py``, read by the learner, by the governor and by evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prophet_gym.snapshot import Snapshot
from prophrl_agents.policies.base import Observation
from prophrl_agents.shapes import check_shape

__all__ = ["RolloutBatch", "Start"]


@dataclass(frozen=True, eq=False)
class Start:
    """Initial state of one group.

    Attributes:
        seed: reset seed of the environment; in a world model also of its noise, in a simulator also of the scene.
        snapshot: where a world model, or a simulator that can be set, begins; None leaves the choice to the seed.
    """

    seed: int
    snapshot: Snapshot | None = None


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """B rollouts of at most S policy calls, members of a group side by side; padded, ``mask`` says where it is real.

    Padded slots hold zeros. Tensors live on the CPU; the learner moves what it needs.

    Attributes:
        image: (B, S, H, W, 3) uint8, what the policy saw before each call.
        state: (B, S, P) float32.
        instructions: B strings.
        actions: (B, S, CH, D) float32 native commands that were executed.
        path: (B, S, K+1, CH, D) flow paths, float32 or better.
        log_prob: (B, S, K, CH, D) log-probabilities under the weights that acted.
        std: (K,) standard deviations of the flow steps; all 0 when sampled as "ode".
        mask: (B, S, CH) bool, True up to and including the command after which the episode is over.
        rewards: (B,) sum of the rewards of the episode, float32.
        success: (B,) bool, as the judge or the simulator said; False where it abstained.
        valid: (B,) bool, False where the judge failed or abstained: such a rollout teaches nothing.
        scores: (B,) float32 score of the verdict, NaN without one.
        starts: one per group, B / group_size.
        group_size: members of a group.
        frames: B videos (T + 1, H, W, 3) uint8 with the start image first, T executed commands; empty if not kept.
        reasons: B strings, why the judge failed or abstained where it said so, else ""; empty if not kept.
        seconds: where the time went, by stage.
    """

    image: Tensor
    state: Tensor
    instructions: tuple[str, ...]
    actions: Tensor
    path: Tensor
    log_prob: Tensor
    std: Tensor
    mask: Tensor
    rewards: Tensor
    success: Tensor
    valid: Tensor
    scores: Tensor
    starts: tuple[Start, ...]
    group_size: int
    frames: tuple[np.ndarray, ...] = ()
    reasons: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the shapes belong together."""
        sizes: dict[str, int] = {}
        check_shape("log_prob", self.log_prob, "B S K CH D", sizes)
        sizes["K+1"] = sizes["K"] + 1
        check_shape("path", self.path, "B S K+1 CH D", sizes)
        check_shape("actions", self.actions, "B S CH D", sizes)
        check_shape("mask", self.mask, "B S CH", sizes)
        check_shape("std", self.std, "K", sizes)
        check_shape("image", self.image, "B S H W RGB", sizes)
        check_shape("state", self.state, "B S P", sizes)
        for name in ("rewards", "success", "valid", "scores"):
            check_shape(name, getattr(self, name), "B", sizes)
        batch = sizes["B"]
        if len(self.instructions) != batch or len(self.starts) * self.group_size != batch:
            raise ValueError(
                f"{len(self.instructions)} instructions, {len(self.starts)} starts of {self.group_size} members; "
                f"expected {batch} rollouts in all"
            )
        for what, kept in (("videos", self.frames), ("reasons", self.reasons)):
            if kept and len(kept) != batch:
                raise ValueError(f"{len(kept)} {what}; expected {batch}, one per rollout, or none")

    def __len__(self) -> int:
        """Number of rollouts B."""
        return len(self.rewards)

    @property
    def called(self) -> Tensor:
        """(B, S) bool, True where the policy was called."""
        return self.mask.any(dim=2)

    def observations(self, rollouts: Tensor, calls: Tensor) -> Observation:
        """Observations of policy calls.

        Args:
            rollouts: (M,) integer indices b.
            calls: (M,) integer indices s.
        """
        instructions = [self.instructions[b] for b in rollouts.tolist()]
        return {
            "image": self.image[rollouts, calls], "state": self.state[rollouts, calls], "instruction": instructions
        }  # fmt: skip

    def padded(self, calls: int) -> RolloutBatch:
        """Returns the same rollouts with room for S = ``calls`` policy calls: longer ones can then be joined to them.

        Raises:
            ValueError: fewer than there are.
        """
        here = self.mask.shape[1]
        if calls < here:
            raise ValueError(f"calls is {calls}, expected at least {here}, the policy calls of this batch")

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(len(tensor), calls - here, *tensor.shape[2:])], dim=1)

        names = ("image", "state", "actions", "path", "log_prob", "mask")
        return replace(self, **{name: pad(getattr(self, name)) for name in names})

    @staticmethod
    def cat(batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """Joins batches of the same layout (K, CH, D, group size), padded to the most calls; seconds are added.

        Raises:
            ValueError: no batches, or layouts that differ.
        """
        if not batches:
            raise ValueError("no batches to join; expected at least one")
        longest = max(batch.mask.shape[1] for batch in batches)
        batches = [batch.padded(longest) for batch in batches]
        first = batches[0]
        for other in batches[1:]:
            same = other.path.shape[1:] == first.path.shape[1:] and other.group_size == first.group_size
            if not same or not torch.equal(other.std, first.std) or bool(other.frames) != bool(first.frames):
                raise ValueError(
                    f"batches of paths {tuple(other.path.shape)} and {tuple(first.path.shape)}, group sizes "
                    f"{other.group_size} and {first.group_size}; expected one layout: collect them with the same "
                    "policy and environment settings"
                )
        joined: dict[str, Any] = {}
        for entry in fields(RolloutBatch):
            values = [getattr(batch, entry.name) for batch in batches]
            if entry.name in ("std", "group_size"):
                joined[entry.name] = values[0]
            elif isinstance(values[0], Tensor):
                joined[entry.name] = torch.cat(values)
            elif isinstance(values[0], tuple):
                joined[entry.name] = sum(values, ())
        stages = {name for batch in batches for name in batch.seconds}
        joined["seconds"] = {name: sum(batch.seconds.get(name, 0.0) for batch in batches) for name in sorted(stages)}
        return replace(first, **joined)
