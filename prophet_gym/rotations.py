"""Rotation conversions: pure, batched over any leading dimensions, float64.

Euler angles are extrinsic x-y-z in radians, ``R = Rz(yaw) @ Ry(pitch) @ Rx(roll)``. Quaternions are ``(w, x, y, z)``
with ``w >= 0``. Axis-angle vectors have length in ``[0, pi]``.
"""

from __future__ import annotations

import numpy as np

_TINY = 1e-12  # below this sine of half the angle, the axis is undefined and a rotation vector is 2 * (x, y, z)
_GIMBAL = 1e-9  # cos(pitch) below this: roll and yaw turn about the same axis


def euler_to_matrix(euler: np.ndarray) -> np.ndarray:
    """Convert Euler angles (..., 3) in radians to rotation matrices (..., 3, 3)."""
    euler = np.asarray(euler, np.float64)
    cos, sin = np.cos(euler), np.sin(euler)
    ca, cb, cc = cos[..., 0], cos[..., 1], cos[..., 2]
    sa, sb, sc = sin[..., 0], sin[..., 1], sin[..., 2]
    matrix = np.empty((*euler.shape[:-1], 3, 3))
    matrix[..., 0, 0] = cb * cc
    matrix[..., 0, 1] = sa * sb * cc - ca * sc
    matrix[..., 0, 2] = ca * sb * cc + sa * sc
    matrix[..., 1, 0] = cb * sc
    matrix[..., 1, 1] = sa * sb * sc + ca * cc
    matrix[..., 1, 2] = ca * sb * sc - sa * cc
    matrix[..., 2, 0] = -sb
    matrix[..., 2, 1] = sa * cb
    matrix[..., 2, 2] = ca * cb
    return matrix


def matrix_to_euler(matrix: np.ndarray) -> np.ndarray:
    """Convert rotation matrices (..., 3, 3) to Euler angles (..., 3): roll, yaw in (-pi, pi], pitch in [-pi/2, pi/2].

    At pitch = +-pi/2 only the sum or difference of roll and yaw is defined; yaw is then 0.
    """
    m = np.asarray(matrix, np.float64)
    cos_pitch = np.hypot(m[..., 0, 0], m[..., 1, 0])
    gimbal = cos_pitch < _GIMBAL
    roll = np.where(gimbal, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    pitch = np.arctan2(-m[..., 2, 0], cos_pitch)
    yaw = np.where(gimbal, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([roll, pitch, yaw], axis=-1)


def accumulated_euler(start: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Add Euler deltas one after the other, naming every rotation as `matrix_to_euler` would before the next is added.

    Past pitch = +-pi/2 the same rotation is called by other angles; adding to those is what a controller does that
    reads its pose back, and makes the sum independent of where a sequence is cut.

    Args:
        start: (..., N, 3) radians, as from `matrix_to_euler`.
        deltas: (..., T, N, 3) radians.

    Returns:
        (..., T, N, 3) radians; roll and yaw are not wrapped.
    """
    result = np.empty(deltas.shape)
    euler = start
    for t in range(deltas.shape[-3]):
        euler = euler + deltas[..., t, :, :]
        pitch = euler[..., 1]
        if (np.abs(pitch) > np.pi / 2).any():
            pitch = (pitch + np.pi) % (2 * np.pi) - np.pi
            flipped = np.stack([euler[..., 0] + np.pi, np.sign(pitch) * np.pi - pitch, euler[..., 2] + np.pi], axis=-1)
            plain = np.stack([euler[..., 0], pitch, euler[..., 2]], axis=-1)
            euler = np.where((np.abs(pitch) > np.pi / 2)[..., None], flipped, plain)
        result[..., t, :, :] = euler
    return result


def axis_angle_to_quaternion(axis_angle: np.ndarray) -> np.ndarray:
    """Convert rotation vectors (..., 3) in radians to unit quaternions (..., 4), w x y z."""
    vector = np.asarray(axis_angle, np.float64)
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    # sinc is smooth at zero: sin(angle / 2) / angle = sinc(angle / 2 pi) / 2
    quaternion = np.concatenate([np.cos(angle / 2), vector * np.sinc(angle / (2 * np.pi)) / 2], axis=-1)
    return np.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Convert quaternions (..., 4), w x y z, to rotation vectors (..., 3) of length at most pi."""
    q = np.asarray(quaternion, np.float64)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    return q[..., 1:] * np.where(sine > _TINY, angle / np.maximum(sine, _TINY), 2.0)


def quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Convert quaternions (..., 4), w x y z, normalised here, to rotation matrices (..., 3, 3)."""
    q = np.asarray(quaternion, np.float64)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: np.ndarray) -> np.ndarray:
    """Convert rotation matrices (..., 3, 3) to unit quaternions (..., 4), w x y z, w >= 0; exact near half turns."""
    m = np.asarray(matrix, np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # Rows of 4 q q^T. The row with the largest diagonal is the best conditioned one (Shepperd's method).
    outer = np.stack(
        [
            np.stack([1 + xx + yy + zz, wx, wy, wz], axis=-1),
            np.stack([wx, 1 + xx - yy - zz, xy, xz], axis=-1),
            np.stack([wy, xy, 1 - xx + yy - zz, yz], axis=-1),
            np.stack([wz, xz, yz, 1 - xx - yy + zz], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    q = np.take_along_axis(outer, best[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., :1] < 0, -q, q)


def axis_angle_to_matrix(axis_angle: np.ndarray) -> np.ndarray:
    """Convert rotation vectors (..., 3) in radians to rotation matrices (..., 3, 3)."""
    return quaternion_to_matrix(axis_angle_to_quaternion(axis_angle))


def matrix_to_axis_angle(matrix: np.ndarray) -> np.ndarray:
    """Convert rotation matrices (..., 3, 3) to rotation vectors (..., 3) of length at most pi."""
    return quaternion_to_axis_angle(matrix_to_quaternion(matrix))


def axis_angle_to_euler(axis_angle: np.ndarray) -> np.ndarray:
    """Convert rotation vectors (..., 3) to Euler angles (..., 3), radians."""
    return matrix_to_euler(axis_angle_to_matrix(axis_angle))


def euler_to_axis_angle(euler: np.ndarray) -> np.ndarray:
    """Convert Euler angles (..., 3) to rotation vectors (..., 3) of length at most pi, radians."""
    return matrix_to_axis_angle(euler_to_matrix(euler))


def orthonormalised(matrix: np.ndarray) -> np.ndarray:
    """Return nearly orthonormal matrices (..., 3, 3) pulled onto SO(3) by one Newton step of the polar decomposition.

    The step squares the error, so rounding of thousands of products never adds up. Exact rotations stay as they are,
    up to the last bit.
    """
    m = np.asarray(matrix, np.float64)
    return 1.5 * m - 0.5 * (m @ np.swapaxes(m, -1, -2) @ m)
