"""A small learned judge: frames and instruction to success, with a stored decision threshold.

The default judge of Prophet-Tabletop. It looks at the first frame and a few late ones at the resolution it was trained
at, costs about a millisecond a rollout and abstains when it meets a word it was not trained on. Trained by
``prophet_gym.training.judge`` on real and imagined frames (paper 3.4.1 fine-tunes Qwen2.5-VL-7B for the same purpose).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from prophet_gym.devices import require_device
from prophet_gym.judges.base import Verdict, check_rollouts
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.network import SuccessNetwork, frame_indices
from prophet_gym.strict_json import to_json
from prophet_gym.words import encode_instruction

__all__ = ["ClassifierConfig", "ClassifierJudge"]

CONFIG_FILE, WEIGHTS_FILE, FORMAT = "judge.json", "judge.safetensors", "prophet_gym.ClassifierJudge"


@dataclass(frozen=True)
class ClassifierConfig:
    """What the classifier sees, knows and decides by.

    Attributes:
        vocabulary: known words, lower case; an instruction with another word is not judged.
        image_size: (H, W) of the frames, pixels.
        late_frames: distances from the last frame, in frames; the first frame is always seen.
        max_words: longest instruction.
        width: channels of the network at quarter resolution.
        threshold: scores at or above it are success.
        abstain_margin: scores closer to the threshold than this are not decided; 0 decides always.
        trained_on: free-form record of data, seed and metrics for the model card.
    """

    vocabulary: tuple[str, ...]
    image_size: tuple[int, int] = (64, 64)
    late_frames: tuple[int, ...] = (0, 2, 5)
    max_words: int = 16
    width: int = 32
    threshold: float = 0.5
    abstain_margin: float = 0.0
    trained_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocabulary", "image_size", "late_frames"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0.0 <= self.threshold <= 1.0 or not 0.0 <= self.abstain_margin <= 1.0:
            raise ValueError(
                f"threshold and abstain_margin must be in [0, 1], got {self.threshold} and {self.abstain_margin}."
            )
        if not self.vocabulary or not self.late_frames or min(self.late_frames) < 0:
            raise ValueError(
                f"vocabulary and late_frames must not be empty and late_frames not negative, got "
                f"{self.vocabulary} and {self.late_frames}."
            )


class ClassifierJudge:
    """Judges rollouts with a :class:`SuccessNetwork`; deterministic, batched.

    Args:
        config: what it sees, knows and decides by.
        network: the trained network; None for a fresh one, initialised from ``seed``.
        device: where the network runs.
        seed: of a fresh network's weights.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        network: SuccessNetwork | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = _build(config)
        self.config = config
        self.device = require_device(device)
        self.network = network.to(self.device).eval()

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout; see :class:`~prophet_gym.judges.base.Judge`."""
        return self.judge_batch([frames], [instruction])[0]

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges many rollouts at once.

        Args:
            frames: one (T, H, W, 3) uint8 array per rollout; T may differ, (H, W) is the trained size.
            instructions: one per rollout.

        Returns:
            One verdict each; an abstention for an instruction with unknown words or a score within the margin.

        Raises:
            ValueError: if frames are of another size, or anything
                :func:`~prophet_gym.judges.base.check_rollouts` refuses.
        """
        check_rollouts(frames, instructions)
        config = self.config
        encoded = [encode_instruction(text, config.vocabulary, config.max_words) for text in instructions]
        known = [index for index, (words, _) in enumerate(encoded) if words]
        scores = np.full(len(frames), math.nan)
        if known:
            stacks = np.stack([self.select_frames(frames[index]) for index in known])
            words = torch.tensor([encoded[index][0] for index in known], device=self.device)
            scores[known] = self.scores(stacks, words)
        return [self._verdict(float(score), why) for score, (_, why) in zip(scores, encoded, strict=True)]

    def select_frames(self, frames: np.ndarray) -> np.ndarray:
        """Picks what the network sees: (T, H, W, 3) uint8 -> (F, H, W, 3) uint8, first frame then late ones.

        Raises:
            ValueError: if frames are of another size than the network was trained on.
        """
        if frames.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"This judge was trained on frames of (H, W) = {self.config.image_size}, got {frames.shape[1:3]}. "
                "Resize the frames (area interpolation) before judging."
            )
        return frames[frame_indices(len(frames), self.config.late_frames)]

    @torch.inference_mode()
    def scores(self, stacks: np.ndarray, words: torch.Tensor, batch_size: int = 256) -> np.ndarray:
        """Returns scores (B,) in [0, 1] for stacks (B, F, H, W, 3) uint8 and word ids (B, max_words)."""
        scores = []
        for start in range(0, len(stacks), batch_size):
            images = to_network(stacks[start : start + batch_size], self.device)
            scores.append(self.network(images, words[start : start + batch_size]).double().sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def _verdict(self, score: float, why_not: str) -> Verdict:
        if why_not:
            return Verdict.abstain(why_not)
        if not self.rule.decided(score):
            return Verdict.abstain(
                f"score {score:.3f} within {self.config.abstain_margin} of the threshold {self.config.threshold:.3f}",
                score,
            )
        return Verdict(score >= self.config.threshold, score)

    @property
    def rule(self) -> DecisionRule:
        """How scores become verdicts."""
        return DecisionRule(self.config.threshold, self.config.abstain_margin)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``judge.safetensors`` (float16) and ``judge.json``; each file appears complete or not at all.

        The JSON holds a digest of the weights, so that an interrupted overwrite is noticed when loading.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().half().cpu().contiguous() for name, value in self.network.state_dict().items()}
        weights = safetensors.torch.save(state)
        digest = hashlib.sha256(weights).hexdigest()
        config = {"format": FORMAT, "weights_sha256": digest, **dataclasses.asdict(self.config)}
        _write(folder / WEIGHTS_FILE, weights)
        _write(folder / CONFIG_FILE, to_json(config).encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> ClassifierJudge:
        """Loads a judge written by :meth:`save_pretrained`; computes in float32.

        Raises:
            ValueError: if files are missing, corrupt, or belong to something else, or there is no such device.
        """
        require_device(device)
        folder = Path(directory)
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"No judge in {folder}: {missing} missing. Train one with `prophet judge train`.")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE} is not valid JSON ({error}); the judge is corrupt.") from None
        if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
            raise ValueError(f"{folder / CONFIG_FILE} does not describe a {FORMAT}.")
        digest = config.pop("weights_sha256", None)
        known = {entry.name for entry in dataclasses.fields(ClassifierConfig)}
        if set(config) != known:
            absent, unknown = sorted(known - set(config)), sorted(set(config) - known)
            raise ValueError(f"{folder / CONFIG_FILE}: missing keys {absent}, unknown {unknown}.")
        weights = (folder / WEIGHTS_FILE).read_bytes()
        if hashlib.sha256(weights).hexdigest() != digest:
            raise ValueError(
                f"{folder / WEIGHTS_FILE} does not match {CONFIG_FILE} (digest): corrupt, or from another training. "
                "Copy both files of one judge."
            )
        state = {name: value.float() for name, value in safetensors.torch.load(weights).items()}
        try:
            judge_config = ClassifierConfig(**config)
            network = _build(judge_config)
            network.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:  # edited by hand
            raise ValueError(f"{folder / CONFIG_FILE} does not fit its weights ({error}).") from error
        return cls(judge_config, network, device)


def to_network(stacks: np.ndarray, device: torch.device) -> torch.Tensor:
    """(B, F, H, W, 3) uint8 -> (B, F, 3, H, W) float in [0, 1] on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(stacks)).to(device).permute(0, 1, 4, 2, 3).float().div_(255)


def _build(config: ClassifierConfig) -> SuccessNetwork:
    return SuccessNetwork(1 + len(config.late_frames), len(config.vocabulary), config.max_words, config.width)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
