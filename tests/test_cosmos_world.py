"""Whole worlds from a Cosmos-Predict2 checkpoint, and the command that makes them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from small_cosmos import OPTIONS, WEIGHTS, first_image, write_checkpoints

import prophet_gym
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.cli import main
from prophet_gym.world_model import ProphetWorldModel, world_from_cosmos
from prophet_gym.world_model.lora import add_lora

gym.register_envs(prophet_gym)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("cosmos"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_world_imagines_is_saved_and_loaded_again(checkpoints: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    world = world_from_cosmos(
        checkpoints / "sharded",
        ACTION_SPECS["bridge"],
        image_size=(32, 48),
        history_frames=8,
        num_inference_steps=2,
        dtype=dtype,
        action_frames="pooled",
        **OPTIONS,
    )
    assert "actions have no effect" in world.checkpoint_info["trained_on"]
    commands = np.zeros((1, 6, 1, 7), np.float32)
    state = world.begin([first_image()], [0])
    frames, after = world.predict(state, commands)
    assert frames.shape == (1, 6, 32, 48, 3) and frames.dtype == np.uint8 and frames.std() > 0
    assert after.history.isfinite().all()
    moved, _ = world.predict(state, commands + np.float32(0.05))
    assert np.array_equal(moved, frames), "before training the base model imagines, which knows no actions"
    world.save_pretrained(tmp_path / "prophet")
    again = ProphetWorldModel.from_pretrained(tmp_path / "prophet", dtype=dtype)
    assert np.array_equal(again.predict(again.begin([first_image()], [0]), commands)[0], frames)
    add_lora(again.transformer, rank=2)
    with pytest.raises(ValueError, match="carries an adapter: merge it first"):
        again.save_pretrained(tmp_path / "prophet")
    assert (tmp_path / "prophet" / "prophet.json").exists()


def test_worlds_without_a_fitting_codec_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints / "sharded", tmp_path / "broken")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            world_from_cosmos(folder, ACTION_SPECS["agibot"], num_effectors=1, **OPTIONS)

    refused("commands of 2 end-effectors, denoiser of 1")
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"_class_name": "AutoencoderKLCosmos"}))
    refused("vae/config.json: a AutoencoderKLCosmos; expected a AutoencoderKLWan")
    config.write_text(json.dumps(values | {"base_dim": 16}))
    refused("vae: cannot be loaded")
    config.write_text(json.dumps(values | {"temperal_downsample": [False, False, True]}))
    refused(r"strides \(2, 8\)|cannot be loaded")
    AutoencoderKLWan(base_dim=8, z_dim=6, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
    refused("codec 6, denoiser 4")
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True]
    ).save_pretrained(folder / "vae")
    refused(r"strides \(4, 4\) in time and space; expected \(4, 8\)")
    (folder / "vae" / WEIGHTS).write_bytes(b"short")
    refused(f"vae/{WEIGHTS}: not a whole safetensors file")
    shutil.rmtree(folder / "vae")
    refused("vae/config.json")


def never(frames: np.ndarray, instruction: str) -> bool:
    return False


def test_command_writes_a_checkpoint_and_never_over_one(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prophet(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prophet", "from-cosmos", *words])
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    source, out = str(checkpoints / "sharded"), tmp_path / "world"
    assert prophet(source, str(out), "--actions", "brigde") == 2
    assert "Did you mean 'bridge'" in capsys.readouterr().err
    assert prophet(str(tmp_path), str(out), "--actions", "bridge") == 2 and not out.exists()
    words = ["--actions", "bridge", "--image-size", "64", "80", "--action-frames", "none", "--name", "mine"]
    words += ["--num-inference-steps", "2"]
    assert prophet(source, str(out), *words) == 0
    world = ProphetWorldModel.from_pretrained(out)
    assert world.config.name == "mine" and world.config.action_spec == ACTION_SPECS["bridge"]
    assert world.config.schedule == "karras" and world.image_size == (64, 80) and not world.requires_camera
    stored = load_file(out / "transformer" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    env = gym.make(
        "Prophet-Bridge-v0", checkpoint=str(out), snapshots=[first_image(64, 80)], chunk_length=4, judge=never
    )
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[4]["frames"].shape == (4, 64, 80, 3)
    assert prophet(source, str(out), *words) == 2
    assert "exists already" in capsys.readouterr().err
