"""Colours read off latents: the map is exact where there is one, and near for the packaged codec on frames unseen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import prophet_gym
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.snapshot import SnapshotSet
from prophet_gym.training.chunks import ChunkSampler
from prophet_gym.training.clips import ClipArrays, LatentArrays, encode_clips
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.latent_colours import fit_latent_colours
from prophet_gym.training.one_step import one_step_loss
from prophet_gym.training.world_model import chunk_loss
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.prophet import load_network
from prophet_gym.world_model.transformer import ProphetTransformer
from prophet_gym.world_model.video_vae import FoldedVideoVAE

TABLETOP = Path(prophet_gym.__file__).parent / "assets" / "tabletop"


def clips_of(frames: np.ndarray) -> ClipArrays:
    count, length = frames.shape[:2]
    pixels = np.zeros((count, length, 2, 2), np.float32)
    return ClipArrays(frames, np.zeros((count, length - 1, 1, 7), np.float32), None, pixels, pixels[:, :, :1],
                      ACTION_SPECS["tabletop"], "made up")  # fmt: skip


def colours_of(frames: np.ndarray) -> torch.Tensor:
    """Mean colours (E, 3, h, w) of the frames 1 to 4 of each clip, in standard deviations."""
    mean = torch.from_numpy(frames[:, 1:5].mean(axis=1)).permute(0, 3, 1, 2)
    colours = F.avg_pool2d(mean, 8).float()
    return (colours - colours.mean(dim=(0, 2, 3), keepdim=True)) / colours.std(dim=(0, 2, 3), keepdim=True)


def test_a_linear_code_is_read_exactly() -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(40, 200, (12, 9, 2, 3, 1, 1, 3)).astype(np.uint8)
    frames = np.broadcast_to(blocks, (12, 9, 2, 3, 8, 8, 3)).swapaxes(3, 4).reshape(12, 9, 16, 24, 3)
    pooled = np.zeros((12, 5, 3, 2, 3))
    for i in range(2, 5):  # of frames 2 i - 3 ... 2 i
        mean = frames[:, 2 * i - 3 : 2 * i + 1].mean(axis=1)
        pooled[:, i] = mean.reshape(12, 2, 8, 3, 8, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    mix = rng.normal(size=(5, 3))
    coded = (np.einsum("etchw,zc->etzhw", pooled / 100.0, mix) + 0.5).astype(np.float16)
    colours = fit_latent_colours(clips_of(frames), LatentArrays(coded, coded))
    read = torch.einsum("ezhw,zc->echw", torch.from_numpy(coded[:, 2]).float(), colours)
    spread = torch.from_numpy(pooled[:, 2:]).std(dim=(0, 1, 3, 4))
    wanted = torch.from_numpy(pooled[:, 2]) / spread[:, None, None]
    apart = (read[1:] - read[:1]) - (wanted[1:] - wanted[:1]).float()  # the constant does not matter
    assert apart.abs().max() < 0.1 < 2.0 < (wanted[1:] - wanted[:1]).abs().max()


def test_the_packaged_codec_tells_colours_of_frames_it_was_not_fitted_to(tmp_path: Path) -> None:
    images = np.stack([snapshot.image for snapshot in SnapshotSet.load(TABLETOP / "snapshots")])
    frames = np.repeat(images[:, None], 5, axis=1)
    vae = load_network(FoldedVideoVAE, TABLETOP / "vae", torch.float32).eval()
    latents = encode_clips(vae, clips_of(frames), tmp_path)
    half = len(frames) // 2
    colours = fit_latent_colours(clips_of(frames[:half]), LatentArrays(latents.single[:half], latents.group[:half]))
    read = torch.einsum("ezhw,zc->echw", torch.tensor(latents.group[half:, 2]).float(), colours)
    wanted = colours_of(frames[half:])
    left = (wanted - read - (wanted - read).mean(dim=(0, 2, 3), keepdim=True)).square().mean(dim=(0, 2, 3))
    assert (left < 0.35).all()


def test_a_run_weighs_colours_as_configured() -> None:
    rng = np.random.default_rng(3)
    clips = clips_of(rng.integers(0, 256, (3, 25, 64, 64, 3)).astype(np.uint8))
    coded = rng.normal(size=(3, 13, 4, 8, 8)).astype(np.float16)
    latents = LatentArrays(coded, coded)
    vae = FoldedVideoVAE(latent_channels=4, channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    network = ProphetTransformer(**preset("tiny", latent_channels=4, num_attention_heads=1, num_layers=1,
                                          action_frames="none"))  # fmt: skip
    losses = []
    for weight in (0.0, 7.0):
        config = ObjectiveConfig(
            action_frames="none", objective="median", colour_weight=weight, num_inference_steps=1, full_length=1.0
        )
        sampler = ChunkSampler(clips, latents, config, chunk_length=20, history=60, vae=vae)
        loss, _ = chunk_loss(sampler, network, config)(network, 5)
        colours = fit_latent_colours(clips, latents) if weight else None
        wanted, _ = one_step_loss(network, network, sampler(5, config.loop.batch_size), config, 5, colours)
        assert torch.equal(loss, wanted)
        losses.append(loss.item())
    assert losses[1] > 1.05 * losses[0]
