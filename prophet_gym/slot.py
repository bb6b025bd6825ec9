"""``Slot``: what an environment remembers of one rollout beside the world model's own state.

A slot and its part of ``RolloutState`` together are the whole state of a lone environment. ``save_slots`` turns both
into dicts of tensors, numbers and strings, so that ``torch.load(weights_only=True)`` or JSON plus safetensors can carry
them; ``load_slots`` takes nothing that does not fit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .judges.base import Verdict
from .world_model.state import RolloutState, WorldModel

__all__ = ["Slot", "load_slots", "save_slots"]

_STATE_VERSION = 1
_SAVED_TYPES: dict[str, type | tuple[type, ...]] = {
    "rng": str,
    "instruction": str,
    "frames": torch.Tensor,
    "env_step": int,
    "num_commands": int,
    "terminated": bool,
    "truncated": bool,
    "verdict": (dict, type(None)),
}


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
    def from_state(cls, state: dict[str, Any], image_size: tuple[int, int]) -> Slot:
        """Rebuilds a slot from :meth:`to_state`.

        Raises:
            ValueError: a key is missing, unknown or of another type, the frames are not (1 + num_commands, H, W, 3)
                uint8 with (H, W) = ``image_size``, or the generator or the verdict cannot be rebuilt.
        """
        if not isinstance(state, dict) or set(state) != set(_SAVED_TYPES):
            found = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"it is {found}; expected a dict with the keys {list(_SAVED_TYPES)}.")
        for key, kind in _SAVED_TYPES.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"{key} is {state[key]!r}; expected {getattr(kind, '__name__', 'a dict or None')}.")
        values, shape = dict(state), (1 + state["num_commands"], *image_size, 3)
        frames = values.pop("frames")
        if tuple(frames.shape) != shape or frames.dtype != torch.uint8:
            raise ValueError(f"frames is {frames.dtype} {tuple(frames.shape)}; expected torch.uint8 {shape}.")
        rng, verdict = np.random.default_rng(), values.pop("verdict")
        try:
            rng.bit_generator.state = json.loads(values.pop("rng"))
            if verdict is not None:
                score = math.nan if verdict["score"] is None else verdict["score"]
                verdict = Verdict(**{**verdict, "score": score, "votes": tuple(verdict["votes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"rng or verdict is not what was saved ({type(error).__name__}: {error}).") from error
        return cls(rng=rng, frames=[frames.cpu().numpy().copy()], verdict=verdict, **values)


def save_slots(rollout: RolloutState, slots: Sequence[Slot]) -> dict[str, Any]:
    """Returns copies of ``slots`` and of their ``rollout``, in the same order, as tensors, numbers and strings."""
    return {
        "version": _STATE_VERSION,
        "world_model": rollout.state_dict(),
        "slots": [slot.to_state() for slot in slots],
    }


def load_slots(
    state: dict[str, Any], like: RolloutState, count: int, world_model: WorldModel
) -> tuple[RolloutState, list[Slot]]:
    """Rebuilds what :func:`save_slots` was given.

    Args:
        state: its result.
        like: any rollout of the world model that is to go on; the saved one must have its fields, shapes and dtypes.
        count: number of slots that are expected.
        world_model: that is to go on; it says how large frames are and where the history goes.

    Raises:
        ValueError: another version or number of slots, tensors unlike those of ``like``, or a malformed slot.
    """
    if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"set_state expects what get_state() returned (version {_STATE_VERSION}), got {found!r}.")
    tensors, saved = state.get("world_model"), state.get("slots")
    if not isinstance(tensors, dict) or not isinstance(saved, list):
        raise ValueError(
            f"set_state expects a dict 'world_model' and a list 'slots', as get_state() returns them, got "
            f"{type(tensors).__name__} and {type(saved).__name__}."
        )
    if len(saved) != count:
        raise ValueError(f"The state holds {len(saved)} slots, but {count} are to be set.")
    misfits = _misfits(tensors, like, count)
    if misfits:
        raise ValueError(
            f"The state does not fit this world model: {'; '.join(misfits)}. Make the environment with the checkpoint "
            "and dtype that the state was saved with."
        )
    slots = []
    for i, values in enumerate(saved):
        try:
            slots.append(Slot.from_state(values, world_model.image_size))
        except ValueError as error:
            raise ValueError(f"Slot {i} of the state is malformed: {error}") from error
    device = getattr(world_model, "device", "cpu")
    return RolloutState.from_state_dict({name: value.cpu() for name, value in tensors.items()}, device), slots


def _misfits(tensors: dict[str, Any], like: RolloutState, count: int) -> list[str]:
    """Describes where ``tensors`` are not ``count`` slots of ``like``'s fields, shapes and dtypes."""
    expected = like.state_dict()
    if set(tensors) != set(expected):
        return [f"its fields are {list(tensors)}, expected {list(expected)}"]
    found = []
    for name, own in expected.items():
        value = tensors[name]
        wanted = f"{own.dtype} {(count, *own.shape[1:])}"
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        if given != wanted:
            found.append(f"{name} is {given}, expected {wanted}")
    return found
