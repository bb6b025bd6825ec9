"""``RolloutState``: all that a world model carries between chunks, for a batch of independent slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..actions import ActionSpec
from ..snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class RolloutState:
    """Batch of B rollout slots; every operation returns a new state and leaves this one as it was.

    Attributes:
        frames: current frame of each slot, (B, H, W, 3) uint8.
        history: latents of complete groups of returned frames, oldest first, (B, z, T_hist, h, w).
        tail: last frame of the newest complete group, then frames that wait for theirs to fill, (B, 4, H, W, 3) uint8.
        tail_count: number of waiting frames, (B,) int64, 0 to 3.
        poses: commanded end-effector poses in the world frame, (B, N, 4, 4) float64, metres.
        gripper: commanded open ratios, (B, N) float64.
        intrinsics: camera matrices K, (B, 3, 3) float64 in pixels; NaN where no camera is known.
        extrinsics: world to camera transforms E, (B, 4, 4) float64; NaN where no camera is known.
        seeds: reset seeds, (B,) int64.
        env_step: chunks predicted so far, (B,) int64.
        instructions: UTF-8 bytes of the instructions, zeros after each, (B, 2048) uint8; None in a world without text.
            Embeddings, 2 MB a slot, are not carried: :class:`.text.TextEmbedder` gives the same ones again.
    """

    frames: Tensor
    history: Tensor
    tail: Tensor
    tail_count: Tensor
    poses: Tensor
    gripper: Tensor
    intrinsics: Tensor
    extrinsics: Tensor
    seeds: Tensor
    env_step: Tensor
    instructions: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of slots B."""
        return self.frames.shape[0]

    @property
    def has_camera(self) -> bool:
        """Whether every slot has a calibrated camera."""
        return not bool(torch.isnan(self.intrinsics).any() or torch.isnan(self.extrinsics).any())

    def select(self, indices: Sequence[int] | np.ndarray | Tensor) -> RolloutState:
        """Slots ``indices`` (integers or a boolean mask of B), in that order, as copies."""
        index = torch.as_tensor(np.asarray(indices))
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        index = index.long()
        return RolloutState(**{name: value[index.to(value.device)] for name, value in self._tensors().items()})

    def fork(self, n: int) -> RolloutState:
        """Each slot ``n`` times over: slot i becomes slots i n ... i n + n - 1."""
        if n < 1:
            raise ValueError(f"fork(n={n}): expected n of at least 1")
        return self.select(np.repeat(np.arange(self.batch_size), n))

    def put(self, indices: Sequence[int] | np.ndarray | Tensor, other: RolloutState) -> RolloutState:
        """Copy of this state with slots ``indices`` replaced by those of ``other``, in order.

        Raises:
            ValueError: another number of slots, or only one of the states has instructions.
        """
        index = torch.as_tensor(np.asarray(indices))
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        if len(index) != other.batch_size:
            raise ValueError(f"put: {len(index)} indices for {other.batch_size} slots; expected equal numbers")
        if (self.instructions is None) != (other.instructions is None):
            raise ValueError("put: slots with and without instructions; expected states of one world model")
        changed, given = {}, other._tensors()
        for name, value in self._tensors().items():
            changed[name] = value.clone()
            changed[name][index.long().to(value.device)] = given[name].to(value)
        return replace(self, **changed)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU, by name; safetensors can store them."""
        return {name: value.detach().cpu().clone() for name, value in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """What there is, by name: ``instructions`` only in a world with text."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> RolloutState:
        """Rebuild a state from :meth:`state_dict`; ``history`` goes to ``device``.

        Raises:
            ValueError: names are missing or unknown.
        """
        names = {f.name for f in fields(cls)} - ({"instructions"} - set(tensors))
        if set(tensors) != names:
            raise ValueError(
                f"rollout state: missing {sorted(names - set(tensors))}, unknown {sorted(set(tensors) - names)}; "
                "expected what state_dict() returned"
            )
        copies = {k: torch.as_tensor(v).clone() for k, v in tensors.items()}
        return cls(**{**copies, "history": copies["history"].to(device)})


@runtime_checkable
class WorldModel(Protocol):
    """What an environment needs of a world model; any action-conditioned video model can provide it."""

    chunk_length: int
    image_size: tuple[int, int]
    num_effectors: int
    action_spec: ActionSpec
    num_inference_steps: int
    requires_camera: bool
    checkpoint_info: dict[str, Any]

    def begin(self, snapshots: Sequence[Snapshot], seeds: Sequence[int]) -> RolloutState:
        """Start one slot a snapshot."""
        ...

    def predict(
        self, state: RolloutState, actions: np.ndarray, num_inference_steps: int | None = None
    ) -> tuple[np.ndarray, RolloutState]:
        """Imagine the frames (B, C, H, W, 3) uint8 that canonical commands (B, C, N, 7) lead to."""
        ...
