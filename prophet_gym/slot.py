"""``Slot``: what an environment remembers of one rollout beside the world model's own state.

A slot and its part of ``RolloutState`` together are the whole state of a lone environment. Saved, a slot is a dict of
tensors, numbers and strings, so that ``torch.load(weights_only=True)`` or JSON plus safetensors can carry it.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .judges.base import Verdict

__all__ = ["Slot"]


@dataclass
class Slot:
    """Judge buffer, counters and random numbers of one rollout.

    Attributes:
        rng: draws the noise seed and the snapshot at each reset.
        instruction: the goal in words.
        frames: parts of the rollout, each (T, H, W, 3) uint8, snapshot first. Forks share them; never written to.
        env_step: chunks taken since the reset.
        num_commands: commands taken since the reset.
        terminated: the judge saw success.
        truncated: the horizon is reached.
        verdict: of the last step; None where no judge was asked.
    """

    rng: np.random.Generator
    instruction: str = ""
    frames: list[np.ndarray] = field(default_factory=list)
    env_step: int = 0
    num_commands: int = 0
    terminated: bool = False
    truncated: bool = False
    verdict: Verdict | None = None

    @property
    def done(self) -> bool:
        """Whether the rollout is over."""
        return self.terminated or self.truncated

    def rollout(self) -> np.ndarray:
        """Returns all frames since the reset, (1 + num_commands, H, W, 3) uint8, freshly joined."""
        return np.concatenate(self.frames)

    def fork(self) -> Slot:
        """Returns an independent copy; only the frames are shared."""
        return replace(self, rng=copy.deepcopy(self.rng), frames=list(self.frames))

    def to_state(self) -> dict[str, Any]:
        """Returns a copy as tensors, numbers and strings."""
        return {
            "rng": json.dumps(self.rng.bit_generator.state),
            "instruction": self.instruction,
            "frames": torch.from_numpy(self.rollout()),
            "env_step": self.env_step,
            "num_commands": self.num_commands,
            "terminated": self.terminated,
            "truncated": self.truncated,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Slot:
        """Rebuilds a slot from :meth:`to_state`."""
        values = dict(state)
        rng = np.random.default_rng()
        rng.bit_generator.state = json.loads(values.pop("rng"))
        frames = [torch.as_tensor(values.pop("frames")).cpu().numpy().copy()]
        verdict = values.pop("verdict")
        if verdict is not None:
            score = math.nan if verdict["score"] is None else verdict["score"]
            verdict = Verdict(**{**verdict, "score": score, "votes": tuple(verdict["votes"])})
        return cls(rng=rng, frames=frames, verdict=verdict, **values)
