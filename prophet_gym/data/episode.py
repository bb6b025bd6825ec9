"""One recorded trajectory: images, the commands between them, and what is known about the scene.

Image ``t + 1`` is the result of action ``t``, so T actions come with T + 1 images. `prophet_gym.data.folder` reads and
writes episodes; training takes clips of them; `Episode.snapshot` turns any image with a known pose into the start of a
rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ActionSpec, integrate_poses
from prophet_gym.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Episode:
    """A trajectory of T actions and T + 1 images.

    Attributes:
        images: (T + 1, H, W, 3) uint8 RGB, or a function that decodes and returns them. Read them through `frames`.
        actions: (T, 7N) float32, native convention of `action_spec`.
        action_spec: What the actions mean.
        instruction: The goal in words; empty where unknown.
        fps: Images per second of robot time.
        camera: Calibration of the images, or None.
        eef_pose: (T + 1, N, 4, 4) float64, end-effector to world, metres, or None. Integrated from the commands in
            Tabletop recordings, measured in those of real robots.
        gripper: (T + 1, N) float64 open ratio, or None; present exactly when `eef_pose` is.
        success: Whether the goal was reached, or None where unknown.
        labels: Further arrays with one row per image, e.g. ``"block_px"`` (T + 1, 2).
        name: Name, unique within its folder.
        simulator_state: (S,) float64, state of the ground-truth simulator at the first image, or None.
        metadata: JSON-ready facts about the recording, e.g. ``{"behaviour": "expert"}``.

    Raises:
        ValueError: If lengths, shapes or types do not fit each other; the message names the numbers.
    """

    images: np.ndarray | Callable[[], np.ndarray]
    actions: np.ndarray
    action_spec: ActionSpec
    instruction: str
    fps: float
    camera: Camera | None = None
    eef_pose: np.ndarray | None = None
    gripper: np.ndarray | None = None
    success: bool | None = None
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""
    simulator_state: np.ndarray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check lengths and shapes against the number of actions."""
        where = f"episode {self.name!r}"
        actions = np.asarray(self.actions)
        if actions.ndim != 2 or actions.shape[1] != self.action_spec.action_dim or len(actions) < 1:
            raise ValueError(
                f"{where}: actions have shape {actions.shape}; expected (T, {self.action_spec.action_dim})"
            )
        if not np.isfinite(actions).all():
            raise ValueError(f"{where}: actions hold NaN or infinity; expected finite numbers")
        object.__setattr__(self, "actions", actions.astype(np.float32))
        if not isinstance(self.instruction, str):
            raise ValueError(f"{where}: instruction is {self.instruction!r}; expected a string, '' where unknown")
        if not self.fps > 0:
            raise ValueError(f"{where}: fps is {self.fps!r}; expected a number above 0")
        length, count = len(actions) + 1, self.action_spec.num_effectors
        if (self.eef_pose is None) != (self.gripper is None):
            raise ValueError(f"{where}: only one of eef_pose and gripper is given; expected both or neither")
        for key, shape in (("eef_pose", (length, count, 4, 4)), ("gripper", (length, count))):
            value = getattr(self, key)
            if value is not None:
                value = np.asarray(value, np.float64)
                if value.shape != shape:
                    raise ValueError(
                        f"{where}: {key} has shape {value.shape}; expected {shape} for {len(actions)} actions of "
                        f"{count} end-effector(s): one row per image"
                    )
                object.__setattr__(self, key, value)
        labels = {key: np.asarray(value) for key, value in self.labels.items()}
        for key, value in labels.items():
            if value.ndim < 1 or len(value) != length:
                raise ValueError(
                    f"{where}: label {key!r} has shape {value.shape}; expected {length} rows for {len(actions)} "
                    "actions: one per image"
                )
        object.__setattr__(self, "labels", labels)
        if not callable(self.images):
            self._check_frames(np.asarray(self.images))

    def __len__(self) -> int:
        """Return T, the number of actions."""
        return len(self.actions)

    @cached_property
    def frames(self) -> np.ndarray:
        """(T + 1, H, W, 3) uint8 RGB; decoded at the first access and kept as long as the episode."""
        return self._check_frames(np.asarray(self.images() if callable(self.images) else self.images))

    @cached_property
    def canonical_actions(self) -> np.ndarray:
        """(T, N, 7) float32: metres, radians, open ratio."""
        return self.action_spec.to_canonical(self.actions)

    def with_poses(self) -> Episode:
        """Return the episode, or, where it has no poses, one with those that its commands lead to from the origin.

        Such poses are the state that an environment shows; their place in the world is not known, so the camera goes.
        """
        if self.eef_pose is not None:
            return self
        start = np.tile(np.eye(4), (self.action_spec.num_effectors, 1, 1))
        commands = self.canonical_actions
        openness = np.concatenate([commands[:1, :, 6], commands[..., 6]]).clip(0.0, 1.0)
        path = np.concatenate([start[None], integrate_poses(start, commands, self.action_spec)])
        return replace(self, eef_pose=path, gripper=openness, camera=None)

    def snapshot(self, t: int = 0) -> Snapshot:
        """Return image `t` as the start of a rollout; only t = 0 carries the simulator's state.

        Raises:
            ValueError: If `t` is no image of this episode, or the poses are unknown.
        """
        if not 0 <= t <= len(self):
            raise ValueError(f"episode {self.name!r}: image {t} asked for; expected 0 to {len(self)}")
        if self.eef_pose is None or self.gripper is None:
            raise ValueError(
                f"episode {self.name!r} has no eef_pose and gripper, so no snapshot can be made; record them, or give "
                "the pose of the first image with dataclasses.replace(episode, eef_pose=..., gripper=...)"
            )
        return Snapshot(
            image=self.frames[t],
            instruction=self.instruction,
            eef_pose=self.eef_pose[t],
            gripper=self.gripper[t],
            camera=self.camera,
            simulator_state=self.simulator_state if t == 0 else None,
            name=self.name if t == 0 else f"{self.name}@{t}",
        )

    def _check_frames(self, frames: np.ndarray) -> np.ndarray:
        where, length = f"episode {self.name!r}", len(self.actions) + 1
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"{where}: images are {frames.dtype} {frames.shape}; expected uint8 (T + 1, H, W, 3) RGB")
        if len(frames) != length:
            raise ValueError(
                f"{where}: {len(frames)} images for {len(self.actions)} actions; expected {length}: image t + 1 is the "
                "result of action t"
            )
        camera = self.camera
        if camera is not None and (camera.height, camera.width) != frames.shape[1:3]:
            raise ValueError(
                f"{where}: camera is {camera.width}x{camera.height} pixels but the images {frames.shape[2]}x"
                f"{frames.shape[1]}; use camera.resized(width, height)"
            )
        return frames
