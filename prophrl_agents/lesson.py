"""What a batch of rollouts teaches: advantages, masks, and the mini-batches in which it is taught. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prophrl_agents.advantages import dynamic_sampling_mask, group_advantages
from prophrl_agents.batch import RolloutBatch
from prophrl_agents.config import TrainConfig

__all__ = ["Lesson", "make_lesson", "mini_batches"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a batch teaches.

    Attributes:
        advantages: (B, S) one per policy call; 1 for imitation.
        mask: (B, S, CH) bool, the commands that count.
        calls: (B, S) bool, the policy calls whose gradient is not known to be exactly 0.
    """

    advantages: Tensor
    mask: Tensor
    calls: Tensor

    def micro_batches(self, rollouts: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields indices (b, s), at most ``size`` of each, of the calls of some rollouts that teach."""
        rows, calls = self.calls[rollouts].nonzero(as_tuple=True)
        if len(rows):
            yield from zip(rollouts[rows].split(size), calls.split(size), strict=True)


def make_lesson(batch: RolloutBatch, config: TrainConfig, call_advantages: Tensor | None = None) -> Lesson:
    """Returns advantages and masks of a batch; rollouts whose judge abstained count nowhere.

    Policy calls with advantage 0 are left out unless there is a KL term: their gradient is exactly 0. They stay in
    ``mask``, and so in the denominator, unless ``dynamic_sampling`` takes their groups out.

    Args:
        batch: rollouts.
        config: ``algorithm``, ``advantage_norm``, ``dynamic_sampling`` and ``beta``.
        call_advantages: (B, S), those of algorithm "ppo".
    """
    counted = batch.valid
    if call_advantages is not None:
        advantages = call_advantages
    elif config.algorithm == "filtered_bc":
        counted = batch.valid & batch.success
        advantages = counted.float()[:, None].expand(batch.called.shape)
    else:
        group = group_advantages(batch.rewards, batch.group_size, valid=batch.valid, norm=config.advantage_norm)
        advantages = group[:, None].expand(batch.called.shape)
        if config.dynamic_sampling:
            counted = dynamic_sampling_mask(batch.rewards, batch.group_size, valid=batch.valid)
    mask = batch.mask & counted[:, None, None]
    calls = mask.any(dim=2)
    return Lesson(advantages, mask, calls if config.beta > 0 else calls & (advantages != 0))


def mini_batches(batch: RolloutBatch, config: TrainConfig, update: int, processes: int = 1) -> list[list[Tensor]]:
    """Returns, for each epoch, the rollout indices of each optimiser step.

    Whole groups are shuffled by (seed, update, epoch): the advantages of a mini-batch are centred. With several
    processes each takes its share of every mini-batch from its own rollouts.

    Args:
        batch: rollouts of this process.
        config: ``seed``, ``epochs`` and ``mini_batch``.
        update: counted from 0.
        processes: among which a mini-batch is divided.
    """
    groups_per_step = max(1, config.mini_batch // processes // batch.group_size)
    epochs = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, update, epoch]).permutation(len(batch.starts))
        rollouts = torch.from_numpy(order)[:, None] * batch.group_size + torch.arange(batch.group_size)
        epochs.append([step.flatten() for step in rollouts.split(groups_per_step)])
    return epochs
