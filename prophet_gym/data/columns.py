"""Rows of numbers become commands and poses: the step that the readers of all formats share.

A log has one row per image: the state when the image was taken and the command given then (or, in LIBERO's files, the
command that led to the image). `assemble` turns both into an `Episode` by the conventions of a dataset card; which of
the T commands is dropped, so that T - 1 actions lie between T images, is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from prophet_gym import rotations
from prophet_gym.actions import ActionSpec
from prophet_gym.data.episode import Episode
from prophet_gym.errors import nearest

if TYPE_CHECKING:
    from prophet_gym.data.cards import DatasetCard

RotationKind = Literal["euler_xyz", "axis_angle", "quaternion_xyzw", "quaternion_wxyz"]
_GRIPPER_SLACK = 0.05  # measured openings pass the ends of their range by a few percent; more is another convention


@dataclass(frozen=True)
class StateLayout:
    """Where one end-effector's pose and gripper stand in a row of measured state.

    Attributes:
        position: Columns of x, y, z in metres, robot base frame.
        rotation: Columns of the rotation, three or, for quaternions, four.
        rotation_kind: ``"euler_xyz"`` (extrinsic, radians), ``"axis_angle"``, ``"quaternion_xyzw"``,
            ``"quaternion_wxyz"``.
        gripper: Columns of the gripper; of several fingers, the mean distance from zero counts.
        closed: The reading of a closed gripper.
        open: The reading of an open one.

    Raises:
        ValueError: If the numbers of columns do not fit.
    """

    position: tuple[int, ...] = (0, 1, 2)
    rotation: tuple[int, ...] = (3, 4, 5)
    rotation_kind: RotationKind = "euler_xyz"
    gripper: tuple[int, ...] = (6,)
    closed: float = 0.0
    open: float = 1.0

    def __post_init__(self) -> None:
        """Check the columns against each other."""
        known = get_args(RotationKind)
        if self.rotation_kind not in known:
            hint = nearest(self.rotation_kind, known)
            raise ValueError(f"rotation_kind is {self.rotation_kind!r}; expected one of {known}.{hint}")
        width = 4 if self.rotation_kind.startswith("quaternion") else 3
        if len(self.position) != 3 or len(self.rotation) != width or not self.gripper or self.closed == self.open:
            raise ValueError(
                f"state layout is {self}; expected 3 columns of position, {width} of rotation, at least 1 of the "
                "gripper, and different readings of a closed and an open gripper"
            )
        for name in ("position", "rotation", "gripper"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))

    def poses(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return poses (T, 4, 4), end-effector to base, and open ratios (T,), from rows (T, S).

        Raises:
            ValueError: If a row is too short, or the gripper leaves its range by more than 5 %.
        """
        last = max(*self.position, *self.rotation, *self.gripper)
        if rows.shape[1] <= last:
            raise ValueError(
                f"state rows have {rows.shape[1]} numbers, but the card's state layout names column {last}"
            )
        turn = rows[:, list(self.rotation)]
        if self.rotation_kind == "euler_xyz":
            matrix = rotations.euler_to_matrix(turn)
        elif self.rotation_kind == "axis_angle":
            matrix = rotations.axis_angle_to_matrix(turn)
        else:
            norm = np.linalg.norm(turn, axis=1)
            if np.abs(norm - 1).max() > 0.05:
                raise ValueError(f"state quaternions have norms {norm.min():.3f} to {norm.max():.3f}; expected 1")
            matrix = rotations.quaternion_to_matrix(
                turn[:, [3, 0, 1, 2]] if self.rotation_kind == "quaternion_xyzw" else turn
            )
        poses = np.zeros((len(rows), 4, 4))
        poses[:, :3, :3], poses[:, :3, 3], poses[:, 3, 3] = matrix, rows[:, list(self.position)], 1.0
        fingers = rows[:, list(self.gripper)]
        reading = np.abs(fingers).mean(axis=1) if len(self.gripper) > 1 else fingers[:, 0]
        ratio = (reading - self.closed) / (self.open - self.closed)
        if ratio.min() < -_GRIPPER_SLACK or ratio.max() > 1 + _GRIPPER_SLACK:
            raise ValueError(
                f"measured gripper reads {reading.min():.4g} to {reading.max():.4g}; expected {self.closed:g} (closed) "
                f"to {self.open:g} (open). Check the gripper of the card's state layout"
            )
        return poses, np.clip(ratio, 0.0, 1.0)


def actions_from_poses(poses: np.ndarray, gripper: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Return the native commands (T, 7N) that lead through measured poses; the inverse of `integrate_poses`.

    Paper 3.2.1: how logs of absolute poses become deltas. The gripper command is the open ratio of the next image.

    Args:
        poses: (T + 1, N, 4, 4), end-effector to base, metres.
        gripper: (T + 1, N) open ratio.
        spec: Meaning of the deltas. Its workspace and bounds do not matter here.
    """
    before, after = poses[:-1], poses[1:]
    turned, back = before[..., :3, :3], np.swapaxes(before[..., :3, :3], -1, -2)
    canonical = np.zeros((*before.shape[:2], 7))
    moved = after[..., :3, 3] - before[..., :3, 3]
    if spec.delta == "local":
        canonical[..., :3] = (back @ moved[..., None])[..., 0]
        canonical[..., 3:6] = rotations.matrix_to_euler(back @ after[..., :3, :3])
    else:
        canonical[..., :3] = moved
        if spec.delta == "servo":
            canonical[..., 3:6] = rotations.matrix_to_euler(after[..., :3, :3] @ back)
        else:
            angles = rotations.matrix_to_euler(after[..., :3, :3]) - rotations.matrix_to_euler(turned)
            canonical[..., 3:6] = (angles + np.pi) % (2 * np.pi) - np.pi
    canonical[..., 6] = gripper[1:]
    return spec.from_canonical(canonical)


@dataclass(frozen=True)
class Rows:
    """One logged episode, T rows, before conventions are applied.

    Attributes:
        where: File and episode, as errors name them.
        name: Name of the episode.
        images: Decodes and returns (T, H, W, 3) uint8.
        actions: (T, A) logged commands, or None.
        states: (T, S) measured state, or None.
        instruction: The goal in words.
        fps: Rows per second.
        after_action: Whether row t shows the world after command t (LIBERO), not before it.
        success: Whether the goal was reached, or None.
        metadata: JSON-ready facts.
    """

    where: str
    name: str
    images: Callable[[], np.ndarray]
    actions: np.ndarray | None
    states: np.ndarray | None
    instruction: str
    fps: float
    after_action: bool = False
    success: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def assemble(rows: Rows, card: DatasetCard) -> Episode:
    """Build the episode of T - 1 actions between T images; the command without a second image is dropped.

    Raises:
        ValueError: If numbers are not finite, rows too few, or their width differs from the card's; the message names
            file, episode and fix.
    """
    try:
        return _assemble(rows, card)
    except ValueError as error:
        raise ValueError(f"{rows.where}: {error}") from error


def _assemble(rows: Rows, card: DatasetCard) -> Episode:
    spec = replace(card.require_action_spec(), control_hz=rows.fps)
    tables = {"action": rows.actions, "state": rows.states}
    for name, table in tables.items():
        if table is not None:
            tables[name] = table = np.asarray(table, np.float64)
            _check_finite(name, table)
            if len(table) < 2:
                raise ValueError(f"holds {len(table)} row(s); expected at least 2: an action lies between two images")
    actions, states = tables["action"], tables["state"]
    if actions is not None and states is not None and len(actions) != len(states):
        raise ValueError(f"{len(actions)} action rows but {len(states)} state rows; expected one of each per image")
    poses = gripper = None
    if card.state is not None and states is not None:
        both = [layout.poses(states) for layout in card.state]
        poses, gripper = (np.stack(column, axis=1) for column in zip(*both, strict=True))
    if card.actions_from == "poses":
        if poses is None or gripper is None:
            raise ValueError(
                f"card {card.name!r} derives actions from measured poses, but "
                + ("has no state layout" if card.state is None else "the episode has no state rows")
                + ". Give a card with state=..., state_keys=..., or actions_from='commands'"
            )
        native = actions_from_poses(poses, gripper, spec)
    else:
        if actions is None:
            raise ValueError(f"holds no actions; expected {card.action_keys or 'them under the usual name'}")
        if actions.shape[1] != spec.action_dim:
            raise ValueError(
                f"actions have {actions.shape[1]} numbers; card {card.name!r} expects {spec.action_dim}: 7 for each of "
                f"{spec.num_effectors} end-effector(s). Use another card, or one with actions_from='poses'"
            )
        native = actions[1:] if rows.after_action else actions[:-1]
    return Episode(
        images=rows.images,
        actions=native,
        action_spec=spec,
        instruction=rows.instruction,
        fps=rows.fps,
        eef_pose=poses,
        gripper=gripper,
        success=rows.success,
        name=rows.name,
        metadata={"dataset": card.name, **rows.metadata},
    )


def _check_finite(name: str, table: np.ndarray) -> None:
    if table.ndim != 2:
        raise ValueError(f"{name} has shape {table.shape}; expected rows of numbers, (T, D)")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{name} row {row}, number {column} is {table[row, column]}; {len(bad)} of {table.size} numbers are not "
            'finite. Repair the log, or read the others with open_dataset(path, on_error="skip")'
        )
