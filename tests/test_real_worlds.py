"""The packaged worlds of real robots: they run as their ids promise, obey commands, and say how little they know."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

import prophet_gym  # noqa: F401 (registers the worlds)
from prophet_gym import SnapshotSet, check_world_env
from prophet_gym.compat.simpler import make
from prophet_gym.registration import ASSETS, WORLDS

ROBOTS = {"bridge": ("Prophet-Bridge-v0", (256, 256), 6), "droid": ("Prophet-Droid-v0", (192, 320), 9)}


@pytest.fixture(scope="module", params=sorted(ROBOTS))
def robot(request: pytest.FixtureRequest) -> str:
    return request.param


def test_gym_make_shows_images_of_the_robots_usual_size(robot: str) -> None:
    env_id, size, count = ROBOTS[robot]
    with gym.make(env_id, horizon=20) as env:
        observation, info = env.reset(seed=0)
        assert observation["image"].shape == (*size, 3) and info["instruction"]
        assert "works at 64x64" in info["checkpoint"] and "episodes" in info["checkpoint"]
        after, reward, terminated, truncated, info = env.step(env.action_space.sample() * 0)
        assert info["frames"].shape[1:] == (*size, 3) and after["image"].shape == (*size, 3)
        assert truncated and not terminated and reward == 0.0, "no judge comes with these worlds"
    assert len(SnapshotSet.load(ASSETS / robot / "snapshots")) == count


def test_they_pass_the_conformance_suite(robot: str) -> None:
    check_world_env(gym.make(ROBOTS[robot][0], horizon=8, chunk_length=4))


def test_the_arm_goes_where_it_is_sent(robot: str) -> None:
    """A command to the left and one to the right leave different pictures, nearer to the arm than elsewhere."""
    env_id = ROBOTS[robot][0]
    with gym.make(env_id, image_size=(64, 64), horizon=20, chunk_length=20) as env:
        ends = {}
        for direction in (-1.0, 1.0):
            env.reset(seed=3)
            action = np.zeros(env.action_space.shape, np.float32)
            action[:, 1], action[:, 6] = 0.01 * direction, 1.0
            ends[direction] = env.step(action)[0]["image"].astype(int)
        difference = np.abs(ends[1.0] - ends[-1.0]).max(-1)
        assert (difference > 30).mean() > 0.01, "it moves"
        assert (difference < 10).mean() > 0.5, "the rest of the room does not"


def test_users_own_images_need_a_camera(robot: str) -> None:
    env_id, size, _ = ROBOTS[robot]
    start = list(SnapshotSet.load(ASSETS / robot / "snapshots"))[0]
    blind = prophet_gym.Snapshot(start.image, start.instruction, eef_pose=start.eef_pose, gripper=start.gripper)
    with pytest.raises(ValueError, match="camera"):
        gym.make(env_id, snapshots=[blind]).reset(seed=0)


def test_simplerenvs_tasks_need_snapshots_of_them() -> None:
    """No recording shows one of SimplerEnv's scenes; one's own start image of the scene does."""
    with pytest.raises(ValueError, match="put carrot on plate"):
        make("widowx_carrot_on_plate")
    start = list(SnapshotSet.load(ASSETS / "bridge" / "snapshots"))[0]
    own = replace(start, instruction="put carrot on plate")
    env = make("widowx_carrot_on_plate", snapshots=[own])
    env.reset()
    assert env.step(np.zeros(7))[3] is False
    env.close()


def test_cards_are_there_and_the_weights_are_small(robot: str) -> None:
    folder = ASSETS / robot
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 15e6
    card = (folder / "README.md").read_text()
    for part in ("## Measured", "held-out", "shuffled", "## Limits", "CC BY 4.0", "scripts/make_real.sh"):
        assert part in card, part
    assert WORLDS[ROBOTS[robot][0]].packaged == robot
