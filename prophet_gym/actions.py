"""What an action means: frames, units, rotation and gripper conventions, padding, and integration into poses.

A *native* action is what a policy or dataset speaks; a *canonical* one is Eq. 2 of the paper, per end-effector
``[dx, dy, dz (metres), droll, dpitch, dyaw (radians, Euler extrinsic x-y-z), open ratio in [0, 1]]``. `ActionSpec` is
the only place that converts between them, so a sign or a unit can be wrong in one place only. `integrate_poses` turns
canonical actions into the commanded poses that action frames draw and the `state` observation reports; the ground-truth
simulator commands its controller through the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from gymnasium.spaces import Box

from prophet_gym import rotations
from prophet_gym.errors import nearest

Delta = Literal["local", "servo", "difference"]
Rotation = Literal["euler_xyz", "axis_angle"]
Gripper = Literal["open_ratio", "closed_ratio", "open_positive", "close_positive"]
Workspace = tuple[tuple[float, float, float], tuple[float, float, float]]

ACTION_DIM = 7
"""Numbers per end-effector: 3 position, 3 rotation, 1 gripper."""
PAD_GRIPPER = -1.0
"""Gripper value that flags a padded command; outside the valid range of the open ratio on purpose."""
BOUND_TOLERANCE = 1e-6
"""Actions may pass the bounds by this much (native units): float32 rounding is not a user's error."""

# open ratio = slope * native + offset
_GRIPPER_MAP: dict[str, tuple[float, float]] = {
    "open_ratio": (1.0, 0.0),
    "closed_ratio": (-1.0, 1.0),
    "open_positive": (0.5, 0.5),
    "close_positive": (-0.5, 0.5),
}


def gripper_to_open_ratio(gripper: np.ndarray, convention: Gripper) -> np.ndarray:
    """Convert gripper values (...) of `convention` to the open ratio (...): 0 closed, 1 open."""
    slope, offset = _GRIPPER_MAP[_choice("gripper", convention, Gripper)]
    return np.asarray(gripper) * slope + offset


def gripper_from_open_ratio(open_ratio: np.ndarray, convention: Gripper) -> np.ndarray:
    """Convert open ratios (...) to gripper values (...) of `convention`; inverse of `gripper_to_open_ratio`."""
    slope, offset = _GRIPPER_MAP[_choice("gripper", convention, Gripper)]
    return (np.asarray(open_ratio) - offset) / slope


@dataclass(frozen=True)
class ActionSpec:
    """Conventions of one action space.

    Attributes:
        num_effectors: N, end-effectors driven by one command; a command is 7 * N numbers.
        delta: What the motion is relative to (paper 3.2.1). ``"local"``: composed on the right of the previous
            end-effector pose, Eq. 3. ``"servo"``: in the world (robot base) frame, ``p += dp`` and ``R = R(dr) @ R``.
            ``"difference"``: position and Euler angles of the absolute pose are added (BRIDGE, real robots).
        rotation: Native rotation delta: ``"euler_xyz"`` (extrinsic, ``Rz @ Ry @ Rx``) or ``"axis_angle"``.
        gripper: Native gripper: ``"open_ratio"`` [0 closed, 1 open], ``"closed_ratio"`` [0 open, 1 closed],
            ``"open_positive"`` [-1 closed, +1 open], ``"close_positive"`` [-1 open, +1 closed] (LIBERO).
        position_scale: Metres per native unit.
        rotation_scale: Radians per native unit.
        low: Lower bounds of one end-effector's 7 native numbers.
        high: Upper bounds of the same.
        workspace: ``((x, y, z) low, (x, y, z) high)`` in metres of the world frame, or None. The controller clamps each
            commanded position there; `integrate_poses` does the same.
        control_hz: Commands per second.

    Raises:
        ValueError: If a field is not one of the above or contradicts another.
    """

    num_effectors: int = 1
    delta: Delta = "local"
    rotation: Rotation = "euler_xyz"
    gripper: Gripper = "open_ratio"
    position_scale: float = 1.0
    rotation_scale: float = 1.0
    low: tuple[float, ...] = (-0.1, -0.1, -0.1, -0.5, -0.5, -0.5, 0.0)
    high: tuple[float, ...] = (0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 1.0)
    workspace: Workspace | None = None
    control_hz: float = 5.0

    def __post_init__(self) -> None:
        """Check every field against the others."""
        _choice("delta", self.delta, Delta)
        _choice("rotation", self.rotation, Rotation)
        _choice("gripper", self.gripper, Gripper)
        if not isinstance(self.num_effectors, int) or self.num_effectors < 1:
            raise ValueError(f"num_effectors is {self.num_effectors!r}; expected an integer of at least 1")
        if self.delta == "difference" and self.rotation != "euler_xyz":
            raise ValueError(
                f"delta='difference' with rotation={self.rotation!r}: a difference of poses adds Euler angles, so the "
                "native rotation must be 'euler_xyz'. Use delta='servo' for rotations that are composed"
            )
        for name in ("position_scale", "rotation_scale", "control_hz"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and np.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
        low, high = np.asarray(self.low, float), np.asarray(self.high, float)
        if low.shape != (ACTION_DIM,) or high.shape != (ACTION_DIM,) or not np.all(low < high):
            raise ValueError(f"low={self.low}, high={self.high}; expected {ACTION_DIM} numbers each, low below high")
        span = sorted(gripper_from_open_ratio(np.array([0.0, 1.0]), self.gripper).tolist())
        if [low[6], high[6]] != span:
            raise ValueError(f"low and high give the gripper [{low[6]:g}, {high[6]:g}]; {self.gripper!r} spans {span}")
        if self.workspace is not None:
            box = np.asarray(self.workspace, float)
            if box.shape != (2, 3) or not np.all(box[0] < box[1]):
                raise ValueError(f"workspace is {self.workspace}; expected ((x, y, z) low, (x, y, z) high) in metres")

    @property
    def action_dim(self) -> int:
        """Numbers in one native command: 7 * N."""
        return ACTION_DIM * self.num_effectors

    def action_space(self, chunk_length: int) -> Box:
        """Return the space of native action chunks, ``Box((chunk_length, 7 * N), float32)``."""
        if chunk_length < 1:
            raise ValueError(f"chunk_length is {chunk_length}; expected at least 1")
        low, high = (np.tile(np.asarray(b, "f4"), (chunk_length, self.num_effectors)) for b in (self.low, self.high))
        return Box(low, high, dtype=np.float32)

    def check(self, action: np.ndarray, max_length: int, *, num_envs: int | None = None) -> np.ndarray:
        """Return a native action chunk as a new float32 array if it is valid.

        Args:
            action: (C, 7N), or (num_envs, C, 7N) where `num_envs` is given; 1 <= C <= max_length.
            max_length: Longest chunk accepted.
            num_envs: Size of the leading batch dimension, or None for a single chunk without one.

        Raises:
            ValueError: If the shape is wrong, the chunk is empty or too long, or a value is not finite or out of bounds
                by more than `BOUND_TOLERANCE`.
        """
        array = np.asarray(action)
        batch = () if num_envs is None else (num_envs,)
        expected = f"({', '.join([*map(str, batch), 'C', str(self.action_dim)])}) with 1 <= C <= {max_length}"
        if array.dtype.kind not in "fiu":
            raise ValueError(f"action has dtype {array.dtype}; expected real numbers of shape {expected}")
        leads = array.ndim == len(batch) + 2 and array.shape[: len(batch)] == batch
        if not leads or array.shape[-1] != self.action_dim or array.shape[-2] < 1:
            raise ValueError(
                f"action has shape {array.shape}; expected {expected}: C commands of 7 numbers for each of "
                f"{self.num_effectors} end-effector(s). A single command needs a chunk dimension: action[None]"
            )
        if array.shape[-2] > max_length:
            raise ValueError(
                f"action chunk has {array.shape[-2]} commands; expected at most {max_length}. "
                f"Split it and call step once per piece of at most {max_length} commands"
            )
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(
                f"action[{_indices(index)}] is {array[index]}; expected finite numbers. Check the policy's output and "
                "the normalisation statistics"
            )
        low = np.tile(np.asarray(self.low, np.float64), self.num_effectors)
        high = np.tile(np.asarray(self.high, np.float64), self.num_effectors)
        outside = (array < low - BOUND_TOLERANCE) | (array > high + BOUND_TOLERANCE)
        if outside.any():
            index = tuple(int(i) for i in np.argwhere(outside)[0])
            axis = index[-1]
            raise ValueError(
                f"action[{_indices(index)}] is {array[index]:.6g}; expected {low[axis]:.6g} to {high[axis]:.6g} "
                f"({_axis_name(axis, self)}); {int(outside.sum())} of {array.size} numbers are out of bounds. Use "
                "np.clip(action, space.low, space.high) if the policy may saturate, or check units and conventions"
            )
        return array

    def to_canonical(self, action: np.ndarray) -> np.ndarray:
        """Convert native commands (..., 7N) to canonical ones (..., N, 7) float32: metres, radians, open ratio.

        Axis-angle rotations become the Euler angles of the same rotation; Euler rotations are only scaled, so that
        differences of angles stay differences.

        Raises:
            ValueError: If the last dimension is not 7N.
        """
        action = np.asarray(action, np.float64)
        if action.ndim < 1 or action.shape[-1] != self.action_dim:
            raise ValueError(
                f"native action has shape {action.shape}; expected (..., {self.action_dim}) for "
                f"{self.num_effectors} end-effector(s)"
            )
        action = action.reshape(*action.shape[:-1], self.num_effectors, ACTION_DIM)
        canonical = np.empty(action.shape, np.float32)
        rotation = action[..., 3:6] * self.rotation_scale
        canonical[..., :3] = action[..., :3] * self.position_scale
        canonical[..., 3:6] = rotations.axis_angle_to_euler(rotation) if self.rotation == "axis_angle" else rotation
        canonical[..., 6] = gripper_to_open_ratio(action[..., 6], self.gripper)
        return canonical

    def from_canonical(self, action: np.ndarray) -> np.ndarray:
        """Convert canonical commands (..., N, 7) to native ones (..., 7N) float32; inverse of `to_canonical`.

        Raises:
            ValueError: If the shape does not end in (N, 7), or a command is padding (gripper = `PAD_GRIPPER`).
        """
        action = np.asarray(action, np.float64)
        if action.ndim < 2 or action.shape[-2:] != (self.num_effectors, ACTION_DIM):
            raise ValueError(
                f"canonical action has shape {action.shape}; expected (..., {self.num_effectors}, {ACTION_DIM})"
            )
        if (action[..., 6] == PAD_GRIPPER).any():
            raise ValueError(
                f"canonical action holds padded commands (gripper {PAD_GRIPPER}); expected open ratios in [0, 1]. "
                "Drop the padding before converting: actions[..., :chunk_length, :, :]"
            )
        native = np.empty(action.shape, np.float32)
        turn = action[..., 3:6]
        native[..., :3] = action[..., :3] / self.position_scale
        native[..., 3:6] = rotations.euler_to_axis_angle(turn) if self.rotation == "axis_angle" else turn
        native[..., 3:6] /= self.rotation_scale
        native[..., 6] = gripper_from_open_ratio(action[..., 6], self.gripper)
        return native.reshape(*action.shape[:-2], self.action_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActionSpec:
        """Build a spec from `to_dict`'s result.

        Raises:
            ValueError: If a key is unknown or missing (a convention is never guessed).
        """
        names = [field.name for field in fields(cls)]
        unknown, missing = sorted(set(values) - set(names)), sorted(set(names) - set(values))
        if unknown:
            raise ValueError(f"action spec has unknown key(s) {unknown}; expected {names}.{nearest(unknown[0], names)}")
        if missing:
            raise ValueError(f"action spec lacks key(s) {missing}; expected all of {names}")
        values = dict(values)
        values["low"], values["high"] = tuple(values["low"]), tuple(values["high"])
        if values["workspace"] is not None:
            values["workspace"] = tuple(tuple(corner) for corner in values["workspace"])
        return cls(**values)


def integrate_poses(poses: np.ndarray, actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Integrate canonical actions into the poses they command (paper 3.2.1 and 4.1.2).

    A chunk cut in two gives the same poses. The gripper is ignored: padded commands (zero motion) repeat the last pose.

    Args:
        poses: (..., N, 4, 4) float64, end-effector to world, metres: poses before the first command.
        actions: (..., T, N, 7) canonical.
        spec: Gives the meaning of the deltas and the workspace to which every commanded position is clamped.

    Returns:
        (..., T, N, 4, 4) float64: pose t is the one commanded by action t.

    Raises:
        ValueError: If the shapes do not match.
    """
    poses, actions = np.asarray(poses, np.float64), np.asarray(actions, np.float64)
    count = spec.num_effectors
    if poses.ndim < 3 or poses.shape[-3:] != (count, 4, 4):
        raise ValueError(f"poses have shape {poses.shape}; expected (..., {count}, 4, 4)")
    if actions.ndim != poses.ndim or actions.shape[-2:] != (count, 7) or actions.shape[:-3] != poses.shape[:-3]:
        batch = "".join(f"{size}, " for size in poses.shape[:-3])
        raise ValueError(f"actions have shape {actions.shape}; expected ({batch}T, {count}, 7) to fit the poses")
    position, rotation = poses[..., :3, 3], poses[..., :3, :3]
    result = np.zeros((*actions.shape[:-1], 4, 4))
    result[..., 3, 3] = 1.0
    angles = actions[..., 3:6]
    if spec.delta == "difference":  # from deltas to the Euler angles of every pose
        angles = rotations.accumulated_euler(rotations.matrix_to_euler(rotation), angles)
    turns = rotations.euler_to_matrix(angles)
    low, high = np.asarray(spec.workspace or ((-np.inf,) * 3, (np.inf,) * 3), np.float64)
    for t in range(actions.shape[-3]):
        move = actions[..., t, :, :3]
        if spec.delta == "local":  # Eq. 3: the motion is expressed in the previous end-effector frame
            move = (rotation @ move[..., None])[..., 0]
            rotation = rotation @ turns[..., t, :, :, :]
        elif spec.delta == "servo":
            rotation = turns[..., t, :, :, :] @ rotation
        else:
            rotation = turns[..., t, :, :, :]
        position = np.minimum(np.maximum(position + move, low), high)
        result[..., t, :, :3, 3] = position
        result[..., t, :, :3, :3] = rotation
    # Chunks follow chunks for thousands of commands: rounding must not add up from one to the next.
    result[..., :3, :3] = rotations.orthonormalised(result[..., :3, :3])
    return result


def pad_chunk(actions: np.ndarray, length: int) -> np.ndarray:
    """Pad canonical chunks (..., C, N, 7) to (..., length, N, 7) with zero motion, gripper = `PAD_GRIPPER`.

    Raises:
        ValueError: If the chunk is longer than `length`.
    """
    actions = np.asarray(actions)
    if actions.ndim < 3 or actions.shape[-1] != ACTION_DIM:
        raise ValueError(f"actions have shape {actions.shape}; expected (..., C, N, {ACTION_DIM})")
    if actions.shape[-3] > length:
        raise ValueError(f"action chunk has {actions.shape[-3]} commands; expected at most {length}. Split it")
    padded = np.zeros((*actions.shape[:-3], length, *actions.shape[-2:]), actions.dtype)
    padded[..., actions.shape[-3] :, :, 6] = PAD_GRIPPER
    padded[..., : actions.shape[-3], :, :] = actions
    return padded


def pad_effectors(actions: np.ndarray, num_effectors: int) -> np.ndarray:
    """Pad canonical actions (..., N, 7) with zeros to (..., num_effectors, 7), as in paper 3.2.1.

    Raises:
        ValueError: If there are already more end-effectors.
    """
    actions = np.asarray(actions)
    if actions.ndim < 2 or actions.shape[-1] != ACTION_DIM or actions.shape[-2] > num_effectors:
        raise ValueError(
            f"actions have shape {actions.shape}; expected (..., N, {ACTION_DIM}) with N at most {num_effectors}"
        )
    padded = np.zeros((*actions.shape[:-2], num_effectors, ACTION_DIM), actions.dtype)
    padded[..., : actions.shape[-2], :] = actions
    return padded


def state_vector(poses: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """Return proprioception (..., 8N) float32: per end-effector xyz (m), axis-angle (rad), open ratio, 0.

    The rotation vector has length at most pi and changes sign as the angle passes pi (a gripper pointing straight
    down is near there in many robots).

    Args:
        poses: (..., N, 4, 4), end-effector to world.
        gripper: (..., N) open ratio.

    Raises:
        ValueError: If the shapes do not match.
    """
    poses, gripper = np.asarray(poses), np.asarray(gripper)
    if poses.ndim < 3 or poses.shape[-2:] != (4, 4) or gripper.shape != poses.shape[:-2]:
        raise ValueError(f"poses {poses.shape} and gripper {gripper.shape}; expected (..., N, 4, 4) and (..., N)")
    state = np.zeros((*gripper.shape, 8), np.float32)
    state[..., :3] = poses[..., :3, 3]
    state[..., 3:6] = rotations.matrix_to_axis_angle(poses[..., :3, :3])
    state[..., 6] = gripper
    return state.reshape(*gripper.shape[:-1], -1)


def _choice(name: str, value: str, options: Any) -> str:
    known = get_args(options)
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {known}.{nearest(value, known)}")
    return value


def _indices(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))


def _axis_name(axis: int, spec: ActionSpec) -> str:
    name = ("dx", "dy", "dz", "rotation x", "rotation y", "rotation z", f"gripper, {spec.gripper}")[axis % ACTION_DIM]
    return name if spec.num_effectors == 1 else f"{name}, end-effector {axis // ACTION_DIM}"


ACTION_SPECS: dict[str, ActionSpec] = {
    "tabletop": ActionSpec(
        delta="servo",
        rotation="axis_angle",
        low=(-0.04, -0.04, -0.04, -0.25, -0.25, -0.25, 0.0),
        high=(0.04, 0.04, 0.04, 0.25, 0.25, 0.25, 1.0),
        workspace=((-0.20, -0.20, 0.02), (0.20, 0.20, 0.25)),
        control_hz=10.0,
    ),
    # Twice the largest command of the BridgeData V2 recordings we measured (0.050 m, 0.25 rad).
    "bridge": ActionSpec(delta="difference", control_hz=5.0),
    # OSC_POSE: +-1 is 0.05 m and 0.5 rad, rotation vector in the base frame; -1 opens the gripper.
    "libero": ActionSpec(
        delta="servo",
        rotation="axis_angle",
        gripper="close_positive",
        position_scale=0.05,
        rotation_scale=0.5,
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        control_hz=20.0,
    ),
    # Twice the largest command of the DROID recordings we measured (0.091 m, 0.21 rad).
    "droid": ActionSpec(
        delta="servo",
        low=(-0.2, -0.2, -0.2, -0.5, -0.5, -0.5, 0.0),
        high=(0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 1.0),
        control_hz=5.0,
    ),
    "agibot": ActionSpec(num_effectors=2, delta="local", control_hz=30.0),
}
"""Action spaces of the registered environments, by name."""
