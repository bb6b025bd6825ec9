"""What a judge is: frames and an instruction in, a verdict out (paper 3.4, Eq. 30).

A judge never sees actions, simulator states or policy internals, so the same judge serves a simulator, a world model
and a camera on a real robot. An environment hands it all frames of a rollout, the snapshot's frame first. A judge that
cannot decide abstains (``valid=False``); an abstention is not a failure of the policy and learners mask that rollout.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["FunctionJudge", "Judge", "Verdict", "as_judge", "check_rollout", "check_rollouts"]


@dataclass(frozen=True)
class Verdict:
    """A judge's decision on one rollout.

    Attributes:
        success: True or False; None exactly when the judge abstains.
        score: belief in success, in [0, 1]; NaN when an abstaining judge formed none.
        votes: the single decisions behind a majority, if the judge voted.
        valid: False when the judge abstained or failed. Learners mask such a rollout.
        reason: why, in words; required when ``valid`` is False.

    Raises:
        ValueError: if the fields contradict each other or ``score`` is outside [0, 1].
    """

    success: bool | None
    score: float
    votes: tuple[bool, ...] = ()
    valid: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        if self.valid and not isinstance(self.success, bool):
            raise ValueError(
                f"A valid verdict needs success=True or False, got {self.success!r}. "
                "To abstain, use Verdict.abstain(reason)."
            )
        if not self.valid and self.success is not None:
            raise ValueError(f"An abstention has success=None, got {self.success!r} with valid=False.")
        if not self.valid and not self.reason:
            raise ValueError("An abstention needs a reason: use Verdict.abstain('what went wrong').")
        if math.isnan(self.score):
            if self.valid:
                raise ValueError("A valid verdict needs a score in [0, 1], got NaN.")
        elif not 0.0 <= self.score <= 1.0:
            raise ValueError(f"Verdict score must be in [0, 1], got {self.score}. Apply a sigmoid to a raw logit.")

    @classmethod
    def abstain(cls, reason: str, score: float = math.nan, votes: tuple[bool, ...] = ()) -> Verdict:
        """Returns a verdict that decides nothing; ``score`` is kept if one was formed."""
        return cls(success=None, score=score, votes=votes, valid=False, reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values; a NaN score becomes None."""
        return {
            "success": self.success,
            "score": None if math.isnan(self.score) else float(self.score),
            "votes": list(self.votes),
            "valid": self.valid,
            "reason": self.reason,
        }


@runtime_checkable
class Judge(Protocol):
    """Anything that scores rollouts. Any callable becomes one through :func:`as_judge`."""

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout: frames (T, H, W, 3) uint8 RGB, T = 1 + commands, snapshot first."""
        ...

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges many rollouts, of equal or different lengths; one verdict each, in order."""
        ...


class AnswerError(ValueError):
    """A plain function answered something that is no verdict."""


@dataclass(frozen=True)
class FunctionJudge:
    """A plain function as a judge; see :func:`as_judge`.

    Attributes:
        function: ``(frames (T, H, W, 3) uint8, instruction) -> Verdict | bool | float in [0, 1]``.
        threshold: a float answer at or above it counts as success.
    """

    function: Callable[[np.ndarray, str], Any]
    threshold: float = 0.5

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout; an exception of the function is passed on, not turned into a label."""
        answer = self.function(check_rollout(frames, instruction), instruction)
        if isinstance(answer, Verdict):
            return answer
        if isinstance(answer, bool | np.bool_):
            return Verdict(bool(answer), float(answer))
        if isinstance(answer, numbers.Real) and 0.0 <= float(answer) <= 1.0:
            return Verdict(float(answer) >= self.threshold, float(answer))
        raise AnswerError(
            f"Judge {self.function!r} answered {answer!r} ({type(answer).__name__}); expected a Verdict, a bool or a "
            "float in [0, 1]. To abstain, return Verdict.abstain(reason)."
        )

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges rollouts one after the other."""
        check_rollouts(frames, instructions)
        return [self(rollout, instruction) for rollout, instruction in zip(frames, instructions, strict=True)]


def as_judge(judge: Any, threshold: float = 0.5) -> Judge:
    """Returns ``judge`` as a :class:`Judge`.

    Args:
        judge: an object with ``__call__`` and ``judge_batch`` (returned as it is), or any callable
            ``(frames (T, H, W, 3) uint8, instruction) -> Verdict | bool | float in [0, 1]``.
        threshold: where a float answer becomes success; for plain callables only.

    Raises:
        ValueError: if ``judge`` cannot be called.
    """
    if isinstance(judge, type):
        raise ValueError(f"A judge must be an instance, got the class {judge.__name__}: use {judge.__name__}(...).")
    if not callable(judge):
        raise ValueError(
            f"A judge must be callable as judge(frames, instruction), got {type(judge).__name__}: {judge!r}."
        )
    return judge if isinstance(judge, Judge) else FunctionJudge(judge, threshold)


def check_rollout(frames: np.ndarray, instruction: str) -> np.ndarray:
    """Returns ``frames`` unchanged after checking what a judge is given.

    Args:
        frames: (T, H, W, 3) uint8 RGB with T >= 2: the snapshot's frame and at least one more.
        instruction: the goal in words.

    Raises:
        ValueError: if shape, dtype or instruction are not as above.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        came = f"{frames.dtype} array" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"A judge expects frames as a uint8 numpy array (T, H, W, 3), got {came}.")
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"A judge expects RGB frames (T, H, W, 3), got shape {frames.shape}. Channels go last; drop alpha."
        )
    if len(frames) < 2:
        raise ValueError(
            f"A judge expects at least 2 frames (the snapshot's and one after a command), got T = {len(frames)}."
        )
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"A judge expects a non-empty instruction, got {instruction!r}.")
    return frames


def check_rollouts(frames: Sequence[np.ndarray], instructions: Sequence[str]) -> None:
    """Checks a batch of rollouts; see :func:`check_rollout`.

    Raises:
        ValueError: if the two lists differ in length, or for any rollout :func:`check_rollout` refuses.
    """
    if isinstance(instructions, str) or len(frames) != len(instructions):
        count = "one string" if isinstance(instructions, str) else f"{len(instructions)} instructions"
        raise ValueError(f"judge_batch expects one instruction per rollout, got {len(frames)} rollouts and {count}.")
    for index, (rollout, instruction) in enumerate(zip(frames, instructions, strict=True)):
        try:
            check_rollout(rollout, instruction)
        except ValueError as error:
            raise ValueError(f"Rollout {index}: {error}") from None
