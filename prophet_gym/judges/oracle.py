"""The simulator's own success, in the shape of a judge.

A judge sees frames and an instruction only, from which ground truth cannot be read: an oracle is therefore bound to
the simulator that produced the frames and answers for its present state. Use it to score ground-truth environments and
to measure other judges, never as the reward of a world model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from prophet_gym.judges.base import Verdict, check_rollout, check_rollouts

__all__ = ["OracleJudge"]


class _Simulator(Protocol):
    def is_success(self) -> bool: ...


class OracleJudge:
    """Answers with the success of one bound simulator, at the moment of the call.

    Args:
        simulator: an object with ``is_success() -> bool`` (such as ``TabletopSim``), or a callable that returns it.
            It must be the simulator that rendered the frames, in the state of the last frame.

    Raises:
        ValueError: if ``simulator`` offers neither.
    """

    def __init__(self, simulator: _Simulator | Callable[[], bool]) -> None:
        is_success = getattr(simulator, "is_success", simulator)
        if not callable(is_success):
            raise ValueError(
                f"OracleJudge expects a simulator with is_success() or a callable () -> bool, "
                f"got {type(simulator).__name__}."
            )
        self._is_success = is_success

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Returns the simulator's present success; frames are checked but not looked at."""
        check_rollout(frames, instruction)
        success = bool(self._is_success())
        return Verdict(success, float(success))

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges a batch of exactly one rollout.

        Raises:
            ValueError: if there are more, as one simulator is in one state only.
        """
        check_rollouts(frames, instructions)
        if len(frames) != 1:
            raise ValueError(
                f"An OracleJudge is bound to one simulator and judges one rollout at a time, got {len(frames)}: "
                "use one OracleJudge per simulator."
            )
        return [self(frames[0], instructions[0])]
