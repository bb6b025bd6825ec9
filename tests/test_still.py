"""Pixels that stand still keep their value: the pure function, and a rollout that uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from prophet_gym import SnapshotSet
from prophet_gym.world_model.codec import VideoCodec
from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
from prophet_gym.world_model.still import FULLY_CHANGED, keep_still
from prophet_gym.world_model.video_vae import FoldedVideoVAE


def grey(value: int, frames: int = 1) -> torch.Tensor:
    return torch.full((1, frames, 16, 16, 3), value, dtype=torch.uint8)


def test_small_changes_show_the_start_and_large_ones_the_imagination() -> None:
    start, decoded_start = grey(100)[:, 0], grey(104)[:, 0]
    frames = grey(104, 3)
    frames[0, 1, :, :8] = 110  # 6 grey levels: still
    frames[0, 2, :, :8] = 104 + int(8 * FULLY_CHANGED) + 1  # changed
    shown = keep_still(frames, start, decoded_start, threshold=8.0)
    assert (shown[0, 0] == 100).all() and (shown[0, 1] == 100).all()
    assert (shown[0, 2, :, :7] == frames[0, 2, 0, 0, 0]).all(), "as imagined, with the codec's error"
    assert (shown[0, 2, :, 9:] == 100).all()


def test_between_both_a_mixture_that_grows_with_the_change() -> None:
    start = grey(0)[:, 0]
    shown = [int(keep_still(grey(20 + d), start, grey(20)[:, 0], 8.0)[0, 0, 5, 5, 0]) for d in (0, 8, 10, 14, 18, 20)]
    assert shown[:2] == [0, 0] and shown[-1] == 40 and shown == sorted(shown) and len(set(shown)) == 5


def test_darker_counts_like_brighter_in_whichever_channel_changes_most() -> None:
    start = decoded_start = grey(100)[:, 0]
    for channel in range(3):
        frames = grey(100, 2)
        frames[0, 0, ..., channel], frames[0, 1, ..., channel] = 60, 140
        assert torch.equal(keep_still(frames, start, decoded_start, threshold=8.0), frames)


@pytest.mark.parametrize("kind", ["folded", "wan"])
def test_latents_of_what_stands_still_are_those_of_its_video(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "folded":
        codec = VideoCodec(FoldedVideoVAE(latent_channels=4, channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1)))
    else:
        codec = VideoCodec(
            AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
        )
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        standing = codec.standing(frames, codec.encode(frames[:, None]))
        video = codec.encode(frames[:, None].expand(-1, 5, -1, -1, -1))
    torch.testing.assert_close(standing, video)


def test_a_rollout_keeps_what_stands_still(tiny_checkpoint: Path) -> None:
    world = ProphetWorldModel.from_pretrained(tiny_checkpoint)
    still = ProphetWorldModel(world.transformer, world.codec.vae, replace(world.config, still_below=8.0))
    start = list(SnapshotSet.load(tiny_checkpoint / "snapshots"))[0]
    hold = np.zeros((2, 6, 1, 7), np.float32)
    hold[..., 6] = start.gripper[0]
    plain, _ = world.predict(world.begin([start, start], [0, 1]), hold)
    kept, after = still.predict(still.begin([start, start], [0, 1]), hold)
    same = (kept == start.image).all(-1)
    assert same.mean() > 2 * (plain == start.image).all(-1).mean()
    assert torch.equal(after.frames, torch.from_numpy(kept[:, -1])), "the next chunk starts from what was shown"
    changed = np.abs(kept.astype(int) - start.image).max(-1) > 40
    assert np.abs(kept.astype(int) - plain)[changed].mean() < 2, "what changed is shown as imagined"


def test_the_threshold_is_checked() -> None:
    with pytest.raises(ValueError, match=r"still_below=-1.*expected 0 to 255"):
        ProphetConfig(still_below=-1)
