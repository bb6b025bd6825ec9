"""A command of one robot's convention as the command of another's that makes the same motion.

Scales, rotation vectors and gripper signs are `ActionSpec`'s; here the *frames* meet: a motion in the robot's base
frame is another number for a world whose deltas are local, or differences of Euler angles.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..actions import ActionSpec, integrate_poses
from ..rotations import axis_angle_to_matrix, matrix_to_euler

__all__ = ["convert_commands", "poses_from_state"]


def convert_commands(
    commands: np.ndarray, source: ActionSpec, target: ActionSpec, poses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Converts native commands of ``source`` to native commands of ``target`` that command the same poses.

    Controllers saturate: what leaves the bounds of ``source`` or, converted, those of ``target`` is cut to them, and
    reported.

    Args:
        commands: (B, 7) native commands of ``source``, finite.
        source: what the policy speaks; one end-effector.
        target: what the world speaks; one end-effector.
        poses: (B, 1, 4, 4) commanded poses before the commands; used where the two differ in ``delta``.

    Returns:
        (B, 7) float32 within the bounds of ``target``, and (B,) bool: which commands were cut.
    """
    commands = np.asarray(commands, np.float64)
    asked = np.clip(commands, source.low, source.high)
    canonical = source.to_canonical(asked)
    if source.delta != target.delta:
        free = dataclasses.replace(source, workspace=None)  # the world clamps to its own
        goals = integrate_poses(poses, canonical[:, None], free)[:, 0]
        canonical[..., :6] = _deltas(poses, goals, target)
    native = target.from_canonical(canonical)
    cut = np.clip(native, np.asarray(target.low, np.float32), np.asarray(target.high, np.float32))
    tolerance = 1e-6  # float32 rounding is no saturation
    clipped = (np.abs(asked - commands) > tolerance).any(axis=1) | (np.abs(cut - native) > tolerance).any(axis=1)
    return cut, clipped


def poses_from_state(state: np.ndarray) -> np.ndarray:
    """Returns the poses (B, 1, 4, 4) float64 in ``state`` observations (B, 8): position in metres, axis-angle."""
    poses = np.tile(np.eye(4), (len(state), 1, 1, 1))
    poses[:, 0, :3, 3] = state[:, :3]
    poses[:, 0, :3, :3] = axis_angle_to_matrix(state[:, 3:6])
    return poses


def _deltas(poses: np.ndarray, goals: np.ndarray, target: ActionSpec) -> np.ndarray:
    """Canonical motion (..., 6) from ``poses`` to ``goals``, (..., 4, 4), as ``target.delta`` expresses it."""
    move = goals[..., :3, 3] - poses[..., :3, 3]
    before, after = poses[..., :3, :3], goals[..., :3, :3]
    inverse = np.swapaxes(before, -1, -2)
    if target.delta == "difference":
        turn = matrix_to_euler(after) - matrix_to_euler(before)
        return np.concatenate([move, (turn + np.pi) % (2 * np.pi) - np.pi], axis=-1)
    if target.delta == "local":
        return np.concatenate([(inverse @ move[..., None])[..., 0], matrix_to_euler(inverse @ after)], axis=-1)
    return np.concatenate([move, matrix_to_euler(after @ inverse)], axis=-1)
