"""ManiSkill3's interface to the same tasks as :mod:`prophet_gym.compat.simpler`: torch batches, Euler angles.

``from prophet_gym.compat import maniskill as gym`` is the one line to change: ``gym.make("PutCarrotOnPlateInScene-v1",
num_envs=4)`` then steps four imagined worlds with one model call. What a world does not know is NaN, also in ``info``,
where loops average every entry.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import batch_space

from ..errors import nearest
from ..rotations import euler_to_matrix, matrix_to_axis_angle
from .simpler import ACTION_SPEC, CAMERA, TASKS, WORLD, camera_param, joint_positions, resized, tcp_pose
from .single_step import SingleStepVectorEnv
from .starts import only_task, pick_episode

__all__ = ["CONTROL_MODE", "ENV_IDS", "ManiSkillEnv", "make"]

ENV_IDS = {
    "PutCarrotOnPlateInScene-v1": "widowx_carrot_on_plate",
    "PutSpoonOnTableClothInScene-v1": "widowx_spoon_on_towel",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": "widowx_stack_cube",
    "PutEggplantInBasketScene-v1": "widowx_put_eggplant_in_basket",
}
"""ManiSkill3's ids of SimplerEnv's tasks."""
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
"""The WidowX controller whose commands these are."""
_UNKNOWN = ("moved_correct_obj", "moved_wrong_obj", "is_src_obj_grasped", "consecutive_grasp")
_NO_EFFECT = ("sim_backend", "sim_config", "sensor_configs", "render_backend", "parallel_in_single_scene")


class ManiSkillEnv(gym.Env):
    """A batch of worlds as ManiSkill3's digital twins of BridgeData V2 look and behave.

    Observation: ``obs["sensor_data"]["3rd_view_camera"]["rgb"]`` (B, 480, 640, 3) torch uint8, ``obs["agent"]["qpos"]``
    (B, 8), ``obs["sensor_param"]``. Action: (B, 7), or (7,) for B = 1, a tensor or array: metres, Euler angles
    ``Rx @ Ry @ Rz`` in the base frame, +1 opens. Reward, ``terminated``, ``truncated`` are tensors (B,), every ``info``
    entry too. ``terminated`` is the latest verdict and ends nothing; ``truncated`` is the time limit alone.

    Args:
        engine: a chunk engine with autoreset disabled.
        action_buffer: "immediate" or "chunk".

    Raises:
        ValueError: the engine does not fit.
    """

    robot_uids = SimpleNamespace(uid="widowx250s_bridgedataset_flat_table")

    def __init__(self, engine: Any, *, action_buffer: str = "immediate") -> None:
        self.world = SingleStepVectorEnv(engine, action_spec=ACTION_SPEC, action_buffer=action_buffer)
        self.num_envs, self.device = self.world.num_envs, torch.device("cpu")
        self.metadata, self.render_mode = {**self.world.metadata, "render_modes": ["rgb_array"]}, "rgb_array"
        self.single_action_space = self.world.single_action_space
        single = self.num_envs == 1
        self.action_space = self.single_action_space if single else batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Starts all rollouts.

        Args:
            seed: one, or one per slot.
            options: ``{"episode_id": tensor (B,)}`` starts slot i from that snapshot, modulo their number; older loops
                say ``{"obj_init_options": {"episode_id": ...}}``. ``robot_init_options`` is taken and has no effect.

        Raises:
            ValueError: an unknown option, another number of ids than slots, or a world without snapshots.
        """
        known = ("episode_id", "obj_init_options", "robot_init_options", "reconfigure")
        for key in options or {}:
            if key not in known:
                raise ValueError(f"Unknown reset option {key!r}; known are {list(known)}.{nearest(key, known)}")
        given = dict(options or {})
        episodes = given.get("episode_id", given.get("obj_init_options", {}).get("episode_id"))
        starts = None
        if episodes is not None:
            ids = np.broadcast_to(
                np.asarray(episodes), (self.num_envs,) if np.ndim(episodes) == 0 else np.shape(episodes)
            )
            if ids.shape != (self.num_envs,):
                raise ValueError(f"episode_id has shape {ids.shape}; expected ({self.num_envs},): one per slot.")
            starts = [pick_episode(self.world.snapshots, int(i)) for i in ids]
        observation, info = self.world.reset(seed=_seeds(seed), options={"snapshots": starts})
        self._instructions = [str(text) for text in info["instruction"]]
        self._cameras = self.world.cameras()
        return self._observe(observation), {}

    def step(self, action: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Takes one command in every slot.

        Raises:
            ValueError: before ``reset``, after the time limit, wrong shape or not finite.
        """
        commands = np.array(action.detach().cpu().numpy() if isinstance(action, torch.Tensor) else action, np.float64)
        commands = commands[None] if commands.ndim == 1 and self.num_envs == 1 else commands
        if commands.shape == (self.num_envs, 7) and np.isfinite(commands).all():  # what is not, the world refuses
            # Rx Ry Rz is the transpose of our Rz Ry Rx of the opposite angles.
            turns = np.swapaxes(euler_to_matrix(-np.clip(commands[:, 3:6], -math.pi / 2, math.pi / 2)), -1, -2)
            commands[:, 3:6] = matrix_to_axis_angle(turns)
        observation, reward, terminated, truncated, info = self.world.step(commands)
        unknown = {key: torch.full((self.num_envs,), torch.nan) for key in _UNKNOWN}
        own = {
            key: torch.as_tensor(np.array(info[key])) for key in ("elapsed_steps", "stale", "clipped", "judge_valid")
        }
        success = torch.as_tensor(terminated)
        extra = {**own, **unknown, "src_on_target": success.clone(), "success": success.clone()}
        rewards = torch.as_tensor(reward, dtype=torch.float32)
        return self._observe(observation), rewards, success, torch.as_tensor(truncated), extra

    def get_language_instruction(self) -> list[str]:
        """Returns the goal of every slot in words.

        Raises:
            ValueError: before ``reset``.
        """
        self.world.latest()
        return list(self._instructions)

    def is_final_subtask(self) -> bool:
        """Returns True: these tasks have one part."""
        return True

    def render(self) -> torch.Tensor:
        """Returns the latest real frames (B, 480, 640, 3) uint8."""
        return torch.from_numpy(np.stack([resized(image) for image in self.world.render()]))

    def close(self) -> None:
        """Closes the world."""
        self.world.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        views = [camera_param(camera) for camera in self._cameras]
        stacked = {key: torch.from_numpy(np.stack([view[key] for view in views])) for key in views[0]}
        stacked["extrinsic_cv"] = stacked["extrinsic_cv"][:, :3]
        images = np.stack([resized(image) for image in observation["image"]])
        return {
            "agent": {"qpos": torch.from_numpy(joint_positions(observation["state"]))},
            "extra": {"tcp_pose": torch.from_numpy(tcp_pose(observation["state"]))},
            "sensor_param": {CAMERA: stacked},
            "sensor_data": {CAMERA: {"rgb": torch.from_numpy(images)}},
        }


def make(
    id: str,
    *,
    num_envs: int = 1,
    obs_mode: str = "rgb+segmentation",
    control_mode: str | None = None,
    max_episode_steps: int | None = None,
    env_id: str = WORLD,
    action_buffer: str = "immediate",
    **options: Any,
) -> ManiSkillEnv:
    """Makes one of ManiSkill3's Bridge tasks as imagined worlds; stands in for ``gymnasium.make``.

    Args:
        id: a key of :data:`ENV_IDS`. In the default world it decides which snapshots are used and the horizon.
        num_envs: slots B.
        obs_mode: must show "rgb"; segmentation and depth are not imagined.
        control_mode: None or :data:`CONTROL_MODE`.
        max_episode_steps: time limit in commands; default the task's.
        env_id: another world or simulator behind the interface, with its own snapshots and horizon.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        options: of ``gym.make(env_id, ...)``; ManiSkill's settings of physics and rendering have no effect.

    Raises:
        MissingCheckpointError: no weights for ``env_id``.
        ValueError: an unknown id, mode or controller, or a checkpoint without snapshots of the task.
    """
    from ..registration import make_chunk_engine

    if id not in ENV_IDS:
        raise ValueError(f"Unknown id {id!r}; known are {sorted(ENV_IDS)}.{nearest(id, ENV_IDS)}")
    if "rgb" not in obs_mode.split("+"):
        raise ValueError(f"obs_mode={obs_mode!r}: a world imagines images; expected 'rgb' in it.")
    if control_mode not in (None, CONTROL_MODE):
        raise ValueError(f"control_mode={control_mode!r}: expected None or {CONTROL_MODE!r}.")
    task = TASKS[ENV_IDS[id]]
    options = {key: value for key, value in options.items() if key not in _NO_EFFECT}
    if max_episode_steps is not None or env_id == WORLD:
        options.setdefault("horizon", max_episode_steps or task.horizon)
    engine = make_chunk_engine(env_id, num_envs, **options)
    if env_id == WORLD:
        engine.snapshots = only_task(engine.snapshots, task.instruction, env_id)
    return ManiSkillEnv(engine, action_buffer=action_buffer)


def _seeds(seed: Any) -> Any:
    return seed if seed is None or np.ndim(seed) == 0 else [int(s) for s in np.asarray(seed)]
