"""``check_judge``: does a judge keep its contract? Each finding names its likely cause.

For authors of judges, and for our own tests. It asks whether a judge can be relied on, not whether it is right:
:func:`prophet_gym.judges.evaluate_judge` measures that.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .checker import require
from .judges.base import AnswerError, FunctionJudge, Judge, Verdict, as_judge

__all__ = ["check_judge"]

INSTRUCTION = "put the red block on the blue plate"
UNKNOWN = "qwertz the fnord beyond the zyx"
_ANSWERS = (
    "a path through the judge without return (None), a word or class number instead of a decision, a logit without its "
    "sigmoid, or a tensor (.item() makes it a number)"
)
TOLERANCE = 1e-4
"""Largest difference of two scores that count as equal: a batch rounds otherwise than a single call."""


def check_judge(judge: Any, *, frames: np.ndarray | None = None, instruction: str = INSTRUCTION) -> None:
    """Checks a judge; calls it on about a hundred prefixes of one rollout.

    Checked: verdicts are whole, of every length from two frames on; ``judge_batch`` gives one verdict per rollout, in
    order, and those of single calls; the same rollout gets the same verdict again (a judge that samples says so with an
    attribute ``deterministic = False`` and is not asked this); frames are left as they are; an instruction without
    sense is not an exception; frames and batches of the wrong kind are a ``ValueError``.

    Not for :class:`prophet_gym.judges.OracleJudge`: it answers for one simulator's present state, whatever the frames.

    Args:
        judge: what an environment takes as ``judge=``: a judge, or a callable
            ``(frames, instruction) -> Verdict | bool | float``.
        frames: (T, H, W, 3) uint8, T >= 2, a rollout of the size and kind that it judges; default: 41 drawn frames of
            64x64 pixels in which a red square comes to rest on a blue disc.
        instruction: the goal of that rollout.

    Raises:
        ValueError: ``judge`` cannot be called.
        AssertionError: a rule is broken; the message says what was seen and what usually causes it.
    """
    tested = as_judge(judge)
    _check_signature(tested.function if isinstance(tested, FunctionJudge) else tested)
    frames = _drawn_rollout() if frames is None else frames
    prefixes = [frames[:length].copy() for length in range(2, len(frames) + 1)]
    singles = [_ask(tested, prefix, instruction) for prefix in prefixes[-1:] + prefixes[:1]]
    _check_first_frame(tested, frames[:1].copy(), instruction)
    batch = _check_batch(tested, prefixes, instruction)
    if getattr(judge, "deterministic", True):
        _check_order(tested, prefixes, instruction, batch)
        require(
            _equal(batch[0], singles[1]) and _equal(batch[-1], singles[0]),
            f"judge_batch says {batch[0]} and {batch[-1]} where single calls say {singles[1]} and {singles[0]}",
            "a statistic over the batch, rollouts cut or padded to a common length, or random numbers without a seed",
        )
        require(
            _equal(_ask(tested, prefixes[-1], instruction), singles[0]),
            "the same rollout and instruction got another verdict the second time",
            "random numbers without a seed, or a memory of earlier rollouts; a judge that samples on purpose says so "
            "with an attribute deterministic = False",
        )
    _ask(tested, prefixes[-1], UNKNOWN)
    _check_refusals(tested, frames, instruction)


def _check_signature(judge: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(judge)
    except (TypeError, ValueError):  # of some callables Python does not know it
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise AssertionError(
            f"the judge is called as judge(frames, instruction), but takes {signature} ({error}). Likely cause: an "
            "argument left out or too many; give further ones a default, or use functools.partial."
        ) from error


def _ask(judge: Judge, frames: np.ndarray, instruction: str) -> Verdict:
    """One verdict, after checking it and that the frames were left alone."""
    given = frames.copy()
    what = f"{len(frames)} frames and the instruction {instruction!r}"
    try:
        verdict = judge(given, instruction)
    except AnswerError as error:
        raise AssertionError(f"{error} It was asked about {what}. Likely cause: {_ANSWERS}.") from error
    except Exception as error:
        cause = (
            "a word that is looked up without asking whether it is known; abstain: Verdict.abstain(reason)"
            if instruction == UNKNOWN
            else "a rollout shorter than the judge looks back, or frames of another size than it was made for (give "
            "some of its own as frames=)"
        )
        raise AssertionError(
            f"the judge raised {type(error).__name__} ({error}) on {what}. Likely cause: {cause}."
        ) from error
    require(
        np.array_equal(given, frames),
        f"the judge changed the frames it was given ({what})",
        "work in place; take a copy first, the environment shares these frames with its forks",
    )
    _check_verdict(verdict, what)
    return verdict


def _check_verdict(verdict: Any, what: str) -> None:
    cause = "a bare bool or float from an object with judge_batch; only plain callables may answer so"
    require(
        isinstance(verdict, Verdict),
        f"the answer to {what} is {verdict!r} ({type(verdict).__name__}), expected a Verdict",
        cause if isinstance(verdict, bool | np.bool_ | float) else _ANSWERS,
    )
    seen = f"the verdict on {what} has success={verdict.success!r}, score={verdict.score!r}, valid={verdict.valid!r}"
    cause = "a Verdict built around its checks; use Verdict(success, score) or Verdict.abstain(reason)"
    if verdict.valid:
        require(isinstance(verdict.success, bool) and 0.0 <= verdict.score <= 1.0, seen, cause)
    else:
        require(verdict.success is None, f"{seen}: an abstention that decides", cause)
        require(math.isnan(verdict.score) or 0.0 <= verdict.score <= 1.0, seen, cause)
        require(verdict.reason, f"{seen} and no reason", "an abstention says why: Verdict.abstain(reason)")
    try:
        json.dumps(verdict.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        cause = "numpy values in votes or reason; saved environment states carry verdicts as JSON values"
        raise AssertionError(f"{seen} and cannot be written as JSON ({error}). Likely cause: {cause}.") from error


def _check_first_frame(judge: Judge, frame: np.ndarray, instruction: str) -> None:
    """A rollout without a command may be judged or refused, but in no other way."""
    try:
        verdict = judge(frame, instruction)
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(
            f"the judge raised {type(error).__name__} ({error}) on a single frame. Likely cause: an index that looks "
            "back before the start; refuse such frames with prophet_gym.judges.check_rollout(frames, instruction)."
        ) from error
    _check_verdict(verdict, "a single frame")


def _check_batch(judge: Judge, prefixes: list[np.ndarray], instruction: str) -> list[Verdict]:
    given, count = [prefix.copy() for prefix in prefixes], len(prefixes)
    try:
        verdicts = judge.judge_batch(given, [instruction] * count)
    except Exception as error:
        raise AssertionError(
            f"judge_batch raised {type(error).__name__} ({error}) on {count} rollouts of 2 to {count + 1} frames. "
            "Likely cause: rollouts stacked into one array, although they may differ in length."
        ) from error
    require(
        isinstance(verdicts, list) and len(verdicts) == count,
        f"judge_batch answered {verdicts!r:.200} to {count} rollouts, expected a list of {count} verdicts",
        "a generator or an array, or rollouts left out that could not be judged; abstain on them",
    )
    for verdict, prefix in zip(verdicts, prefixes, strict=True):
        _check_verdict(verdict, f"{len(prefix)} frames in judge_batch")
    require(
        all(np.array_equal(left, right) for left, right in zip(given, prefixes, strict=True)),
        "judge_batch changed the frames it was given",
        "work in place; take a copy first",
    )
    return verdicts


def _check_order(judge: Judge, prefixes: list[np.ndarray], instruction: str, expected: list[Verdict]) -> None:
    verdicts = judge.judge_batch(prefixes[::-1], [instruction] * len(prefixes))[::-1]
    require(
        all(_equal(left, right) for left, right in zip(verdicts, expected, strict=True)),
        "judge_batch gave other verdicts for the same rollouts in another order",
        "verdicts paired with the wrong rollout, random numbers without a seed, or a memory of earlier rollouts",
    )


def _check_refusals(judge: Judge, frames: np.ndarray, instruction: str) -> None:
    cases: dict[str, Callable[[], Any]] = {
        "frames scaled to floats": lambda: judge((frames / 255).astype(np.float32), instruction),
        "one image without a time axis": lambda: judge(frames[0], instruction),
        "frames with channels first": lambda: judge(np.moveaxis(frames, -1, 1), instruction),
        "frames with an alpha channel": lambda: judge(np.concatenate([frames, frames[..., :1]], -1), instruction),
        "no frames": lambda: judge(frames[:0], instruction),
        "an empty instruction": lambda: judge(frames, " "),
        "a batch with fewer instructions than rollouts": lambda: judge.judge_batch([frames, frames], [instruction]),
    }
    for name, ask in cases.items():
        try:
            ask()
        except ValueError as error:
            require(len(str(error)) > 20, f"{name}: the message is {str(error)!r}", "it must say what was expected")
        except Exception as error:
            require(False, f"{name} raised {type(error).__name__} ({error})", "not checked; raise ValueError")
        else:
            cause = "input is not checked; call prophet_gym.judges.check_rollout, or check_rollouts for a batch"
            require(False, f"the judge took {name}", cause)


def _equal(left: Verdict, right: Verdict) -> bool:
    scores = (left.score, right.score)
    close = all(map(math.isnan, scores)) or abs(scores[0] - scores[1]) <= TOLERANCE
    return close and (left.success, left.votes, left.valid) == (right.success, right.votes, right.valid)


def _drawn_rollout() -> np.ndarray:
    """Returns (41, 64, 64, 3) uint8: a red square slides onto a blue disc and rests there."""
    v, u = np.mgrid[:64, :64]
    frames = np.full((41, 64, 64, 3), (200, 185, 160), np.uint8)
    frames[:, (u - 44) ** 2 + (v - 36) ** 2 < 10**2] = (40, 70, 200)
    for t, frame in enumerate(frames):
        left = min(10 + t, 41)
        frame[33:39, left : left + 6] = (200, 40, 40)
    return frames
