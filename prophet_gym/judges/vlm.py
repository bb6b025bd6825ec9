"""A vision-language model as a judge: frames and a prompt in, several answers, a majority out (paper 3.4, Fig. 4).

Data flow: frames -> evenly spread, 224x224, JPEG (``pictures``) -> the task's prompt (``prompting``) -> several answers
of a backend (``backends``, ``in_process``) -> votes -> :class:`Verdict`. The defaults are the paper's for BRIDGE and
real robots: 20 frames and 5 stochastic votes; for LIBERO use ``prompt="libero", num_frames=50``.

Departures from the paper: a vote counts only if its box is unmistakable, and too few votes or too close a majority
abstain, where the paper always labels; the log-probability of the word in the box can replace the votes; LIBERO's
estimated finish step is left out, as our environments judge after every chunk where they need to know when.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from prophet_gym.judges.answer_cache import AnswerCache
from prophet_gym.judges.backends import Answer, Backend, Question, Sampling
from prophet_gym.judges.base import Verdict, check_rollout, check_rollouts
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.pictures import ImageFormat, encode_frames, spread_indices
from prophet_gym.judges.prompting import AUTO, fill_prompt, load_prompt, pick_prompt, read_vote

__all__ = ["VLMConfig", "VLMJudge", "build_question"]


@dataclass(frozen=True)
class VLMConfig:
    """How a rollout is shown, asked about and decided."""

    prompt: str = AUTO
    """"auto" takes the prompt made for the instruction, else "general"; or a name of ``PROMPTS``, or a .txt file."""
    num_frames: int = 20
    """Frames that are shown, evenly spread; the paper takes 20, on LIBERO 50."""
    image_size: int = 224
    """Side of the pictures in pixels."""
    media: Literal["images", "video"] = "images"
    """Single pictures, which every server takes, or one video of JPEG frames, which vLLM takes."""
    image_format: ImageFormat = "jpeg"
    """Compression of single pictures."""
    method: Literal["votes", "logprobs"] = "votes"
    """A majority of sampled answers; or one greedy answer and how likely it found each word where its box begins."""
    votes: int = 5
    """Answers to sample (method "votes")."""
    temperature: float = 0.7
    """Of the sampling (method "votes")."""
    min_votes: int = 3
    """Abstain when fewer answers than this can be read (method "votes")."""
    threshold: float = 0.5
    """Score above which a rollout is a success: the share of readable votes for it, or its probability. One half is the
    majority; 0.3 lets two of five votes suffice, for more recall. A score that is the threshold abstains."""
    min_margin: float = 0.0
    """Abstain when the score lies closer to the threshold than half of this: at the threshold of one half, when the
    shares of success and failure differ by less than this."""
    max_tokens: int = 1024
    """Longest answer; one that is cut off is no vote."""
    seed: int = 0
    """Of the sampling; every vote on every rollout draws with a seed of its own."""
    cache: str | None = None
    """Folder that keeps answers, so that a rollout is asked about once; None keeps nothing."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt={self.prompt!r}: expected {AUTO!r}, the name of a prompt, or a .txt file.")
        least_of = {"num_frames": 2, "image_size": 16, "votes": 1, "min_votes": 1, "max_tokens": 1, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
        for name in ("temperature", "min_margin", "threshold"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number.")
        for name, known in (
            ("media", ("images", "video")),
            ("image_format", ("jpeg", "png")),
            ("method", ("votes", "logprobs")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {known}.")
        if self.min_votes > self.votes:
            raise ValueError(f"min_votes={self.min_votes} can never be reached with votes={self.votes}.")
        if not 0.0 <= self.min_margin <= 1.0:
            raise ValueError(f"min_margin={self.min_margin}: expected a difference of shares in [0, 1].")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold={self.threshold}: expected a share or probability between 0 and 1.")
        if not 0.0 <= self.temperature <= 2.0 or (self.method == "votes" and self.votes > 1 and self.temperature == 0):
            raise ValueError(
                f"temperature={self.temperature} with votes={self.votes}: expected at most 2, and more than 0 with "
                "several votes, since greedy answers are all the same."
            )
        if self.media == "video" and self.image_format != "jpeg":
            raise ValueError(f"image_format={self.image_format!r}: a video is a sequence of JPEG frames; leave it out.")


class VLMJudge:
    r"""A vision-language model that says ``\box{Success}`` or ``\box{Failure}`` about a rollout.

    ``Verdict.score`` is the share of readable votes for success, or the probability of the word; ``Verdict.votes`` are
    the readable votes; ``Verdict.reason`` says how they fell and why others could not be read. Whatever goes wrong
    while it is asked ends in an abstention of that rollout: no label comes from an error, and no rollout is lost to
    the error of another.

    Args:
        backend: who answers: :class:`prophet_gym.judges.ServerBackend`, or one of ``prophet_gym.judges.in_process``.
        config: how a rollout is shown, asked about and decided.

    Raises:
        ValueError: unknown prompt, or a backend that takes no video for ``media="video"``.
    """

    deterministic = False

    def __init__(self, backend: Backend, config: VLMConfig | None = None) -> None:
        self.backend, self.config = backend, config or VLMConfig()
        self._own_prompt = None if self.config.prompt == AUTO else load_prompt(self.config.prompt)
        if self.config.media == "video" and not backend.takes_video:
            raise ValueError(f"{type(backend).__name__} takes no video; use media='images'.")
        self._cache = None if self.config.cache is None else AnswerCache(self.config.cache)
        greedy = self.config.method == "logprobs"
        self._sampling = Sampling(0.0 if greedy else self.config.temperature, self.config.max_tokens, logprobs=greedy)

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout; see :class:`prophet_gym.judges.Judge`.

        Raises:
            ValueError: frames or instruction are not what a judge takes.
        """
        check_rollout(frames, instruction)
        return self.judge_batch([frames], [instruction])[0]

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges rollouts side by side; one verdict each, in order.

        Raises:
            ValueError: frames or instructions are not what a judge takes; nothing has been asked then.
        """
        check_rollouts(frames, instructions)
        questions = [self._question(*pair) for pair in zip(frames, instructions, strict=True)]
        keys = [self._key(question) for question in questions]
        answers = [self._cache.get(key) if self._cache else None for key in keys]
        new = [index for index, known in enumerate(answers) if known is None]

        def keep(place: int, given: list[Answer]) -> None:
            answers[new[place]] = given
            if self._cache:
                about = {"instruction": instructions[new[place]], "model": self.backend.identity.get("model")}
                self._cache.put(keys[new[place]], given, about)

        if new:
            found = self.backend.ask([questions[index] for index in new], self._sampling, keep)
            for place, (index, given) in enumerate(zip(new, found, strict=True)):
                if answers[index] is None:  # a backend that does not say what it has
                    keep(place, given)
        return [self._verdict(given or []) for given in answers]

    def _question(self, frames: np.ndarray, instruction: str) -> Question:
        question = build_question(frames, instruction, self.config, self._own_prompt)
        rng = np.random.default_rng([self.config.seed, int(self._key(question), 16)])
        count = 1 if self.config.method == "logprobs" else self.config.votes
        return replace(question, seeds=tuple(rng.integers(0, 2**31, count).tolist()))

    def _key(self, question: Question) -> str:
        """Digest of all that decides the answers: pictures, prompt, model, settings, seeds."""
        parts = {
            **{name: value for name, value in vars(question).items() if name != "images"},
            "images": [hashlib.sha256(image).hexdigest() for image in question.images],
            "sampling": vars(self._sampling),
            "backend": self.backend.identity,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _verdict(self, answers: list[Answer]) -> Verdict:
        """Decides from the answers; the more that cannot be read, the closer to an abstention."""
        votes: list[bool] = []
        weights: list[float] = []
        unread: Counter[str] = Counter()
        for answer in answers:
            vote, why = read_vote(answer.text)
            if answer.error:
                vote, why = None, answer.error
            elif not answer.finished:
                vote, why = None, f"cut off after {self.config.max_tokens} tokens"
            elif self.config.method == "logprobs" and vote is not None and answer.probability is None:
                vote, why = None, "no log-probabilities for the word in the box; does the server send logprobs?"
            if vote is None:
                unread[why] += 1
                continue
            votes.append(vote)
            weights.append(float(vote) if answer.probability is None else answer.probability)
        score = float(np.mean(weights)) if weights else math.nan
        counts = f"{sum(votes)} of {len(answers)} votes for success, {len(votes) - sum(votes)} for failure"
        if self.config.method == "logprobs":
            counts = f"P(success) = {score:.3f}"
        reason = "; ".join([counts, *(f"{count} unread: {why}" for why, count in unread.most_common())])
        if len(votes) < self.needed_votes:
            return Verdict.abstain(f"{reason}; {self.needed_votes} readable votes are needed", score, tuple(votes))
        if not self.rule.decided(score):
            margin = 2 * abs(score - self.config.threshold)
            least = f"more than 0 and at least {self.config.min_margin}"
            return Verdict.abstain(f"{reason}; a margin of {margin:.2f}, where {least} is needed", score, tuple(votes))
        return Verdict(bool(self.rule.success(score)), score, tuple(votes), reason=reason)

    @property
    def needed_votes(self) -> int:
        """Readable votes without which it abstains."""
        return 1 if self.config.method == "logprobs" else self.config.min_votes

    @property
    def rule(self) -> DecisionRule:
        """How scores become verdicts, once there are enough readable votes."""
        return DecisionRule(self.config.threshold, self.config.min_margin / 2, tie_abstains=True)


def build_question(frames: np.ndarray, instruction: str, config: VLMConfig, prompt: str | None = None) -> Question:
    """What a vision-language model is shown and asked about a rollout, in use as in training.

    Args:
        frames: (T, H, W, 3) uint8.
        instruction: the goal in words.
        config: which frames, how large, which prompt.
        prompt: text of the prompt; loaded as ``config.prompt`` says by default.

    Returns:
        The question, without seeds.

    Raises:
        ValueError: unknown prompt.
    """
    if prompt is None:
        prompt = load_prompt(pick_prompt(instruction) if config.prompt == AUTO else config.prompt)
    shown = spread_indices(len(frames), config.num_frames)
    return Question(
        text=fill_prompt(prompt, instruction),
        images=encode_frames(frames[shown], config.image_size, config.image_format),
        labels=tuple(f"Frame {index}:" for index in shown),
        media_type=f"image/{config.image_format}",
        as_video=config.media == "video",
        seeds=(),
    )
