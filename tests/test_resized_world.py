"""An environment may show larger images than its model works at; the model never sees them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest

from prophet_gym import ProphetEnv, SnapshotSet
from prophet_gym.checker import check_world_env
from prophet_gym.world_model.prophet import ProphetWorldModel
from prophet_gym.world_model.resized import ResizedWorldModel, resized_snapshot

SIZE = (96, 144)  # the model of the tests works at 48x48


def make(checkpoint: Path, **options: object) -> gym.Env:
    return gym.make("Prophet-Custom-v0", checkpoint=str(checkpoint), horizon=16, chunk_length=8, **options)


def judge(frames: np.ndarray, instruction: str) -> bool:
    assert frames.shape[1:] in ((*SIZE, 3), (48, 48, 3))
    return True


def test_what_is_shown_is_the_models_own_rollout_enlarged(tiny_checkpoint: Path) -> None:
    small, large = make(tiny_checkpoint, judge=judge), make(tiny_checkpoint, judge=judge, image_size=SIZE)
    assert large.observation_space["image"].shape == (*SIZE, 3)
    snapshot = SnapshotSet.load(tiny_checkpoint / "snapshots")[1]
    enlarged = resized_snapshot(snapshot, SIZE)
    small.reset(seed=3, options={"snapshot": resized_snapshot(enlarged, (48, 48))})
    shown, _ = large.reset(seed=3, options={"snapshot": enlarged})
    np.testing.assert_array_equal(shown["image"], enlarged.image)
    for _ in range(2):
        action = small.action_space.sample()
        _, _, _, _, own = small.step(action)
        observation, _, _, _, info = large.step(action)
        expected = np.stack([cv2.resize(f, SIZE[::-1], interpolation=cv2.INTER_LINEAR) for f in own["frames"]])
        np.testing.assert_array_equal(info["frames"], expected)
        np.testing.assert_array_equal(observation["image"], expected[-1])
    assert "works at 48x48" in info["checkpoint"] and info["is_success"]


def test_state_is_restored(tiny_checkpoint: Path) -> None:
    env = make(tiny_checkpoint, image_size=SIZE, judge=judge)
    env.reset(seed=0)
    action = env.action_space.sample()
    state = env.unwrapped.get_state()
    first = env.step(action)[0]["image"]
    again = make(tiny_checkpoint, image_size=SIZE, judge=judge).unwrapped
    again.set_state(state)
    np.testing.assert_array_equal(again.step(action)[0]["image"], first)


def test_conformance(tiny_checkpoint: Path) -> None:
    world = ResizedWorldModel(ProphetWorldModel.from_pretrained(tiny_checkpoint), SIZE)
    snapshots = SnapshotSet(resized_snapshot(s, SIZE) for s in SnapshotSet.load(tiny_checkpoint / "snapshots"))
    check_world_env(ProphetEnv(world, horizon=16, snapshots=snapshots, judge=judge, chunk_length=8))


def test_a_snapshot_of_another_size_is_refused(tiny_checkpoint: Path) -> None:
    env = make(tiny_checkpoint, image_size=SIZE, judge=judge)
    snapshot = SnapshotSet.load(tiny_checkpoint / "snapshots")[0]
    with pytest.raises(ValueError, match="48x48 pixels; this environment shows 96x144"):
        env.reset(options={"snapshot": snapshot})
    with pytest.raises(ValueError, match="height and width"):
        make(tiny_checkpoint, image_size=(0, 4))


def test_the_camera_is_resized_with_the_image(tiny_checkpoint: Path) -> None:
    snapshot = SnapshotSet.load(tiny_checkpoint / "snapshots")[0]
    assert snapshot.camera is not None
    larger = resized_snapshot(snapshot, SIZE)
    assert larger.camera is not None and (larger.camera.height, larger.camera.width) == SIZE
    fx, _, cx = snapshot.camera.K[0]
    np.testing.assert_allclose(larger.camera.K[0], [3 * fx, 0, 3 * (cx + 0.5) - 0.5])
    assert resized_snapshot(replace(snapshot, camera=None), SIZE).camera is None


def test_interfaces_that_show_the_camera_show_that_of_the_enlarged_image(tiny_checkpoint: Path) -> None:
    options = {"interface": "simpler", "judge": judge}
    views = []
    for size in ({}, {"image_size": SIZE}):
        observation, _ = make(tiny_checkpoint, **options, **size).reset(seed=0)
        views.append(observation["camera_param"]["3rd_view_camera"]["intrinsic_cv"])
    np.testing.assert_allclose(views[1], views[0], rtol=1e-5)  # of 480x640 pixels, both
