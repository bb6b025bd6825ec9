"""SimplerEnv's WidowX tasks, in SimplerEnv itself or in ManiSkill3: the ground truth of ``Prophet-Bridge-v0``.

Commands are BridgeData's (``ACTION_SPECS["bridge"]``): differences of position and Euler angles, open ratio. They are
integrated here, and the motion between two commanded poses goes to the simulator in its own words: metres in the base
frame, a rotation vector (SimplerEnv) or Euler angles Rx @ Ry @ Rz (ManiSkill3), +1 opens. Poses are measured, in the
base frame (both simulators turn the base by 180° against their world) and with BridgeData's orientation, which is zero
where the hand points straight down.

Success counts at the horizon alone, where it may have been lost again: the published protocol. Neither simulator's own
state is used: a state is the task, the start and the commands since, and is restored by playing them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.compat.maniskill import ENV_IDS
from prophet_gym.compat.simpler import DOWN, TASKS
from prophet_gym.errors import nearest
from prophet_gym.rotations import quaternion_to_matrix
from prophet_gym.sims.bridge_backends import (
    MANISKILL_REMEDY,
    SIMPLER_REMEDY,
    ManiSkillBackend,
    SimplerBackend,
    import_simulator,
)
from prophet_gym.sims.simulator import EndsAt
from prophet_gym.sims.simulator_env import SimulatorEnv

__all__ = ["BridgeSim", "make_bridge"]

STARTS = 24
"""Starts of each task, ``episode_id`` 0 to 23."""
_CLOSED, _OPEN = 0.015, 0.037  # m, each finger of a WidowX


BACKENDS: dict[str, tuple[str, Any]] = {
    "simpler": ("SimplerBridge-v0", SimplerBackend),
    "maniskill": ("ManiSkillBridge-v0", ManiSkillBackend),
}
"""Environment id and class of each simulator."""


class BridgeSim:
    """WidowX tasks, one at a time, stepped by BridgeData's commands at 5 Hz.

    Args:
        tasks: keys of ``prophet_gym.compat.simpler.TASKS``; states name theirs by its number here.
        make: a :class:`Backend` class, or anything that makes one for a task.
        name: of the environment, for metadata and errors.
        drawn: numbers of the tasks that a reset draws among; by default all.
        image_size: (height, width) that images are resized to, pixels.
    """

    action_spec = ACTION_SPECS["bridge"]
    ends_at: EndsAt = "horizon"

    def __init__(
        self,
        tasks: Sequence[str],
        make: Any,
        *,
        name: str,
        drawn: Sequence[int] | None = None,
        image_size: tuple[int, int] = (256, 256),
    ) -> None:
        self._drawn = tuple(range(len(tasks)) if drawn is None else drawn)
        self.tasks, self.name, self.image_size = tuple(tasks), name, image_size
        self._make, self._opened = make, -1
        self.backend: Any = None
        self._history: list[np.ndarray] = []  # commands since the start
        self._episode, self._success = 0, False

    @property
    def task(self) -> str:
        """Name of the present task."""
        return self.tasks[self._opened]

    @property
    def instruction(self) -> str:
        """The goal in words."""
        return str(self.backend.instruction())

    @property
    def camera(self) -> Camera:
        """Calibration of the resized image, from the robot's base frame."""
        intrinsics, extrinsics = self.backend.view(self._observation)
        transform = np.eye(4)
        transform[:3] = np.asarray(extrinsics, np.float64)[:3]
        base, _ = (_transform(pose) for pose in self.backend.poses(self._observation))
        height, width = self.backend.image(self._observation).shape[:2]
        camera = Camera(K=np.asarray(intrinsics, np.float64), E=transform @ base, width=width, height=height)
        return camera.resized(self.image_size[1], self.image_size[0])

    @property
    def eef_pose(self) -> np.ndarray:
        """Measured pose (1, 4, 4), base frame, BridgeData's orientation."""
        base, hand = (_transform(pose) for pose in self.backend.poses(self._observation))
        pose = np.linalg.inv(base) @ hand
        pose[:3, :3] = pose[:3, :3] @ DOWN.T
        pose[3] = [0.0, 0.0, 0.0, 1.0]
        return pose[None]

    @property
    def gripper(self) -> np.ndarray:
        """Measured open ratio (1,)."""
        finger = float(np.mean(self.backend.fingers(self._observation)))
        return np.clip([(finger - _CLOSED) / (_OPEN - _CLOSED)], 0.0, 1.0)

    def reset(self, seed: int | None = None, state: np.ndarray | None = None) -> None:
        """Draw a task and one of its starts, or restore a state.

        Raises:
            ValueError: Both came, or the state does not fit.
        """
        if state is not None:
            if seed is not None:
                raise ValueError("reset() got both a seed and a state. A state is a complete start: drop the seed.")
            self.set_state(state)
            return
        rng = np.random.default_rng(seed)
        self._begin(self._drawn[int(rng.integers(len(self._drawn)))], int(rng.integers(STARTS)))

    def step(self, command: np.ndarray) -> None:
        """Execute one command (7,) for 0.2 s.

        Raises:
            ValueError: Wrong shape, not finite or out of bounds.
        """
        command = self.action_spec.check(np.asarray(command)[None], 1)
        canonical = self.action_spec.to_canonical(command)
        before, self._commanded = self._commanded, integrate_poses(self._commanded, canonical, self.action_spec)[0]
        shift = self._commanded[0, :3, 3] - before[0, :3, 3]
        turn = self._commanded[0, :3, :3] @ before[0, :3, :3].T
        self._observation, self._success = self.backend.step(shift, turn, float(canonical[0, 0, 6]))
        self._history.append(command[0])

    def render(self) -> np.ndarray:
        """Image (H, W, 3) uint8."""
        image = np.asarray(self.backend.image(self._observation), np.uint8)
        return cv2.resize(image, self.image_size[::-1], interpolation=cv2.INTER_AREA)

    def is_success(self) -> bool:
        """What the simulator said after the last command."""
        return self._success

    def labels(self) -> dict[str, np.ndarray]:
        """Nothing beyond what every recording has."""
        return {}

    def get_state(self) -> np.ndarray:
        """Task, start and the commands since: flat float64."""
        return np.concatenate([[self._opened, self._episode], *self._history]).astype(np.float64)

    def set_state(self, state: np.ndarray) -> None:
        """Go to the start of that state and play its commands again.

        Raises:
            ValueError: Not such a state.
        """
        state = np.asarray(state, np.float64)
        fits = state.ndim == 1 and len(state) >= 2 and (len(state) - 2) % 7 == 0
        if not fits or int(state[0]) not in range(len(self.tasks)) or int(state[1]) not in range(STARTS):
            raise ValueError(
                f"A state of {self.name} is (2 + 7 n,): a task from 0 to {len(self.tasks) - 1}, a start from 0 to "
                f"{STARTS - 1}, n commands; got shape {state.shape} that begins with {state.ravel()[:2].tolist()}. "
                "Pass what get_state() returned, in an environment with the same tasks."
            )
        self._begin(int(state[0]), int(state[1]))
        for command in state[2:].reshape(-1, 7):
            self.step(command)

    def close(self) -> None:
        """Close the simulator."""
        if self.backend is not None:
            self.backend.close()
            self.backend, self._opened = None, -1

    def _begin(self, task: int, episode: int) -> None:
        if task != self._opened:
            self.close()
            self.backend, self._opened = self._make(self.tasks[task]), task
        self._observation, self._success = self.backend.reset(episode), False
        self._episode, self._history = episode, []
        self._commanded = self.eef_pose


def make_bridge(
    *,
    backend: str,
    task: str | None = None,
    image_size: int | tuple[int, int] = 256,
    horizon: int | None = None,
    **options: Any,
) -> SimulatorEnv:
    """Makes WidowX tasks: ``gym.make("SimplerBridge-v0", task="widowx_carrot_on_plate")`` ends here.

    Args:
        backend: a key of :data:`BACKENDS`.
        task: a key of ``prophet_gym.compat.simpler.TASKS``, or one of ManiSkill3's ids of them; None draws a task at
            every reset.
        image_size: side of the image, or (height, width), pixels; 480x640 is squeezed into it.
        horizon: commands after which an episode ends and success is asked for; by default the longest of the tasks'.
        options: of :class:`prophet_gym.sims.simulator_env.SimulatorEnv`.

    Raises:
        MissingExtraError: the simulator or its assets are not there; the message holds the command.
        ValueError: an unknown task, or a bad option.
    """
    name, kind = BACKENDS[backend]
    wanted = ENV_IDS.get(task, task) if task is not None else None
    if wanted is not None and wanted not in TASKS:
        raise ValueError(f"task={task!r}: expected one of {sorted(TASKS)}, or None.{nearest(task, TASKS)}")
    tasks = tuple(TASKS)
    drawn = [i for i, one in enumerate(tasks) if wanted in (None, one)]
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    longest = max(TASKS[tasks[i]].horizon for i in drawn)
    needed = {"simpler": ("simpler_env", SIMPLER_REMEDY), "maniskill": ("mani_skill.envs", MANISKILL_REMEDY)}
    import_simulator(*needed[backend])
    return SimulatorEnv(
        lambda: BridgeSim(tasks, kind, name=name, drawn=drawn, image_size=(size[0], size[1])),
        horizon=longest if horizon is None else horizon,
        **options,
    )


def _transform(pose: np.ndarray) -> np.ndarray:
    """Position and quaternion w x y z (7,) as a transform (4, 4)."""
    pose, result = np.asarray(pose, np.float64), np.eye(4)
    result[:3, 3], result[:3, :3] = pose[:3], quaternion_to_matrix(pose[3:])
    return result
