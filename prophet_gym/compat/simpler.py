"""SimplerEnv's interface: ``from prophet_gym.compat import simpler as simpler_env`` is the one line to change.

Behind ``simpler_env.make("widowx_carrot_on_plate")`` stands ``Prophet-Bridge-v0``; another world with ``env_id=``. What
an imagined world does not know is not made up: joint angles are NaN, and so are the cameras of worlds without a
calibration; statistics of objects are None; there is no depth and no segmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import gymnasium as gym
import numpy as np

from ..action_frames import Camera
from ..actions import ActionSpec
from ..env import own_info
from ..errors import nearest
from ..rotations import axis_angle_to_matrix, matrix_to_quaternion
from .single_step import SingleStepVectorEnv
from .starts import only_task, pick_episode

__all__ = [
    "ACTION_SPEC",
    "CAMERA",
    "TASKS",
    "SimplerEnv",
    "Task",
    "get_image_from_maniskill2_obs_dict",
    "camera_param",
    "joint_positions",
    "make",
    "resized",
    "tcp_pose",
]

WORLD = "Prophet-Bridge-v0"
CAMERA = "3rd_view_camera"
IMAGE_SIZE = (480, 640)
"""Height and width of SimplerEnv's camera, pixels. Images of other sizes are resized bilinearly, without regard to the
aspect: worlds learn from frames that were squeezed from it."""
_OPEN, _CLOSED = 0.037, 0.015  # m, each finger of a WidowX

BASE_POSE = np.array([0, 0, 0, 1, 0, 0, 0], np.float32)
"""Position and quaternion w x y z of the robot's base: the poses of a world are in its frame. SimplerEnv's ``tcp_pose``
is in a world where the base is turned by 180° about z; take ``base_pose``'s inverse times it, in both."""

DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""Orientation of the gripper link where BridgeData, and with it a world, calls it zero (widowx_controller's
default_rot): the hand points down."""

ACTION_SPEC = ActionSpec(
    delta="servo",
    rotation="axis_angle",
    gripper="open_positive",
    low=(-1.0,) * 3 + (-math.pi / 2,) * 3 + (-1.0,),
    high=(1.0,) * 3 + (math.pi / 2,) * 3 + (1.0,),
    control_hz=5.0,
)
"""Metres and a rotation vector in the robot's base frame; +1 opens the gripper, -1 closes it."""


@dataclass(frozen=True)
class Task:
    """One evaluation task: its goal in words and its time limit in commands."""

    instruction: str
    horizon: int = 60


TASKS: dict[str, Task] = {
    "widowx_carrot_on_plate": Task("put carrot on plate"),
    "widowx_spoon_on_towel": Task("put the spoon on the towel"),
    "widowx_stack_cube": Task("stack the green block on the yellow block"),
    "widowx_put_eggplant_in_basket": Task("put eggplant into yellow basket", horizon=120),
}
"""SimplerEnv's tasks for the WidowX robot, by name."""


class SimplerEnv(gym.Env):
    """A world as SimplerEnv's ManiSkill2 environments look and behave.

    Observation: ``obs["image"]["3rd_view_camera"]["rgb"]`` (480, 640, 3) uint8, ``obs["agent"]["qpos"]`` (8),
    ``obs["agent"]["base_pose"]`` and ``obs["extra"]["tcp_pose"]`` (7, position and quaternion w x y z) and
    ``obs["camera_param"]``. Action: ``Box(7)``, see :data:`ACTION_SPEC`. ``terminated`` is the latest verdict and ends
    nothing: stepping goes on and success may be lost again; ``truncated`` is the time limit alone. ``info`` has
    SimplerEnv's keys beside the world's own, and ``stale`` and ``clipped``
    (:class:`prophet_gym.compat.single_step.SingleStepVectorEnv`).

    Args:
        engine: a chunk engine of one slot with autoreset disabled.
        action_buffer: "immediate" or "chunk".

    Raises:
        ValueError: the engine does not fit.
    """

    robot_uid = "widowx"

    def __init__(self, engine: Any, *, action_buffer: str = "immediate") -> None:
        self.world = SingleStepVectorEnv(engine, action_spec=ACTION_SPEC, action_buffer=action_buffer)
        self.metadata, self.render_mode = {**self.world.metadata, "render_modes": ["rgb_array"]}, "rgb_array"
        self.action_space = self.world.single_action_space
        real, unit = np.float32, gym.spaces
        view = unit.Dict(
            extrinsic_cv=unit.Box(-np.inf, np.inf, (4, 4), real),
            cam2world_gl=unit.Box(-np.inf, np.inf, (4, 4), real),
            intrinsic_cv=unit.Box(-np.inf, np.inf, (3, 3), real),
        )
        self.observation_space = unit.Dict(
            agent=unit.Dict(
                qpos=unit.Box(-np.inf, np.inf, (8,), real), base_pose=unit.Box(-np.inf, np.inf, (7,), real)
            ),
            extra=unit.Dict(tcp_pose=unit.Box(-np.inf, np.inf, (7,), real)),
            camera_param=unit.Dict({CAMERA: view}),
            image=unit.Dict({CAMERA: unit.Dict(rgb=unit.Box(0, 255, (*IMAGE_SIZE, 3), np.uint8))}),
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts a rollout.

        Args:
            seed: of the noise and of the snapshot drawn.
            options: ``{"obj_init_options": {"episode_id": i}}`` starts from snapshot i, modulo their number.
                ``robot_init_options`` is taken and has no effect: a snapshot shows where the robot is.

        Raises:
            ValueError: an unknown option, or ``episode_id`` in a world without snapshots.
        """
        episode = None
        for key, value in (options or {}).items():
            if key == "obj_init_options":
                unknown = sorted(set(value) - {"episode_id"})
                if unknown:
                    raise ValueError(f"obj_init_options {unknown}: a world starts from snapshots; give 'episode_id'.")
                episode = value.get("episode_id")
            elif key not in ("robot_init_options", "reconfigure"):
                known = ("obj_init_options", "robot_init_options")
                raise ValueError(f"Unknown reset option {key!r}; known are {list(known)}.{nearest(key, known)}")
        given = None if episode is None else pick_episode(self.world.snapshots, int(episode))
        observation, info = self.world.reset(seed=seed, options={"snapshots": [given]})
        self._camera = self.world.cameras()[0]
        self._info = own_info(info)
        return self._observe(observation), {**self._info, "episode_id": episode}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Takes one command (7,).

        Raises:
            ValueError: before ``reset``, after the time limit, wrong shape or not finite.
        """
        observation, reward, terminated, truncated, info = self.world.step(np.asarray(action, np.float64)[None])
        success = bool(terminated[0])
        unknown = dict.fromkeys(("moved_correct_obj", "moved_wrong_obj", "is_src_obj_grasped", "consecutive_grasp"))
        stats = {**unknown, "src_on_target": success}
        self._info = {**own_info(info), **stats, "success": success, "episode_stats": stats}
        return self._observe(observation), float(reward[0]), success, bool(truncated[0]), dict(self._info)

    def get_language_instruction(self) -> str:
        """Returns the goal in words.

        Raises:
            ValueError: before ``reset``.
        """
        self.world.latest()
        return str(self._info["instruction"])

    def is_final_subtask(self) -> bool:
        """Returns True: these tasks have one part."""
        return True

    def advance_to_next_subtask(self) -> None:
        """Does nothing: there is no next part."""

    def render(self) -> np.ndarray:
        """Returns the latest real frame (480, 640, 3) uint8."""
        return resized(self.world.render()[0])

    def close(self) -> None:
        """Closes the world."""
        self.world.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "agent": {"qpos": joint_positions(observation["state"])[0], "base_pose": BASE_POSE.copy()},
            "extra": {"tcp_pose": tcp_pose(observation["state"])[0]},
            "camera_param": {CAMERA: camera_param(self._camera)},
            "image": {CAMERA: {"rgb": resized(observation["image"][0])}},
        }


def make(task_name: str, *, env_id: str = WORLD, action_buffer: str = "immediate", **options: Any) -> SimplerEnv:
    """Makes one of SimplerEnv's WidowX tasks as an imagined world.

    Args:
        task_name: a key of :data:`TASKS`. In the default world it decides which snapshots are used and the horizon.
        env_id: another world or simulator behind the interface, with its own snapshots and horizon.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        options: of ``gym.make(env_id, ...)``: ``checkpoint``, ``judge``, ``snapshots``, ``horizon``, ``chunk_length``.

    Raises:
        MissingCheckpointError: no weights for ``env_id``.
        ValueError: an unknown task, or a checkpoint without snapshots of it.
    """
    from ..registration import make_chunk_engine

    if task_name not in TASKS:
        raise ValueError(f"Unknown task {task_name!r}; known are {sorted(TASKS)}.{nearest(task_name, TASKS)}")
    task = TASKS[task_name]
    if env_id == WORLD:
        options = {"horizon": task.horizon, **options}
    engine = make_chunk_engine(env_id, **options)
    if env_id == WORLD:
        engine.snapshots = only_task(engine.snapshots, task.instruction, env_id)
    return SimplerEnv(engine, action_buffer=action_buffer)


def get_image_from_maniskill2_obs_dict(env: Any, obs: dict[str, Any], camera_name: str | None = None) -> np.ndarray:
    """Returns the camera image (480, 640, 3) uint8, as SimplerEnv's helper of this name does."""
    return obs["image"][camera_name or CAMERA]["rgb"]


def joint_positions(state: np.ndarray) -> np.ndarray:
    """Returns ``qpos`` (B, 8) float32 for states (B, 8): NaN for the arm, metres for the fingers."""
    finger = _CLOSED + (_OPEN - _CLOSED) * state[:, 6:7]
    return np.concatenate([np.full((len(state), 6), np.nan), finger, finger], axis=1).astype(np.float32)


def tcp_pose(state: np.ndarray) -> np.ndarray:
    """Returns position (metres) and quaternion w x y z of the gripper link, (B, 7) float32, for states (B, 8)."""
    link = axis_angle_to_matrix(state[:, 3:6].astype(np.float64)) @ DOWN
    return np.concatenate([state[:, :3], matrix_to_quaternion(link)], axis=1).astype(np.float32)


def camera_param(camera: Camera | None) -> dict[str, np.ndarray]:
    """Returns ManiSkill's camera matrices, float32, for an image of 480x640; NaN where no camera is known."""
    if camera is None:
        shapes = {"extrinsic_cv": (4, 4), "cam2world_gl": (4, 4), "intrinsic_cv": (3, 3)}
        return {key: np.full(shape, np.nan, np.float32) for key, shape in shapes.items()}
    height, width = IMAGE_SIZE
    from_opengl = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL looks along -z with y up
    return {
        "extrinsic_cv": camera.E.astype(np.float32),
        "cam2world_gl": (np.linalg.inv(camera.E) @ from_opengl).astype(np.float32),
        "intrinsic_cv": camera.resized(width, height).K.astype(np.float32),
    }


def resized(image: np.ndarray) -> np.ndarray:
    """Returns an image (H, W, 3) uint8 as (480, 640, 3)."""
    return cv2.resize(image, IMAGE_SIZE[::-1], interpolation=cv2.INTER_LINEAR)
