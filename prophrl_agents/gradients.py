"""Gradients and statistics over micro-batches and processes.

Losses are divided by a count over all processes before they are differentiated, so the gradients of micro-batches and
of processes simply add up to that of the whole mini-batch. Collectives are accelerate's; alone they do nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from torch import Tensor

__all__ = ["Averages", "processes", "sum_gradients", "sum_over_processes"]


def processes() -> PartialState:
    """Returns what accelerate knows of the processes that ``torchrun`` or ``accelerate launch`` started.

    Without a GPU it takes them for lone ones unless told otherwise; each would train a policy of its own, in silence.

    Raises:
        ValueError: accelerate was used before, in a way that left this process alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = launched > 1 and not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE is {launched}, but accelerate knows {state.num_processes} processes; expected equal: make the "
            "trainer before anything else that uses accelerate"
        )
    return state


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Returns the sums of some numbers over all processes, in float64."""
    state = processes()
    if state.num_processes == 1:
        return list(values)
    return reduce(torch.tensor(values, dtype=torch.float64, device=state.device), "sum").tolist()


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces every gradient by its sum over all processes; a missing one counts as 0.

    Afterwards all processes hold the same bits, and so do their weights after the same optimiser step.
    """
    if processes().num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    parts = reduce(flat, "sum").split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)


class Averages:
    """Weighted means, and extremes, of named numbers over mini-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._lowest: dict[str, float] = {}
        self._highest: dict[str, float] = {}

    def add(self, values: Iterable[tuple[str, float]], weight: float = 1.0) -> None:
        """Adds numbers to their means; weight 0 leaves no trace, whatever the numbers are."""
        for name, value in values if weight > 0 else ():
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + weight * value, count + weight

    def add_lowest(self, name: str, value: float) -> None:
        """Adds a number of which the smallest is reported."""
        self._lowest[name] = min(value, self._lowest.get(name, math.inf))

    def add_highest(self, name: str, value: float) -> None:
        """Adds a number of which the largest is reported."""
        self._highest[name] = max(value, self._highest.get(name, -math.inf))

    def result(self) -> dict[str, float]:
        """Returns means and extremes over everything that any process has added; every process must call it."""
        merged = Averages()
        for sums, lowest, highest in gather_object([(self._sums, self._lowest, self._highest)]):
            for name, (total, count) in sums.items():
                merged.add([(name, total / count)], count)
            for name, value in lowest.items():
                merged.add_lowest(name, value)
            for name, value in highest.items():
                merged.add_highest(name, value)
        means = {name: total / count for name, (total, count) in merged._sums.items()}
        return {**means, **merged._lowest, **merged._highest}
