"""LIBERO's interface: ``from prophet_gym.compat.libero import OffScreenRenderEnv`` is the one line to change.

Robosuite's conventions: observation keys, images upside down, commands in [-1, 1] of the OSC_POSE controller, -1 opens
the gripper, ``step`` returns ``(obs, reward, done, info)``. What an imagined world does not know is not made up: joint
angles are NaN, and the camera in the hand is missing, with an error that says so.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import cv2
import gymnasium as gym
import numpy as np

from ..actions import ACTION_SPECS
from ..arguments import require_between
from ..env import own_info
from ..errors import nearest
from ..rotations import axis_angle_to_quaternion
from ..snapshot import Snapshot
from .single_step import SingleStepVectorEnv
from .starts import only_task

__all__ = ["SUITES", "LiberoEnv", "OffScreenRenderEnv", "task_language"]

SUITES = {
    "libero_spatial": "Prophet-LiberoSpatial-v0",
    "libero_object": "Prophet-LiberoObject-v0",
    "libero_goal": "Prophet-LiberoGoal-v0",
    "libero_10": "Prophet-Libero10-v0",
}
"""World of each suite; the suite is the folder of a task's BDDL file."""
HORIZON = 1000
"""Robosuite's default. LIBERO's loops count their steps themselves and wait a few more before they start."""
_FINGER = 0.04  # m, each finger of a Panda hand, open


class _Observation(dict[str, np.ndarray]):
    def __missing__(self, key: str) -> np.ndarray:
        raise KeyError(
            f"{key!r}: the world does not imagine it; it knows {sorted(self)}. A policy with a wrist camera or depth "
            "needs a world that was trained with them."
        )


class LiberoEnv(gym.Env):
    """A world as LIBERO's ``OffScreenRenderEnv`` looks and behaves: no Gymnasium signature.

    Observation: ``agentview_image`` (H, W, 3) uint8, **vertically flipped** (``[::-1]`` is upright),
    ``robot0_eef_pos`` (3) metres, ``robot0_eef_quat`` (4) x y z w, ``robot0_gripper_qpos`` (2) metres,
    ``robot0_joint_pos`` (7) NaN. Action: (7,) in [-1, 1], ±1 is 0.05 m and 0.5 rad (rotation vector, base frame).
    ``done`` and the reward of 1 say that the latest verdict is success; stepping goes on after it.

    Args:
        engine: a chunk engine of one slot with autoreset disabled.
        action_buffer: "immediate" or "chunk".
        camera_heights: image height in pixels; default the world's.
        camera_widths: image width in pixels; default the world's.

    Raises:
        ValueError: the engine does not fit, or a size is below 1.
    """

    def __init__(
        self,
        engine: Any,
        *,
        action_buffer: str = "immediate",
        camera_heights: int | None = None,
        camera_widths: int | None = None,
    ) -> None:
        self.world = SingleStepVectorEnv(engine, action_spec=ACTION_SPECS["libero"], action_buffer=action_buffer)
        images: Any = self.world.single_observation_space["image"]
        height, width, _ = images.shape
        self.image_size = (
            height if camera_heights is None else camera_heights,
            width if camera_widths is None else camera_widths,
        )
        for name, size in zip(("camera_heights", "camera_widths"), self.image_size, strict=True):
            require_between(name, size, 1, None)
        self.metadata, self.render_mode = {**self.world.metadata, "render_modes": ["rgb_array"]}, "rgb_array"
        self.action_space = self.world.single_action_space
        self._seed: int | None = None
        self._success = False

    @property
    def language_instruction(self) -> str:
        """The goal in words; a ValueError before ``reset``."""
        self.world.latest()
        return str(self._info["instruction"])

    def seed(self, seed: int) -> None:
        """Sets the seed of the next start: its noise and, in ``reset``, the snapshot drawn."""
        self._seed = seed

    def reset(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        """Starts from a snapshot that the seed draws, and returns the observation."""
        return self._begin(None)

    def set_init_state(self, init_state: Any) -> dict[str, np.ndarray]:
        """Starts from the snapshot with this simulator state, and returns the observation.

        Args:
            init_state: a :class:`prophet_gym.Snapshot`, or the flat ``simulator_state`` of one of the world's. LIBERO's
                ``get_task_init_states`` are found where snapshots were given them.

        Raises:
            ValueError: no snapshot has this state.
        """
        if isinstance(init_state, Snapshot):
            return self._begin(init_state)
        wanted = np.asarray(init_state, np.float64).ravel()
        for snapshot in self.world.snapshots or ():
            if snapshot.simulator_state is not None and np.array_equal(snapshot.simulator_state, wanted):
                return self._begin(snapshot)
        raise ValueError(
            f"None of the world's {len(self.world.snapshots or ())} snapshots has this simulator state "
            f"({wanted.size} numbers). A world starts where it has an image: pass a prophet_gym.Snapshot, or give "
            "snapshots= that carry LIBERO's init states as simulator_state."
        )

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, dict[str, Any]]:  # type: ignore[override]
        """Takes one command (7,), an array or a list.

        Raises:
            ValueError: before ``reset``, after the horizon, wrong shape or not finite.
        """
        observation, reward, terminated, _, info = self.world.step(np.asarray(action, np.float64)[None])
        self._success, self._info = bool(terminated[0]), own_info(info)
        return self._observe(observation), float(reward[0]), self._success, dict(self._info)

    def check_success(self) -> bool:
        """Returns the latest verdict."""
        return self._success

    def render(self) -> np.ndarray:
        """Returns the latest real frame, upright, in the world's size."""
        return self.world.render()[0]

    def close(self) -> None:
        """Closes the world."""
        self.world.close()

    def _begin(self, snapshot: Snapshot | None) -> dict[str, np.ndarray]:
        seed, self._seed = self._seed, None
        observation, info = self.world.reset(seed=seed, options={"snapshots": [snapshot]})
        self._success, self._info = False, own_info(info)
        return self._observe(observation)

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        state = observation["state"][0].astype(np.float64)
        image, (height, width) = observation["image"][0], self.image_size
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        finger = _FINGER * state[6]
        return _Observation(
            agentview_image=image[::-1].copy(),
            robot0_eef_pos=state[:3],
            robot0_eef_quat=np.roll(axis_angle_to_quaternion(state[3:6]), -1),  # w x y z -> x y z w
            robot0_gripper_qpos=np.array([finger, -finger]),
            robot0_joint_pos=np.full(7, np.nan),
        )


def OffScreenRenderEnv(
    bddl_file_name: str,
    *,
    camera_heights: int = 128,
    camera_widths: int = 128,
    horizon: int = HORIZON,
    env_id: str | None = None,
    action_buffer: str = "immediate",
    **options: Any,
) -> LiberoEnv:
    """Makes the world of a LIBERO task; the file itself is not read.

    Args:
        bddl_file_name: ``.../libero_spatial/pick_up_....bddl``: the folder gives the world, the name the instruction
            of the snapshots that are used.
        camera_heights: image height, pixels.
        camera_widths: image width, pixels.
        horizon: commands after which ``step`` refuses to go on.
        env_id: another world or simulator behind the interface, with its own snapshots and instructions.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        options: of ``gym.make(env_id, ...)``: ``checkpoint``, ``judge``, ``snapshots``, ``chunk_length``.

    Raises:
        MissingCheckpointError: no weights for the world.
        ValueError: an unknown suite, or a checkpoint without snapshots of the task.
    """
    from ..registration import make_chunk_engine

    suite = PurePath(bddl_file_name).parent.name
    if env_id is None and suite not in SUITES:
        raise ValueError(
            f"bddl_file_name={str(bddl_file_name)!r} lies in {suite!r}; expected one of {sorted(SUITES)}, or env_id=."
            f"{nearest(suite, SUITES)}"
        )
    engine = make_chunk_engine(env_id or SUITES[suite], horizon=horizon, **options)
    if env_id is None:
        engine.snapshots = only_task(engine.snapshots, task_language(bddl_file_name), SUITES[suite])
    return LiberoEnv(engine, action_buffer=action_buffer, camera_heights=camera_heights, camera_widths=camera_widths)


def task_language(bddl_file_name: str) -> str:
    """Returns the instruction in the name of a BDDL file, as LIBERO's benchmark reads it."""
    name = re.sub(r"^[A-Z_]+_SCENE\d+_", "", PurePath(bddl_file_name).stem)
    return name.replace("_", " ")
