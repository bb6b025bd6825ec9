"""Adaptation that is killed, and adaptation of the codec's decoder; the set-up is that of test_adapt."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import kill_at_checkpoint
from test_adapt import LOOP, config, data, env_steps, fresh_accelerator, square  # noqa: F401

from prophet_gym.data.windows import EpisodeWindows
from prophet_gym.training.adapt import adapt
from prophet_gym.training.adapt_codec import codec_limits, train_decoder
from prophet_gym.training.adapt_config import AdaptConfig
from prophet_gym.training.clips import ClipSource
from prophet_gym.world_model import ProphetWorldModel


@pytest.mark.programs
def test_killed_run_resumes(config: AdaptConfig) -> None:  # noqa: F811
    command = [
        *(sys.executable, "-m", "prophet_gym.cli", "adapt", str(config.data), "--base", config.base),
        *("--out", str(config.out), "--rank", "2", "--batch-size", "2", "--warmup-steps", "1", "--ema-decay", "0.5"),
        *("--learning-rate", "3e-3", "--log-every", "1", "--save-every", "1", "--eval-every", "2000"),
        *("--mixed-precision", "no", "--steps", "4000", "--evaluation-windows", "2", "--evaluation-frames", "4"),
    ]
    checkpoint = config.run_folder / "checkpoints" / "last.pt"
    kill_at_checkpoint(command, checkpoint)
    step = torch.load(checkpoint, weights_only=True)["step"]
    stored = json.loads((config.run_folder / "config.json").read_text())
    stored["loop"]["steps"] = step + 1  # a shorter run, so that the test ends: the stored settings must agree
    (config.run_folder / "config.json").write_text(json.dumps(stored))
    adapt(replace(config, loop=replace(LOOP, steps=step + 1, eval_every=2000), resume=True))
    assert torch.load(checkpoint, weights_only=True)["step"] == step + 1
    assert env_steps(config.out)


def test_a_small_codec_learns_to_draw_the_new_images(
    config: AdaptConfig,  # noqa: F811
    tiny_checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its decoder alone, so that the base's latents stay; the result carries it, and other settings are refused."""
    result = adapt(replace(config, decoder_steps=20, loop=replace(LOOP, steps=1)))
    before, after = (ProphetWorldModel.from_pretrained(folder).codec for folder in (tiny_checkpoint, config.out))
    for (name, old), new in zip(before.vae.named_parameters(), after.vae.parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith("encoder"), name
    windows = EpisodeWindows([square(3, 31)], 31, image_size=(48, 48))
    assert codec_limits(after, windows)["psnr"] > codec_limits(before, windows)["psnr"] + 1
    assert result["codec"]["epe"] >= result["codec"]["last_frame_epe"] and "Give more --decoder-steps" in caplog.text
    assert all(part in (config.out / "README.md").read_text() for part in ("--decoder-steps 20", "The codec alone"))
    with pytest.raises(ValueError, match="decoder: the stored config.json differs"):
        train_decoder(replace(config, decoder_steps=30), before, tiny_checkpoint / "vae", ClipSource(clip_length=22))
