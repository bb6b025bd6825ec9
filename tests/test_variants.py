"""Mirror images and reversed recordings: images, camera, poses and commands agree with each other as before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS, ActionSpec, integrate_poses
from prophet_gym.data.episode import Episode
from prophet_gym.data.variants import mirrored, reversed_in_time

SPECS = {
    "servo, Euler": replace(ACTION_SPECS["droid"], control_hz=5.0),
    "servo, axis-angle": ACTION_SPECS["tabletop"],
    "difference": ACTION_SPECS["bridge"],
}


@pytest.fixture(params=sorted(SPECS))
def episode(request: pytest.FixtureRequest) -> Episode:
    """Poses are integrated from random commands; in the images, a white pixel is where the gripper is projected."""
    spec, rng, steps = SPECS[request.param], np.random.default_rng(0), 7
    commands = rng.uniform(-0.03, 0.03, (steps, 1, 7)).astype(np.float32)
    commands[..., 6] = rng.uniform(0, 1, (steps, 1))
    start = np.eye(4)[None]
    start[0, :3, :3] = Rotation.from_euler("xyz", [0.3, -0.2, 0.5]).as_matrix()
    start[0, :3, 3] = 0.02, 0.05, 0.1
    poses = np.concatenate([start[None], integrate_poses(start, commands, spec)])
    view = np.eye(4)
    view[:3, :3], view[:3, 3] = Rotation.from_euler("xyz", [2.4, 0.3, 0.4]).as_matrix(), (0.05, -0.02, 0.8)
    camera = Camera(np.array([[90.0, 1.5, 30], [0, 80, 20], [0, 0, 1]]), view, 70, 50)
    pixels = project(poses[:, 0, :3, 3], camera)
    images = np.zeros((steps + 1, 50, 70, 3), np.uint8)
    for image, (u, v) in zip(images, pixels.round().astype(int), strict=True):
        image[v, u] = 255
    return Episode(
        images, spec.from_canonical(commands), spec, "to the left", 5.0, camera=camera, eef_pose=poses,
        gripper=np.concatenate([[[0.4]], commands[..., 6]]), labels={"block_px": pixels}, success=True, name="e",
    )  # fmt: skip


def consistent(episode: Episode) -> None:
    """Commands lead from pose to pose, and the gripper is projected to where the images show it."""
    spec = episode.action_spec
    path = integrate_poses(episode.eef_pose[0], episode.canonical_actions, spec)
    np.testing.assert_allclose(path, episode.eef_pose[1:], atol=1e-5)
    np.testing.assert_allclose(episode.canonical_actions[..., 6], episode.gripper[1:], atol=1e-5)
    pixels = project(episode.eef_pose[:, 0, :3, 3], episode.camera)
    np.testing.assert_allclose(pixels, episode.labels["block_px"], atol=1e-6)
    seen = [np.argwhere(image[..., 0])[0][::-1] for image in episode.frames]
    assert np.abs(np.array(seen) - pixels).max() <= 0.5 + 1e-6
    assert episode.instruction == "" and episode.success is None


def test_the_fixture_is_consistent(episode: Episode) -> None:
    consistent(replace(episode, instruction="", success=None))


def test_a_mirrored_episode_is_one_of_the_mirrored_world(episode: Episode) -> None:
    image = mirrored(episode)
    consistent(image)
    np.testing.assert_allclose(image.eef_pose[:, 0, 1, 3], -episode.eef_pose[:, 0, 1, 3])
    again = mirrored(image)
    np.testing.assert_array_equal(again.frames, episode.frames)
    np.testing.assert_allclose(again.actions, episode.actions, atol=1e-6)
    np.testing.assert_allclose(again.camera.E, episode.camera.E, atol=1e-12)


def test_a_reversed_episode_leads_back(episode: Episode) -> None:
    back = reversed_in_time(episode)
    consistent(back)
    np.testing.assert_array_equal(back.frames[0], episode.frames[-1])
    np.testing.assert_allclose(back.eef_pose[-1], episode.eef_pose[0], atol=1e-12)


def test_two_arms_have_no_mirror_and_nothing_is_reversed_blindly(episode: Episode) -> None:
    two = ActionSpec(num_effectors=2)
    pair = Episode(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 14), np.float32), two, "", 5.0, name="pair")
    with pytest.raises(ValueError, match="2 end-effectors; expected 1"):
        mirrored(pair)
    with pytest.raises(ValueError, match="gripper missing"):
        reversed_in_time(replace(episode, eef_pose=None, gripper=None, camera=None, labels={}))
    local = replace(SPECS["servo, Euler"], delta="local")
    with pytest.raises(ValueError, match="delta='local'"):
        reversed_in_time(replace(episode, action_spec=local))
