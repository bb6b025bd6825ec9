"""The judges' conformance suite passes judges that keep the contract and names the cause where one does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from prophet_gym import Verdict, check_judge
from prophet_gym.judges import (
    ClassifierConfig,
    ClassifierJudge,
    FunctionJudge,
    OracleJudge,
    check_rollout,
    check_rollouts,
)
from prophet_gym.words import build_vocabulary

INSTRUCTION = "push the red block to the left edge"


def redness(frames: np.ndarray, instruction: str) -> float:
    return float(frames[-1, ..., 0].mean() / 255)


class Sound:
    """A judge written out in full; the broken ones below differ in one thing each."""

    def __call__(self, frames: np.ndarray, instruction: str) -> Any:
        check_rollout(frames, instruction)
        return self.answer(frames, instruction)

    def answer(self, frames: np.ndarray, instruction: str) -> Any:
        score = redness(frames, instruction)
        return Verdict(score > 0.5, score)

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        check_rollouts(frames, instructions)
        return [self(rollout, instruction) for rollout, instruction in zip(frames, instructions, strict=True)]


def test_sound_judges_pass() -> None:
    check_judge(Sound())
    check_judge(redness)
    check_judge(lambda frames, instruction: Verdict.abstain("too dark", score=0.4))
    check_judge(lambda frames, instruction: bool(frames[-1].mean() > 100))


def test_classifier_passes_on_frames_of_its_size() -> None:
    vocabulary = build_vocabulary(["put the red block on the blue plate", INSTRUCTION])
    judge = ClassifierJudge(ClassifierConfig(vocabulary, image_size=(32, 32), width=8), seed=3)
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    check_judge(judge, frames=frames, instruction=INSTRUCTION)
    with pytest.raises(AssertionError, match=r"\(32, 32\), got \(64, 64\).*another size.*frames="):
        check_judge(judge)


def test_shipped_judge_passes() -> None:
    from prophet_gym.registration import WORLDS, resolve_checkpoint

    check_judge(ClassifierJudge.from_pretrained(resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], None) / "judge"))


def test_sampling_is_allowed_where_it_is_declared() -> None:
    class Sampling(Sound):
        deterministic = False

        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
            votes = tuple(bool(vote) for vote in self.rng.random(5) < redness(frames, instruction))
            return Verdict(sum(votes) > 2, sum(votes) / 5, votes)

    check_judge(Sampling())
    Sampling.deterministic = True
    with pytest.raises(AssertionError, match=r"random numbers without a seed"):
        check_judge(Sampling())


class LooksBackTooFar(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        return super().answer(frames[[0, -6]], instruction)


class RaisesOnOneFrame(Sound):
    def __call__(self, frames: np.ndarray, instruction: str) -> Any:
        return self.answer(frames[[0, -2]], instruction)


class KnowsWordsOnly(Sound):
    words = dict.fromkeys(["put", "the", "red", "block", "on", "blue", "plate"], 1)

    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        assert sum(self.words[word] for word in instruction.split())
        return super().answer(frames, instruction)


class WritesIntoFrames(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        frames[-1] //= 2
        return super().answer(frames, instruction)


class BatchWritesIntoFrames(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        verdicts = super().judge_batch(frames, instructions)
        frames[0][:] = 0
        return verdicts


class BareBool(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> bool:
        return redness(frames, instruction) > 0.5


class AnswersNothing(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> None:
        pass


class TakesFramesAlone(Sound):
    def __call__(self, frames: np.ndarray) -> Any:  # type: ignore[override]
        return Verdict(True, 1.0)


class RawLogit(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        verdict = Verdict(True, 1.0)
        object.__setattr__(verdict, "score", 3.2)
        return verdict


class DecidesAndAbstains(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        verdict = Verdict.abstain("blurred")
        object.__setattr__(verdict, "success", False)
        return verdict


class NumpyVotes(Sound):
    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        return Verdict(True, 1.0, votes=tuple(np.array([True, True])))


class BatchStatistic(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        scores = np.array([verdict.score for verdict in super().judge_batch(frames, instructions)])
        scores = scores / scores.max()
        return [Verdict(bool(score > 0.5), float(score)) for score in scores]


class SortedBatch(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        return sorted(super().judge_batch(frames, instructions), key=lambda verdict: verdict.score)


class DropsShortRollouts(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        return super().judge_batch([rollout for rollout in frames if len(rollout) > 9], instructions[8:])


class Generator(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        return iter(super().judge_batch(frames, instructions))


class Stacks(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        return [self(rollout, instructions[0]) for rollout in np.stack(frames)]


class Remembers(Sound):
    seen = 0

    def answer(self, frames: np.ndarray, instruction: str) -> Verdict:
        self.seen += 1
        return Verdict(True, 1 / (1 + self.seen))


class TakesAnything(Sound):
    def __call__(self, frames: np.ndarray, instruction: str) -> Any:
        return Verdict(False, 0.25)


class BatchTakesAnything(Sound):
    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> Any:
        return [self(*pair) for pair in zip(frames, instructions, strict=False)]


@pytest.mark.parametrize(
    "fault, message",
    [
        (LooksBackTooFar, "raised IndexError.*on 2 frames.*shorter than the judge looks back"),
        (RaisesOnOneFrame, "raised IndexError.*single frame.*check_rollout"),
        (KnowsWordsOnly, "raised KeyError.*fnord.*abstain"),
        (WritesIntoFrames, "changed the frames.*work in place"),
        (BatchWritesIntoFrames, "judge_batch changed the frames"),
        (BareBool, r"\(bool\), expected a Verdict"),
        (AnswersNothing, "is None.*expected a Verdict.*without return"),
        (TakesFramesAlone, r"called as judge\(frames, instruction\), but takes \(frames"),
        (RawLogit, r"score=3.2.*built around its checks"),
        (DecidesAndAbstains, "success=False.*valid=False.*an abstention that decides"),
        (NumpyVotes, "cannot be written as JSON.*numpy values in votes"),
        (BatchStatistic, "where single calls say.*statistic over the batch"),
        (SortedBatch, "in another order.*paired with the wrong rollout"),
        (DropsShortRollouts, "to 40 rollouts, expected a list of 40 verdicts.*left out"),
        (Generator, "list_iterator.*expected a list of 40.*generator"),
        (Stacks, "raised ValueError.*stacked into one array"),
        (Remembers, "memory of earlier rollouts"),
        (TakesAnything, "took frames scaled to floats.*check_rollout"),
        (BatchTakesAnything, "took a batch with fewer instructions"),
    ],
)
def test_a_broken_judge_is_named(fault: type[Sound], message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_judge(fault())


def test_a_broken_function_is_named() -> None:
    with pytest.raises(AssertionError, match=r"answered 3\.5.*expected a Verdict, a bool or a float"):
        check_judge(lambda frames, instruction: 3.5)
    for answer in (None, "yes", 2, torch.tensor(True)):
        with pytest.raises(AssertionError, match=r"answered .*Likely cause: a path .*without return.*\.item\(\)"):
            check_judge(lambda frames, instruction, answer=answer: answer)
    for judge in (lambda frames: True, lambda frames, instruction, threshold: True):
        with pytest.raises(AssertionError, match="but takes .*an argument left out or too many"):
            check_judge(judge)
    sampling = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="random numbers without a seed"):
        check_judge(FunctionJudge(lambda frames, instruction: sampling.random()))


def test_what_is_no_judge_of_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="must be callable"):
        check_judge(3)
    with pytest.raises(AssertionError, match="one OracleJudge per simulator"):
        check_judge(OracleJudge(lambda: True))
