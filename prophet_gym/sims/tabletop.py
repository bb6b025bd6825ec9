"""The Tabletop simulator: a parallel-jaw hand, a block, a plate and one calibrated camera, in MuJoCo.

It is the ground truth of the embedded default: it records the trajectories that ``Prophet-Tabletop-v0`` learns from,
and it is where policies reinforced inside the world model must prove themselves. The commanded pose is the integral of
the commands (:func:`prophet_gym.actions.integrate_poses`, which the world model shares), clamped to the workspace;
position actuators track it with a lag of about 10 ms. Everything is a function of the flat state: restoring one and
stepping gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from math import tan
from typing import Any

import mujoco
import numpy as np

from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.errors import nearest
from prophet_gym.sims.looks import LOOKS
from prophet_gym.sims.rendering import OffscreenRenderer
from prophet_gym.sims.simulator import EndsAt, take_snapshot
from prophet_gym.snapshot import Snapshot

TASKS = ("put", "push_left", "push_right")

BLOCK_HALF = 0.027  # m, half a side of the cube
PLATE_RADIUS = 0.065  # m
PLATE_TOP = 0.008  # m above the table
EDGE_X = 0.15  # m, inner border of the painted strips at the left and right edges
JAW_TRAVEL = 0.05  # m of each finger; an open ratio of 1 is a gap of twice this
PARKED = (2.0, 2.0, 2.0)  # m, where the distractor floats out of sight when the scene has none
REST_SPEED, REST_SPIN = 0.03, 0.6  # m/s and rad/s below which a block counts as resting

_NUM_BLOCKS, _NUM_PLATES = 4, 2  # colours of every look
_SUBSTEPS = 40  # integration steps per command: 100 ms, over which the controller target moves linearly
_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass
class Scene:
    """What a reset draws apart from physics: indices into the look's palettes and the plate's place.

    Attributes:
        task: Index into ``TASKS``.
        block_colour: Index into the look's blocks.
        plate_colour: Index into its plates.
        distractor_colour: Index into its blocks, or -1 for no second block.
        plate_xy: Centre of the plate in metres.
    """

    task: int
    block_colour: int
    plate_colour: int
    distractor_colour: int
    plate_xy: tuple[float, float]

    def to_array(self) -> np.ndarray:
        """The scene as 6 float64 numbers."""
        colours = (self.block_colour, self.plate_colour, self.distractor_colour)
        return np.array([self.task, *colours, *self.plate_xy], np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> Scene:
        """Inverse of :meth:`to_array`."""
        task, block, plate, distractor = (int(value) for value in values[:4])
        return cls(task, block, plate, distractor, (float(values[4]), float(values[5])))


def _sample_layout(rng: np.random.Generator) -> tuple[Scene, np.ndarray, float, np.ndarray, float]:
    """Draw task, colours and collision-free places: scene, block xy, block yaw, distractor xyz, distractor yaw."""
    task = int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    colours = rng.permutation(_NUM_BLOCKS)[:2]
    plate_colour = int(rng.integers(_NUM_PLATES))
    has_distractor = rng.random() < 0.3
    direction = (0, -1, 1)[task]
    while True:
        block, plate, other = rng.uniform(-0.13, 0.13, (3, 2))
        if direction:
            block[0] *= 0.7
            # A push needs a free corridor: along it, the others stay beside the block or well behind the hand.
            others = [plate, other] if has_distractor else [plate]
            blocked = (abs(p[1] - block[1]) < 0.13 and direction * (p[0] - block[0]) > -0.19 for p in others)
            if any(blocked):
                continue
        if np.linalg.norm(block - plate) < 0.14:
            continue
        if has_distractor and (np.linalg.norm(other - block) < 0.12 or np.linalg.norm(other - plate) < 0.13):
            continue
        break
    yaw, other_yaw = np.radians(rng.uniform(-25, 25, 2))
    scene = Scene(task, int(colours[0]), plate_colour, int(colours[1]) if has_distractor else -1, tuple(plate))
    distractor = np.array([*other, BLOCK_HALF]) if has_distractor else np.array(PARKED)
    return scene, block, float(yaw), distractor, float(other_yaw)


def _rotation_z(yaw: float) -> np.ndarray:
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _hinge_angles(rotation: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Yaw, pitch, roll (rad) with R = Rz @ Ry @ Rx, of all equivalent triples the one nearest to the previous."""
    pitch = np.arcsin(np.clip(-rotation[2, 0], -1.0, 1.0))
    yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
    roll = np.arctan2(rotation[2, 1], rotation[2, 2])
    branches = np.array([[yaw, pitch, roll], [yaw + np.pi, np.pi - pitch, roll + np.pi]])
    branches += 2 * np.pi * np.round((previous - branches) / (2 * np.pi))
    return branches[np.abs(branches - previous).sum(1).argmin()]


class TabletopSim:
    """One Tabletop scene, stepped by native commands at 10 Hz.

    Frames: world axes are x right, y away from the front camera, z up, origin on the table. The end-effector frame sits
    between the finger pads; the identity orientation points straight down with the jaws along x.

    Args:
        render_size: Side of the square image in pixels.
        look: Camera and colours: a key of ``prophet_gym.sims.looks.LOOKS``.

    Raises:
        ValueError: Unknown look.

    Attributes:
        look: The ``TabletopLook``.
        action_spec: ``ACTION_SPECS["tabletop"]``.
        camera: Calibration of the image.
        commanded_pose: (1, 4, 4) float64, the integrated commands.
        gripper: (1,) float64, the commanded open ratio.
        num_steps: Commands since the reset.
    """

    name = "Tabletop-v0"
    action_spec = ACTION_SPECS["tabletop"]
    ends_at: EndsAt = "chunk"

    def __init__(self, render_size: int = 64, look: str = "first") -> None:
        if look not in LOOKS:
            raise ValueError(f"look={look!r}: expected one of {sorted(LOOKS)}.{nearest(look, LOOKS)}")
        self.look = LOOKS[look]
        self.model = mujoco.MjModel.from_xml_path(str(files("prophet_gym") / "assets" / "tabletop.xml"))
        self.data = mujoco.MjData(self.model)
        self.render_size = render_size
        self._renderer: OffscreenRenderer | None = None
        self._block, self._distractor = self.model.joint("block"), self.model.joint("distractor")
        self._block_geom = self.model.geom("block").id
        self._pads = tuple(self.model.geom(f"{side}_pad").id for side in ("left", "right"))
        self._num_physics = mujoco.mj_stateSize(self.model, _PHYSICS)
        for geom, colour in self.look.paint.items():
            self.model.geom(geom).rgba[:] = colour
        self.camera = self._calibrate()
        self.reset(seed=0)

    def reset(self, seed: int | None = None, state: np.ndarray | None = None) -> None:
        """Draw a new scene, or restore one.

        Args:
            seed: Seed of the layout; None draws one from the operating system.
            state: Flat state from :meth:`get_state`; excludes ``seed``.

        Raises:
            ValueError: Both a seed and a state came, or the state has the wrong size.
        """
        if state is not None:
            if seed is not None:
                raise ValueError("reset() got both a seed and a state. A state is a complete start: drop the seed.")
            self.set_state(state)
            return
        rng = np.random.default_rng(seed)
        scene, block, yaw, distractor, other_yaw = _sample_layout(rng)
        mujoco.mj_resetData(self.model, self.data)
        self._apply_scene(scene)
        self._place(self._block, np.array([*block, BLOCK_HALF]), yaw)
        self._place(self._distractor, distractor, other_yaw)
        pose = np.eye(4)
        pose[:3, 3] = rng.uniform((-0.06, -0.06, 0.11), (0.06, 0.06, 0.16))
        hand_yaw = rng.uniform(-0.1, 0.1)
        pose[:3, :3] = _rotation_z(hand_yaw)
        self.commanded_pose, self.gripper, self.num_steps = pose[None], np.ones(1), 0
        self.data.ctrl[:] = [*pose[:3, 3], hand_yaw, 0.0, 0.0, JAW_TRAVEL, JAW_TRAVEL]
        start = self.model.joint("x").qposadr[0]
        self.data.qpos[start : start + 8] = self.data.ctrl
        mujoco.mj_step(self.model, self.data, _SUBSTEPS)  # contacts settle: 100 ms
        mujoco.mj_forward(self.model, self.data)

    def step(self, command: np.ndarray) -> None:
        """Execute one command for one control period (100 ms).

        Args:
            command: (7,) native command: metres, axis-angle radians, open ratio.

        Raises:
            ValueError: Wrong shape, not finite or out of the action spec's bounds.
        """
        command = np.asarray(command, np.float32)
        if command.ndim != 1:
            raise ValueError(f"step() takes one command of shape (7,), got {command.shape}. Loop over a chunk's rows.")
        command = self.action_spec.check(command[None], 1)
        canonical = self.action_spec.to_canonical(command)
        self.commanded_pose = integrate_poses(self.commanded_pose, canonical, self.action_spec)[0]
        self.gripper = np.asarray(canonical[0, :, 6], np.float64).copy()
        start = self.data.ctrl.copy()
        goal = start.copy()
        goal[:3] = self.commanded_pose[0, :3, 3]
        goal[3:6] = _hinge_angles(self.commanded_pose[0, :3, :3], start[3:6])
        goal[6:] = JAW_TRAVEL * self.gripper[0]
        for substep in range(1, _SUBSTEPS + 1):
            self.data.ctrl[:] = start + (goal - start) * (substep / _SUBSTEPS)
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)  # mj_step leaves poses and contacts one integration step behind
        self.num_steps += 1

    def render(self) -> np.ndarray:
        """Image of the scene.

        Returns:
            RGB image (H, W, 3) uint8.

        Raises:
            RenderingUnavailableError: This machine has no OpenGL that renders without a screen.
        """
        return self._get_renderer().render(self.data)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.render_size, self.render_size

    @property
    def eef_pose(self) -> np.ndarray:
        """The commanded pose (1, 4, 4), under the name that all simulators share."""
        return self.commanded_pose

    @property
    def instruction(self) -> str:
        """The language goal."""
        block = tuple(self.look.blocks)[self.scene.block_colour]
        if self.task == "put":
            return f"put the {block} block on the {tuple(self.look.plates)[self.scene.plate_colour]} plate"
        return f"push the {block} block to the {self.task.removeprefix('push_')} edge"

    @property
    def task(self) -> str:
        """One of ``TASKS``."""
        return TASKS[self.scene.task]

    @property
    def block_pos(self) -> np.ndarray:
        """Centre of the instructed block, (3,) metres."""
        start = self._block.qposadr[0]
        return self.data.qpos[start : start + 3].copy()

    @property
    def block_yaw(self) -> float:
        """Yaw of the instructed block modulo its symmetry, in [-pi/4, pi/4)."""
        w, x, y, z = self.data.qpos[self._block.qposadr[0] + 3 : self._block.qposadr[0] + 7]
        yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    @property
    def plate_pos(self) -> np.ndarray:
        """Centre of the plate's top, (3,) metres."""
        return np.array([*self.scene.plate_xy, PLATE_TOP])

    @property
    def pads_touching(self) -> int:
        """How many of the two finger pads touch the instructed block: 2 is a grasp."""
        pairs = self.data.contact.geom
        touched = pairs[(pairs == self._block_geom).any(1)]
        return sum(bool((touched == pad).any()) for pad in self._pads)

    def is_success(self) -> bool:
        """Whether the instruction is fulfilled in the current state.

        Put: the block rests above the plate's height, its centre within the plate's radius, and no finger touches it.
        Push: the block rests on the table, its centre on the painted strip of the named edge, and it is not grasped.
        """
        start = self._block.dofadr[0]
        velocity = self.data.qvel[start : start + 6]
        if np.linalg.norm(velocity[:3]) > REST_SPEED or np.linalg.norm(velocity[3:]) > REST_SPIN:
            return False
        block = self.block_pos
        if self.task == "put":
            on_plate = np.linalg.norm(block[:2] - self.scene.plate_xy) < PLATE_RADIUS
            return bool(on_plate and block[2] > PLATE_TOP + 0.9 * BLOCK_HALF and self.pads_touching == 0)
        side = -1.0 if self.task == "push_left" else 1.0
        return bool(side * block[0] > EDGE_X and block[2] < 1.2 * BLOCK_HALF and self.pads_touching < 2)

    def block_px(self) -> np.ndarray:
        """Pixel (u, v) of the instructed block's centre, (2,) float64; it may lie outside the image or be hidden."""
        return np.asarray(project(self.block_pos, self.camera), np.float64)

    def distractor_px(self) -> np.ndarray:
        """Pixel (u, v) of the other block's centre, (2,) float64; NaN where there is none."""
        if self.scene.distractor_colour < 0:
            return np.full(2, np.nan)
        start = self._distractor.qposadr[0]
        return np.asarray(project(self.data.qpos[start : start + 3], self.camera), np.float64)

    @property
    def block_visible(self) -> int:
        """Number of image pixels that show the instructed block."""
        return int(self._get_renderer().mask(self.data, self._block_geom).sum())

    def labels(self) -> dict[str, np.ndarray]:
        """Where the blocks are: ``block_px`` and ``distractor_px`` (2,), ``block_visible``, ``block_pos`` (3,)."""
        return {
            "block_px": self.block_px(),
            "distractor_px": self.distractor_px(),
            "block_visible": np.asarray(self.block_visible, np.int64),
            "block_pos": self.block_pos,
        }

    def get_state(self) -> np.ndarray:
        """Everything that decides the future and the image: flat float64."""
        physics = np.empty(self._num_physics)
        mujoco.mj_getState(self.model, self.data, physics, _PHYSICS)
        rest = [*self.scene.to_array(), *self.commanded_pose.ravel(), *self.gripper, self.num_steps]
        return np.concatenate([physics, rest])

    def set_state(self, state: np.ndarray) -> None:
        """Restore a state; stepping and rendering continue with the same bytes.

        Args:
            state: Flat float64 from :meth:`get_state`.

        Raises:
            ValueError: The size differs from this simulator's.
        """
        state = np.asarray(state, np.float64)
        size = self._num_physics + 6 + 16 + 1 + 1
        if state.shape != (size,):
            raise ValueError(
                f"A Tabletop state has shape ({size},), got {state.shape}. Pass what get_state() of this version "
                "returned; a snapshot recorded elsewhere carries no state of this simulator."
            )
        physics, scene, pose, gripper, steps = np.split(state, np.cumsum([self._num_physics, 6, 16, 1]))
        mujoco.mj_resetData(self.model, self.data)
        self._apply_scene(Scene.from_array(scene))
        mujoco.mj_setState(self.model, self.data, physics, _PHYSICS)
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, physics, _PHYSICS)  # mj_forward overwrote the solver's warm start
        self.commanded_pose, self.gripper = pose.reshape(1, 4, 4).copy(), gripper.copy()
        self.num_steps = int(steps[0])

    def snapshot(self, name: str = "") -> Snapshot:
        """The current state as the start of a rollout, for the world model and for this simulator."""
        return take_snapshot(self, name)

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _get_renderer(self) -> OffscreenRenderer:
        if self._renderer is None:
            self._renderer = OffscreenRenderer(self.model, self.look.camera, self.render_size)
        return self._renderer

    def _apply_scene(self, scene: Scene) -> None:
        self.scene = scene
        self.model.body("plate").pos[:] = [*scene.plate_xy, PLATE_TOP / 2]
        blocks, plates = tuple(self.look.blocks.values()), tuple(self.look.plates.values())
        self.model.geom("block").rgba[:] = blocks[scene.block_colour]
        self.model.geom("plate").rgba[:] = plates[scene.plate_colour]
        self.model.geom("distractor").rgba[:] = blocks[max(scene.distractor_colour, 0)]
        self.model.body_gravcomp[self.model.body("distractor").id] = float(scene.distractor_colour < 0)

    def _place(self, joint: Any, position: np.ndarray, yaw: float) -> None:
        start = joint.qposadr[0]
        self.data.qpos[start : start + 3] = position
        self.data.qpos[start + 3 : start + 7] = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]

    def _calibrate(self) -> Camera:
        """K and E (world to camera, OpenCV axes) of the model's fixed camera; integer pixels are pixel centres."""
        mujoco.mj_forward(self.model, self.data)
        size, view = self.render_size, self.model.camera(self.look.camera)
        focal = size / 2 / tan(np.radians(view.fovy[0]) / 2)
        intrinsics = np.array([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]])
        pose = self.data.camera(self.look.camera)
        rotation = np.diag([1.0, -1.0, -1.0]) @ pose.xmat.reshape(3, 3).T  # OpenGL looks along -z with y up
        extrinsics = np.eye(4)
        extrinsics[:3, :3], extrinsics[:3, 3] = rotation, -rotation @ pose.xpos
        return Camera(K=intrinsics, E=extrinsics, width=size, height=size)
