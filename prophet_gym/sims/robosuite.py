"""Robosuite (1.4) with one Panda arm under OSC_POSE, as LIBERO uses it: the part below LIBERO's tasks.

Commands are LIBERO's: ±1 is 0.05 m and 0.5 rad about the world's axes, -1 opens. The controller adds each command to
the *measured* pose and reaches a fifth to a quarter of it within its control period, so the state is the measured pose;
integrated commands would run away from it. Position is that of the grip site and orientation that of the hand's body,
which is what ``robot0_eef_pos``, ``robot0_eef_quat`` and LIBERO's recordings say (the site is turned by 90° about z
against the body). Robosuite stores images upside down; here they are upright.

Everything is a function of the flat state, which holds what robosuite's own state leaves out: the controller's goal,
the gripper's ramp, where fixtures stand. The model is built once per task, from a fixed seed, so states fit it forever.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import radians, tan
from typing import Any

import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.errors import MissingExtraError, nearest
from prophet_gym.rotations import quaternion_to_matrix
from prophet_gym.sims.rendering import claim_backend
from prophet_gym.sims.simulator import EndsAt

__all__ = ["RobosuiteSim", "RobosuiteTask", "import_robosuite"]

_FINGER = 0.04  # m, travel of each finger of a Panda hand
_SCALES = (*[0.05] * 3, *[0.5] * 3)  # m and rad that OSC_POSE makes of a command of 1
_ATTEMPTS = 100  # placements that robosuite may fail to find before we give up
_NOTHING = np.array([0.0] * 6 + [-1.0])


@dataclass(frozen=True)
class RobosuiteTask:
    """One task: one model, one goal.

    Attributes:
        name: of the task.
        instruction: the goal in words.
        make: makes the robosuite environment, with an off-screen renderer, ``hard_reset=False``, ``ignore_done=True``.
        start_states: returns the states (n, 1 + nq + nv) of which an episode takes one; None: robosuite draws a scene.
        settle: commands of doing nothing, gripper open, before an episode begins.
    """

    name: str
    instruction: str
    make: Callable[[], Any]
    start_states: Callable[[], np.ndarray] | None = None
    settle: int = 0


class RobosuiteSim:
    """Tasks of robosuite, one at a time, stepped by native commands at 20 Hz.

    Args:
        tasks: at least one; states name theirs by its number here.
        name: of the environment, for metadata and errors.
        drawn: numbers of the tasks that a reset draws among; by default all.
        camera: name of the camera.
        size: side of the square image, pixels.

    Raises:
        ValueError: no task, or an environment with another robot, controller, gripper, rate or camera.
    """

    action_spec = ACTION_SPECS["libero"]
    ends_at: EndsAt = "command"

    def __init__(
        self,
        tasks: Sequence[RobosuiteTask],
        *,
        name: str,
        drawn: Sequence[int] | None = None,
        camera: str = "agentview",
        size: int = 256,
    ) -> None:
        if not tasks or size < 1:
            raise ValueError(f"{name}: {len(tasks)} tasks and images of {size} pixels; expected at least 1 of each.")
        self.tasks, self.name, self.image_size = tuple(tasks), name, (size, size)
        self._drawn = tuple(range(len(tasks)) if drawn is None else drawn)
        self._camera_name, self._opened = camera, -1
        self.env: Any = None

    @property
    def task(self) -> str:
        """Name of the present task."""
        return self.tasks[self._opened].name

    @property
    def instruction(self) -> str:
        """The goal in words."""
        return self.tasks[self._opened].instruction

    @property
    def camera(self) -> Camera | None:
        """K and E (world to camera, OpenCV axes) of the upright image; None where the camera moves, as on a wrist."""
        data, model, size = self.env.sim.data, self.env.sim.model, self.image_size[0]
        index = model.camera_name2id(self._camera_name)
        if model.body_weldid[model.cam_bodyid[index]] != 0:  # its body is not welded to the world
            return None
        focal = size / 2 / tan(radians(model.cam_fovy[index]) / 2)
        intrinsics = np.array([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]])
        # OpenGL looks along -z with y up.
        rotation = np.diag([1.0, -1.0, -1.0]) @ np.reshape(data.cam_xmat[index], (3, 3)).T
        extrinsics = np.eye(4)
        extrinsics[:3, :3], extrinsics[:3, 3] = rotation, -rotation @ data.cam_xpos[index]
        return Camera(K=intrinsics, E=extrinsics, width=size, height=size)

    @property
    def eef_pose(self) -> np.ndarray:
        """Measured pose (1, 4, 4): place of the grip site, orientation of the hand's body."""
        robot, data = self.env.robots[0], self.env.sim.data
        pose = np.eye(4)
        pose[:3, 3] = data.site_xpos[robot.eef_site_id]
        pose[:3, :3] = quaternion_to_matrix(np.array(data.get_body_xquat(robot.robot_model.eef_name)))
        return pose[None]

    @property
    def gripper(self) -> np.ndarray:
        """Measured open ratio (1,)."""
        fingers = np.asarray(self.env.sim.data.qpos)[self.env.robots[0]._ref_gripper_joint_pos_indexes]
        return np.clip([(fingers[0] - fingers[1]) / (2 * _FINGER)], 0.0, 1.0)

    def reset(self, seed: int | None = None, state: np.ndarray | None = None) -> None:
        """Draw a task and a scene, or restore a state.

        Args:
            seed: decides both; None draws from the operating system.
            state: from :meth:`get_state`; excludes ``seed``.

        Raises:
            ValueError: Both came, or the state does not fit.
            RuntimeError: robosuite found no free places for the objects.
        """
        if state is not None:
            if seed is not None:
                raise ValueError("reset() got both a seed and a state. A state is a complete start: drop the seed.")
            self.set_state(state)
            return
        rng = np.random.default_rng(seed)
        self._open(self._drawn[int(rng.integers(len(self._drawn)))])
        task, errors = self.tasks[self._opened], importlib.import_module("robosuite.utils.errors")
        for _ in range(_ATTEMPTS):
            try:
                with _seeded(int(rng.integers(2**32))):
                    self.env.reset()
                break
            except errors.RandomizationError:
                continue
        else:
            raise RuntimeError(f"{self.name}: robosuite found no free places for the objects of {task.name!r}.")
        if task.start_states is not None:
            states = task.start_states()
            self.env.sim.set_state_from_flattened(states[int(rng.integers(len(states)))])
            self.env.sim.forward()
            self._refresh()
        for _ in range(task.settle):
            self.env.step(_NOTHING)
        self._update_kinematics()

    def step(self, command: np.ndarray) -> None:
        """Execute one command (7,) for 50 ms.

        Raises:
            ValueError: Wrong shape, not finite or out of bounds.
        """
        command = self.action_spec.check(np.asarray(command)[None], 1)[0]
        self.env.step(command.astype(np.float64))
        self._update_kinematics()

    def render(self) -> np.ndarray:
        """Image (H, W, 3) uint8, upright."""
        height, width = self.image_size
        self._make_current()
        pixels = self.env.sim.render(camera_name=self._camera_name, width=width, height=height)
        return np.ascontiguousarray(pixels[::-1])

    def is_success(self) -> bool:
        """Whether robosuite's (or LIBERO's) own check is fulfilled now."""
        return bool(self.env._check_success())

    def labels(self) -> dict[str, np.ndarray]:
        """Nothing beyond what every recording has."""
        return {}

    def get_state(self) -> np.ndarray:
        """Everything that decides the future: flat float64, the task's index first."""
        import mujoco

        sim, (controller, gripper) = self.env.sim, self._controls()
        physics = np.empty(mujoco.mj_stateSize(sim.model._model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(sim.model._model, sim.data._data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        parts = (physics, sim.model.body_pos, sim.model.body_quat, controller.goal_pos, controller.goal_ori)
        rest = (controller.initial_joint, np.broadcast_to(gripper.current_action, 2))  # one number until the first step
        return np.concatenate([[self._opened], *(np.ravel(part) for part in (*parts, *rest))])

    def set_state(self, state: np.ndarray) -> None:
        """Restore a state, of whichever task; stepping goes on with the same bytes.

        Raises:
            ValueError: No such task, or another number of values.
        """
        import mujoco

        state = np.asarray(state, np.float64)
        if state.ndim != 1 or not len(state) or int(state[0]) not in range(len(self.tasks)):
            raise ValueError(
                f"A state of {self.name} begins with the index of a task, 0 to {len(self.tasks) - 1}; got an array of "
                f"shape {state.shape} that begins with {state.ravel()[:1].tolist()}. Pass what get_state() returned, "
                "in an environment with the same tasks."
            )
        if int(state[0]) != self._opened:
            self._open(int(state[0]))
        if state.shape != self.get_state().shape:
            raise ValueError(
                f"A state of {self.task!r} has shape {self.get_state().shape}, got {state.shape}. Pass what "
                "get_state() returned, with the same versions of robosuite and its assets."
            )
        with _seeded(0):
            self.env.reset()  # robosuite's own counters and buffers, and a new controller
        sim, (controller, gripper) = self.env.sim, self._controls()
        model, data, integration = sim.model._model, sim.data._data, mujoco.mjtState.mjSTATE_INTEGRATION
        bodies, joints = model.nbody, len(controller.initial_joint)
        sizes = (1, mujoco.mj_stateSize(model, integration), 3 * bodies, 4 * bodies, 3, 9, joints)
        _, physics, places, turns, goal, turn, initial, ramp = np.split(state, np.cumsum(sizes))
        model.body_pos[:], model.body_quat[:] = places.reshape(-1, 3), turns.reshape(-1, 4)
        mujoco.mj_setState(model, data, physics, integration)
        sim.forward()
        self._refresh()
        controller.goal_pos, controller.goal_ori = goal.copy(), turn.reshape(3, 3).copy()
        controller.initial_joint, gripper.current_action = initial.copy(), ramp.copy()
        mujoco.mj_setState(model, data, physics, integration)  # forward overwrote the solver's warm start
        self._update_kinematics()

    def close(self) -> None:
        """Free model and renderer."""
        if self.env is not None:
            self._make_current()  # what is freed belongs to it
            self.env.close()
            self.env, self._opened = None, -1
            gc.collect()
            _open_sims.discard(self)

    def _make_current(self) -> None:
        """Another environment of this process may have been drawn since."""
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _controls(self) -> tuple[Any, Any]:
        robot = self.env.robots[0]
        return robot.controller, robot.gripper

    def _refresh(self) -> None:
        """Lets controller and object states follow a state that was set."""
        self.env.robots[0].controller.update(force=True)
        if hasattr(self.env, "_post_process"):  # LIBERO's switches and lights
            self.env._post_process()

    def _update_kinematics(self) -> None:
        """Poses and cameras of the present joint positions: MuJoCo leaves them one integration step (2 ms) behind."""
        import mujoco

        model, data = self.env.sim.model._model, self.env.sim.data._data
        for update in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            update(model, data)

    def _open(self, index: int) -> None:
        if index == self._opened:
            return
        self.close()
        with _seeded(index):
            self.env = self.tasks[index].make()
        self._opened = index
        _open_sims.add(self)
        _close_all_at_exit()
        try:
            self._require_conventions()
        except ValueError:
            self.close()
            raise

    def _require_conventions(self) -> None:
        controller, gripper = self._controls()
        cameras = tuple(self.env.sim.model.camera_names)
        scales = np.asarray(getattr(controller, "output_max", ()))
        seen = (len(self.env.robots), controller.name, type(gripper).__name__, float(self.env.control_freq))
        expected = (1, "OSC_POSE", "PandaGripper", self.action_spec.control_hz)
        if seen != expected or not np.allclose(scales, _SCALES):
            raise ValueError(
                f"{self.name}, task {self.task!r}: robots, controller, gripper and rate are {seen} with a scale of "
                f"{scales.tolist()}; expected {expected} with {list(_SCALES)}: another robot needs an ActionSpec "
                "of its own."
            )
        if self._camera_name not in cameras:
            known = f"known are {sorted(cameras)}.{nearest(self._camera_name, cameras)}"
            raise ValueError(f"{self.name} has no camera {self._camera_name!r}; {known}")


ENV_OPTIONS: dict[str, Any] = {
    "has_renderer": False,
    "has_offscreen_renderer": True,
    "use_camera_obs": False,  # images are rendered when they are asked for
    "control_freq": 20,
    "hard_reset": False,
    "ignore_done": True,
}
"""What :class:`RobosuiteSim` needs of a robosuite environment."""


def import_robosuite() -> Any:
    """Imports robosuite after this process has been bound to an OpenGL backend that works.

    Raises:
        MissingExtraError: robosuite is not installed.
    """
    claim_backend()  # robosuite insists on EGL unless OSMesa is named before its import
    try:
        return importlib.import_module("robosuite")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"This simulator needs robosuite 1.4 ({error}). Install it: pip install 'prophet-gym[robosuite]'. Its "
            "models come with it; there is nothing else to download."
        ) from error


_open_sims: weakref.WeakSet[RobosuiteSim] = weakref.WeakSet()


@cache
def _close_all_at_exit() -> None:
    """Registered after the first context: exit handlers run in reverse, so before MuJoCo's own ends the display."""

    def close_all() -> None:
        for sim in list(_open_sims):
            sim.close()

    atexit.register(close_all)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Robosuite draws from NumPy's global generator: seed it, and give it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
