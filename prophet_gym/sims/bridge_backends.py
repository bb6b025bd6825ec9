"""The two simulators that have the WidowX tasks, each in its own words: SimplerEnv and ManiSkill3.

A :class:`Backend` hides how they differ; :class:`prophet_gym.sims.simpler.BridgeSim` drives either.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from prophet_gym.compat.maniskill import CONTROL_MODE, ENV_IDS
from prophet_gym.compat.simpler import CAMERA
from prophet_gym.errors import MissingExtraError
from prophet_gym.rotations import matrix_to_axis_angle, matrix_to_euler

__all__ = ["MANISKILL_REMEDY", "SIMPLER_REMEDY", "Backend", "ManiSkillBackend", "SimplerBackend", "import_simulator"]

ASSETS = ("bridge_v2_real2sim", "widowx250s")
"""Data sets of ManiSkill3 that its Bridge tasks are made of."""


class Backend(Protocol):
    """One task of one of the two simulators, in the world frame of that simulator."""

    def reset(self, episode_id: int) -> Any:
        """Starts an episode and returns the observation."""
        ...

    def step(self, shift: np.ndarray, turn: np.ndarray, open_ratio: float) -> tuple[Any, bool]:
        """Takes (3,) metres and a rotation (3, 3), base frame; returns the observation and whether it is success."""
        ...

    def image(self, observation: Any) -> np.ndarray:
        """Returns RGB (480, 640, 3) uint8."""
        ...

    def poses(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns base and gripper link as position and quaternion w x y z, (7,) each, in the world."""
        ...

    def fingers(self, observation: Any) -> np.ndarray:
        """Returns both fingers, (2,) metres."""
        ...

    def view(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns K (3, 3) and the transform from world to camera (3 or 4, 4), OpenCV axes."""
        ...

    def instruction(self) -> str:
        """Returns the goal in words."""
        ...

    def close(self) -> None:
        """Closes the simulator."""
        ...


class SimplerBackend:
    """SimplerEnv (ManiSkill2_real2sim).

    Args:
        task: a key of ``prophet_gym.compat.simpler.TASKS``.

    Raises:
        MissingExtraError: SimplerEnv is not installed.
    """

    def __init__(self, task: str) -> None:
        self.env = import_simulator("simpler_env", SIMPLER_REMEDY).make(task)

    def reset(self, episode_id: int) -> Any:
        """See :class:`Backend`."""
        return self.env.reset(seed=0, options={"obj_init_options": {"episode_id": episode_id}})[0]

    def step(self, shift: np.ndarray, turn: np.ndarray, open_ratio: float) -> tuple[Any, bool]:
        """See :class:`Backend`."""
        command = np.concatenate([shift, matrix_to_axis_angle(turn), [2 * open_ratio - 1]])
        observation, _, terminated, *_ = self.env.step(command)
        return observation, bool(terminated)

    def image(self, observation: Any) -> np.ndarray:
        """See :class:`Backend`."""
        return np.asarray(observation["image"][CAMERA]["rgb"])

    def poses(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Backend`."""
        return np.asarray(observation["agent"]["base_pose"]), np.asarray(observation["extra"]["tcp_pose"])

    def fingers(self, observation: Any) -> np.ndarray:
        """See :class:`Backend`."""
        return np.asarray(observation["agent"]["qpos"])[-2:]

    def view(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Backend`."""
        view = observation["camera_param"][CAMERA]
        return np.asarray(view["intrinsic_cv"]), np.asarray(view["extrinsic_cv"])

    def instruction(self) -> str:
        """See :class:`Backend`."""
        return str(self.env.unwrapped.get_language_instruction())

    def close(self) -> None:
        """See :class:`Backend`."""
        self.env.close()


class ManiSkillBackend:
    """ManiSkill3's digital twins of the same tasks, one environment of its batch.

    Args:
        task: a key of ``prophet_gym.compat.simpler.TASKS``.

    Raises:
        MissingExtraError: ManiSkill3 or its assets are not there.
    """

    def __init__(self, task: str) -> None:
        assets = import_simulator("mani_skill.utils.assets.data", MANISKILL_REMEDY)
        missing = [name for name in ASSETS if not assets.is_data_source_downloaded(name)]
        if missing:  # ManiSkill3 would ask on the terminal, then download
            raise MissingExtraError(f"ManiSkill3 lacks the assets {missing}. {MANISKILL_REMEDY}")
        import_simulator("mani_skill.envs", MANISKILL_REMEDY)
        env_id = {name: key for key, name in ENV_IDS.items()}[task]
        options = {"num_envs": 1, "obs_mode": "rgb+segmentation", "sim_backend": "physx_cpu"}
        try:
            self.env: Any = gym.make(env_id, control_mode=CONTROL_MODE, **options)
        except FileNotFoundError as error:  # a download that broke off leaves its folder
            raise MissingExtraError(
                f"ManiSkill3 lacks some assets of {env_id} ({error}). {MANISKILL_REMEDY}"
            ) from error

    def reset(self, episode_id: int) -> Any:
        """See :class:`Backend`."""
        import torch

        return self.env.reset(seed=0, options={"episode_id": torch.tensor([episode_id])})[0]

    def step(self, shift: np.ndarray, turn: np.ndarray, open_ratio: float) -> tuple[Any, bool]:
        """See :class:`Backend`."""
        # Rx Ry Rz is the transpose of our Rz Ry Rx of the opposite angles.
        command = np.concatenate([shift, -matrix_to_euler(turn.T), [2 * open_ratio - 1]])
        observation, _, terminated, *_ = self.env.step(command[None].astype(np.float32))
        return observation, bool(terminated[0])

    def image(self, observation: Any) -> np.ndarray:
        """See :class:`Backend`."""
        return _array(observation["sensor_data"][CAMERA]["rgb"])

    def poses(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Backend`; ManiSkill3's observation has neither."""
        robot = self.env.unwrapped.agent.robot
        return _array(robot.pose.raw_pose), _array(robot.links_map["ee_gripper_link"].pose.raw_pose)

    def fingers(self, observation: Any) -> np.ndarray:
        """See :class:`Backend`."""
        return _array(observation["agent"]["qpos"])[-2:]

    def view(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Backend`."""
        view = observation["sensor_param"][CAMERA]
        return _array(view["intrinsic_cv"]), _array(view["extrinsic_cv"])

    def instruction(self) -> str:
        """See :class:`Backend`."""
        return str(self.env.unwrapped.get_language_instruction()[0])

    def close(self) -> None:
        """See :class:`Backend`."""
        self.env.close()


SIMPLER_REMEDY = (
    "It is on no package index, and asks for older versions of NumPy and Gymnasium than ours: git clone "
    "--recurse-submodules https://github.com/simpler-env/SimplerEnv, in that folder pip install --no-deps "
    "-e ManiSkill2_real2sim -e . and pip install sapien==2.2.2 transforms3d. Its assets come with the repository. "
    "ManiSkillBridge-v0 has the same tasks and no such conflict."
)
MANISKILL_REMEDY = (
    "Install it: pip install 'prophet-gym[maniskill]', and get the assets (once): python -m "
    "mani_skill.utils.download_asset bridge_v2_real2sim; python -m mani_skill.utils.download_asset widowx250s"
)


def import_simulator(module: str, remedy: str) -> Any:
    """Imports a module of a simulator.

    Raises:
        MissingExtraError: it is not installed; the message ends with ``remedy``.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"This simulator needs {module.split('.')[0]} ({error}). {remedy}") from error


def _array(value: Any) -> np.ndarray:
    """The only entry of a batch, as an array."""
    return np.asarray(value.detach().cpu().numpy())[0]
