"""Rotation matrices, Euler angles, axis-angle and quaternions agree, also where they are singular."""

from __future__ import annotations

import numpy as np
import pytest

from prophet_gym import rotations


def test_rotation_representations_agree():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 3))
    vectors *= rng.uniform(0, np.pi, (200, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[0] = 0
    vectors[1] = [1e-13, 0, 0]
    matrices = rotations.axis_angle_to_matrix(vectors)
    np.testing.assert_allclose(rotations.matrix_to_axis_angle(matrices), vectors, atol=1e-7)
    np.testing.assert_allclose(rotations.euler_to_matrix(rotations.matrix_to_euler(matrices)), matrices, atol=1e-12)
    quaternions = rotations.matrix_to_quaternion(matrices)
    np.testing.assert_allclose(rotations.quaternion_to_matrix(quaternions), matrices, atol=1e-12)
    np.testing.assert_allclose(rotations.quaternion_to_axis_angle(quaternions), vectors, atol=1e-7)


def test_euler_is_extrinsic_xyz():
    roll, pitch, yaw = 0.3, -0.5, 1.1
    x, y, z = rotations.axis_angle_to_matrix(np.diag([roll, pitch, yaw]))
    np.testing.assert_allclose(rotations.euler_to_matrix(np.array([roll, pitch, yaw])), z @ y @ x, atol=1e-12)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_gimbal_lock_keeps_the_rotation(pitch):
    matrix = rotations.euler_to_matrix(np.array([0.7, pitch, -0.4]))
    np.testing.assert_allclose(rotations.euler_to_matrix(rotations.matrix_to_euler(matrix)), matrix, atol=1e-8)


@pytest.mark.parametrize("axis", np.vstack([np.eye(3), [[0.6, 0.0, 0.8]]]))
def test_half_turns_are_exact(axis):
    matrix = 2 * np.outer(axis, axis) - np.eye(3)
    vector = rotations.matrix_to_axis_angle(matrix)
    assert np.linalg.norm(vector) == pytest.approx(np.pi)
    np.testing.assert_allclose(np.abs(vector @ axis), np.pi, atol=1e-9)
