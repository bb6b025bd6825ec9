"""Projection is geometry, rendering is sub-pixel, and every size follows the paper's formulas."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.action_frames import Camera, open_ratio_colour, project, render_action_frames
from prophet_gym.actions import PAD_GRIPPER


def front_camera(size: int = 64, depth: float = 0.8, focal: float = 1.4, width: int | None = None) -> Camera:
    """World and camera axes agree; the world's origin is `depth` metres in front, at the middle of the image."""
    width = size if width is None else width
    E = np.eye(4)
    E[2, 3] = depth
    K = np.array([[focal * size, 0, (width - 1) / 2], [0, focal * size, (size - 1) / 2], [0, 0, 1]])
    return Camera(K, E, width, size)


def poses_at(points: np.ndarray, rotation: np.ndarray | None = None) -> np.ndarray:
    """Poses (T, 1, 4, 4) at points (T, 3)."""
    poses = np.broadcast_to(np.eye(4), (len(points), 1, 4, 4)).copy()
    poses[:, 0, :3, 3] = points
    if rotation is not None:
        poses[:, 0, :3, :3] = rotation
    return poses


@pytest.mark.parametrize("point", [(0, 0, 0), (0.1, -0.05, 0.2), (-0.3, 0.2, 1.0)])
def test_projection_closed_form(point):
    camera = front_camera(depth=0.8)
    x, y, z = point
    expected = [31.5 + 1.4 * 64 * x / (z + 0.8), 31.5 + 1.4 * 64 * y / (z + 0.8)]
    np.testing.assert_allclose(project(np.array(point), camera), expected, atol=1e-12)


def test_projection_of_a_rotated_camera_and_batches():
    rng = np.random.default_rng(0)
    E = np.eye(4)
    E[:3, :3] = rotations.axis_angle_to_matrix(rng.normal(size=3))
    E[:3, 3] = [0.1, -0.2, 2.0]
    camera = Camera(np.array([[100, 2, 40], [0, 110, 30], [0, 0, 1]]), E, 80, 60)
    points = rng.uniform(-0.3, 0.3, (4, 5, 3))
    pixels = project(points, camera)
    assert pixels.shape == (4, 5, 2)
    homogeneous = camera.K @ (E @ np.append(points[1, 2], 1.0))[:3]
    np.testing.assert_allclose(pixels[1, 2], homogeneous[:2] / homogeneous[2])


def test_points_behind_the_camera_are_nan():
    pixels = project(np.array([[0, 0, -1.0], [0, 0, 0.0]]), front_camera(depth=0.8))
    assert np.isnan(pixels[0]).all() and np.isfinite(pixels[1]).all()


def test_resized_camera_sees_the_same_place():
    camera = front_camera(256)
    small = camera.resized(128, 64)
    points = np.random.default_rng(0).uniform(-0.2, 0.2, (50, 3))
    expected = (project(points, camera) + 0.5) * [0.5, 0.25] - 0.5  # pixel centres at integers
    np.testing.assert_allclose(project(points, small), expected, atol=1e-9)
    assert (small.width, small.height) == (128, 64)


def test_camera_survives_json_and_is_immutable():
    camera = front_camera()
    again = Camera.from_dict(json.loads(json.dumps(camera.to_dict())))
    np.testing.assert_array_equal(again.K, camera.K)
    np.testing.assert_array_equal(again.E, camera.E)
    with pytest.raises(ValueError, match="read-only"):
        camera.K[0, 0] = 1
    source = np.eye(4)
    Camera(camera.K, source, 64, 64)
    source[0, 0] = 2  # the caller's array stays the caller's


@pytest.mark.parametrize(
    ("K", "E", "size", "message"),
    [
        (np.eye(4), np.eye(4), (64, 64), r"camera K has shape \(4, 4\); expected \(3, 3\)"),
        (np.eye(3), np.eye(3), (64, 64), r"camera E has shape \(3, 3\)"),
        (np.eye(3) * np.nan, np.eye(4), (64, 64), "finite"),
        (np.diag([-1, 1, 1]), np.eye(4), (64, 64), "camera K is"),
        (np.diag([1, 1, 2]), np.eye(4), (64, 64), "camera K is"),
        (np.eye(3), np.diag([1, 1, -1, 1]), (64, 64), "rigid transform.*OpenGL"),
        (np.eye(3), np.diag([2, 2, 2, 1]), (64, 64), "rigid transform"),
        (np.eye(3), np.eye(4), (0, 64), "camera width is 0"),
        (np.eye(3), np.eye(4), (64, 6.5), "camera height is 6.5"),
    ],
)
def test_bad_cameras_are_refused(K, E, size, message):
    with pytest.raises(ValueError, match=message):
        Camera(K, E, *size)


# Rendering


@pytest.mark.parametrize(("size", "depth"), [(64, 0.5), (64, 1.0), (256, 1.0), (256, 8.0), (256, 0.4), (128, 2.0)])
def test_disk_radius_follows_eq_8(size, depth):
    camera = front_camera(size, depth, focal=0.05)  # short focal length: the axes stay inside of the disk
    frame = render_action_frames(poses_at(np.zeros((1, 3))), np.zeros((1, 1)), camera)[0]
    radius = np.clip(40 * 1.0 / depth, 8, 140) * size / 256
    row = size // 2 - round(0.75 * radius)  # above the centre there are no axes: the violet disk alone
    half_chord = frame[row, :, 2].astype(float).sum() / 84 / 2  # blue is 168 at half opacity
    assert np.hypot(half_chord, (size - 1) / 2 - row) == pytest.approx(radius, abs=0.4)


def test_axes_point_where_the_rotation_says():
    camera = front_camera(256, 1.0)
    rotation = rotations.euler_to_matrix(np.array([0.4, 0.3, 0.5]))
    frame = render_action_frames(poses_at(np.zeros((1, 3)), rotation), np.zeros((1, 1)), camera)[0].astype(int)
    for axis in range(3):
        tip = np.rint(project(0.15 * 0.97 * rotation[:, axis], camera)).astype(int)
        colour = frame[tip[1], tip[0]]
        others = [c for c in range(3) if c != axis]
        assert colour[axis] > colour[others].max() + 60, (axis, colour)


def test_centre_is_a_white_point():
    frame = render_action_frames(poses_at(np.zeros((1, 3))), np.ones((1, 1)), front_camera(256, 1.0))[0]
    assert frame[128, 128].min() > 120  # white under a half-transparent disk
    assert frame[128 + 15, 128 - 15, 2] < 60  # elsewhere in the disk: the colour of an open gripper, no blue


def test_colour_map_is_ordered_and_distinct():
    ratios = np.linspace(0, 1, 21)
    colours = open_ratio_colour(ratios)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    np.testing.assert_array_equal(open_ratio_colour(np.array([-0.2, 1.3])), open_ratio_colour(np.array([0.0, 1.0])))
    frames = render_action_frames(poses_at(np.zeros((21, 3))), ratios[:, None], front_camera())
    changes = np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3))
    assert (changes > 2).all()  # every twentieth of the opening is visible


@pytest.mark.parametrize("direction", [0, 1])
def test_subpixel_motion_is_visible_and_exact(direction):
    camera = front_camera(64, 0.8)
    points = np.zeros((60, 3))
    points[:, direction] = np.linspace(-0.03, 0.03, 60)  # 0.11 pixel a step
    points[:, 1 - direction] = 0.01
    # The red x axis lies across the motion, so it does not move the centre of mass of the red channel along it.
    rotation = rotations.euler_to_matrix(np.array([0, 0, 0 if direction == 1 else np.pi / 2]))
    frames = render_action_frames(poses_at(points, rotation), np.full((60, 1), 0.5), camera).astype(float)
    assert (np.abs(np.diff(frames, axis=0)).sum(axis=(1, 2, 3)) > 0).all()
    coverage = frames[..., 0].sum(axis=1 + direction)
    centre = (coverage * np.arange(64)).sum(axis=1) / coverage.sum(axis=1)
    assert np.abs(centre - project(points, camera)[:, direction]).max() < 0.05


def test_behind_and_outside_draw_nothing():
    camera = front_camera(64, 0.5)
    points = np.array([[0, 0, -0.6], [0, 0, -0.5], [50.0, 0, 0], [1e6, 1e6, -0.4]])
    frames = render_action_frames(poses_at(points), np.ones((4, 1)), camera)
    assert not frames.any()


def test_axis_reaching_behind_the_camera_is_cut():
    camera = front_camera(64, 0.1)  # the z axis of this effector ends 5 cm behind the camera
    rotation = rotations.euler_to_matrix(np.array([0, np.pi, 0.0]))
    frame = render_action_frames(poses_at(np.array([[0.01, 0, 0]]), rotation), np.ones((1, 1)), camera)[0]
    assert frame.any()


def test_padded_commands_draw_nothing():
    frames = render_action_frames(poses_at(np.zeros((2, 3))), np.array([[0.0], [PAD_GRIPPER]]), front_camera())
    assert frames[0].any() and not frames[1].any()


def test_two_effectors_and_independent_frames():
    camera = front_camera(64, 0.8, width=96)
    poses = np.broadcast_to(np.eye(4), (3, 2, 4, 4)).copy()
    poses[:, 0, 0, 3], poses[:, 1, 0, 3] = -0.3, 0.2
    gripper = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    frames = render_action_frames(poses, gripper, camera)
    assert frames.shape == (3, 64, 96, 3) and frames.dtype == np.uint8
    for n in range(2):
        alone = render_action_frames(poses[:, n : n + 1], gripper[:, n : n + 1], camera)
        left = slice(0, 20) if n == 0 else slice(60, 96)
        np.testing.assert_array_equal(frames[:, :, left], alone[:, :, left])
    np.testing.assert_array_equal(frames[1:2], render_action_frames(poses[1:2], gripper[1:2], camera))


def test_rendering_is_deterministic_and_scales():
    rng = np.random.default_rng(0)
    points, gripper = rng.uniform(-0.1, 0.1, (5, 3)), rng.uniform(0, 1, (5, 1))
    big = render_action_frames(poses_at(points), gripper, front_camera(256))
    np.testing.assert_array_equal(big, render_action_frames(poses_at(points), gripper, front_camera(256)))
    small = render_action_frames(poses_at(points), gripper, front_camera(256).resized(64, 64)).astype(float)
    averaged = big.reshape(5, 64, 4, 64, 4, 3).mean(axis=(2, 4))
    assert np.abs(small - averaged).mean() < 2.0  # the same picture at a quarter of the size


def test_rendering_is_fast():
    rng = np.random.default_rng(0)
    poses, gripper, camera = poses_at(rng.uniform(-0.1, 0.1, (100, 3))), rng.uniform(0, 1, (100, 1)), front_camera()
    times = []
    for _ in range(10):
        start = time.process_time()
        render_action_frames(poses, gripper, camera)
        times.append(time.process_time() - start)
    assert min(times) / 100 < 80e-6  # 20e-6 on a quiet machine


def test_bad_inputs_are_refused():
    camera = front_camera()
    with pytest.raises(ValueError, match=r"poses \(3, 4, 4\) and gripper \(3,\); expected \(T, N, 4, 4\) and \(T, N\)"):
        render_action_frames(np.zeros((3, 4, 4)), np.zeros(3), camera)
    with pytest.raises(ValueError, match="NaN or infinity"):
        render_action_frames(poses_at(np.zeros((2, 3))), np.full((2, 1), np.nan), camera)
    with pytest.raises(ValueError, match=r"points have shape \(2, 2\)"):
        project(np.zeros((2, 2)), camera)
    with pytest.raises(ValueError, match="camera has keys"):
        Camera.from_dict({"K": np.eye(3).tolist()})
