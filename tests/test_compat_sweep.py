"""The motion sweep passes where the picture follows the commands, and fails where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import prophet_gym
from prophet_gym import SnapshotSet
from prophet_gym.compat.sweep import MOTIONS, check_motion, motion_sweep
from prophet_gym.registration import ASSETS


class Miswired(gym.ActionWrapper):
    """A world that takes its commands for something else."""

    def __init__(self, env: Any, change: str) -> None:
        super().__init__(env)
        self.change = change

    def action(self, action: np.ndarray) -> np.ndarray:
        action = action.copy()
        if self.change == "x and y swapped":
            action[:, [0, 1]] = action[:, [1, 0]]
        elif self.change == "gripper inverted":
            action[:, 6] = 1 - action[:, 6]
        elif self.change == "yaw reversed":
            action[:, 5] = -action[:, 5]
        else:
            action[:] = np.array([0, 0, 0, 0, 0, 0, 1])
        return action


WRONG = {
    "x and y swapped": {"+x", "-x", "+y", "-y"},
    "gripper inverted": {"close", "open"},
    "yaw reversed": {"+yaw", "-yaw"},
    "standing still": {*MOTIONS, "close", "open"},
}


# Closed jaws no longer show the yaw.
SIDE_EFFECTS = {change: {"+yaw", "-yaw"} if "gripper" in change else set() for change in WRONG}


@pytest.fixture(scope="module")
def starts() -> SnapshotSet:
    return SnapshotSet.load(ASSETS / "tabletop" / "snapshots")[:2]


@pytest.fixture(scope="module")
def prophet() -> Any:
    return gym.make("Prophet-Tabletop-v0", judge=lambda frames, instruction: False)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    env = gym.make("Tabletop-v0")
    yield env
    env.close()


@pytest.mark.render
def test_the_simulator_passes(simulator: Any, starts: SnapshotSet) -> None:
    motions = check_motion(simulator, starts)
    assert [motion.name for motion in motions] == [*MOTIONS, "close", "open"]
    assert all(motion.score > 0.8 for motion in motions if "yaw" not in motion.name)


def test_the_imagined_world_passes(prophet: Any, starts: SnapshotSet) -> None:
    assert all(motion.passed for motion in check_motion(prophet, starts))


@pytest.mark.render
@pytest.mark.parametrize("change", WRONG)
def test_a_miswired_simulator_fails(simulator: Any, starts: SnapshotSet, change: str) -> None:
    motions = motion_sweep(Miswired(simulator, change), starts[:1])
    assert {motion.name for motion in motions if not motion.passed} - SIDE_EFFECTS[change] == WRONG[change]


@pytest.mark.parametrize("change", ["x and y swapped", "gripper inverted"])
def test_a_miswired_imagined_world_fails(prophet: Any, starts: SnapshotSet, change: str) -> None:
    with pytest.raises(AssertionError, match="does not move as commanded") as error:
        check_motion(Miswired(prophet, change), starts[:1])
    named = {name for name in (*MOTIONS, "close", "open") if f"'{name}'" in str(error.value).split("]")[0]}
    assert named - SIDE_EFFECTS[change] == WRONG[change]


def test_starts_need_a_camera(prophet: Any, starts: SnapshotSet) -> None:
    blind = prophet_gym.Snapshot(starts[0].image, "x", starts[0].eef_pose, starts[0].gripper)
    for bad in ([], [blind]):
        with pytest.raises(ValueError, match="calibrated camera"):
            motion_sweep(prophet, bad)
