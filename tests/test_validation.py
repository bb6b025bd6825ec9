"""Evaluation during training, on recordings that lack what a rollout starts from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_training import TINY_LOOP, config, data, fresh_accelerator, square_episode, vae_folder  # noqa: F401

from prophet_gym.data.folder import write_episode
from prophet_gym.training.config import WorldModelConfig
from prophet_gym.training.world_model import train_world_model


def test_validation_does_without_poses_or_refuses_before_training(config: WorldModelConfig, tmp_path: Path) -> None:  # noqa: F811
    """Real recordings may have no poses: a run must not train to its end and fail at its evaluation."""
    for i in range(2):
        bare = replace(square_episode(i, steps=20), eef_pose=None, gripper=None, camera=None)
        write_episode(tmp_path / "bare" / f"episode_{i}", bare)
    posed = replace(config, validation=tmp_path / "bare", loop=replace(TINY_LOOP, steps=1))
    with pytest.raises(ValueError, match="2 of 2 episodes have no camera or no poses"):
        train_world_model(posed)
    assert not posed.run.exists()
    train_world_model(replace(posed, action_frames="none"))
    line = json.loads((posed.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1 and line["validation_psnr"] > 0


def test_training_on_a_range_leaves_held_out_data_whole(config: WorldModelConfig, tmp_path: Path) -> None:  # noqa: F811
    """Training on the second and third episode must not look for those in the held-out set, which has two."""
    for i in range(2):
        write_episode(tmp_path / "held out" / f"episode_{i}", square_episode(i, steps=20))
    part = replace(config.source, episodes=(1, 3))
    run = replace(config, source=part, validation=tmp_path / "held out", loop=replace(TINY_LOOP, steps=1))
    train_world_model(run)
    folders = list((run.run / "pictures").iterdir())
    assert json.loads((folders[0] / "metrics.json").read_text())["protocol"]["num_episodes"] == 2
