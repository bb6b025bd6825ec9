"""The codec of an adaptation: what it alone loses on the new images, and a decoder that learns them.

A codec that saw many scenes stays as it is. A small one that saw a single scene paints that scene's colours over any
other; then its decoder can be trained on the new episodes before the denoiser is. The encoder stays, and with it the
latents that the base understands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.episode import Episode
from ..metrics.optical_flow import default_threshold, farneback_flow
from ..metrics.scores import score_episode
from ..world_model.codec import VideoCodec
from ..world_model.prophet import ProphetWorldModel, load_network
from .adapt_config import AdaptConfig
from .clips import ClipSource
from .loop import LoopConfig
from .vae import VAEConfig, train_vae

__all__ = ["codec_limits", "take_decoder", "train_decoder", "warn_of_the_codec"]

logger = logging.getLogger(__name__)

_GROUPS = 4  # of four frames, in a training clip of the decoder where clips are long enough


def train_decoder(config: AdaptConfig, codec: VideoCodec, folder: Path, source: ClipSource) -> Path:
    """Train the decoder on the episodes of an adaptation, in RUN/decoder; an interrupted run goes on.

    Args:
        config: the run; ``decoder_steps`` is at least 1.
        codec: of the base.
        folder: with its weights.
        source: the training clips.

    Returns:
        Folder of the codec with the new decoder.

    Raises:
        ValueError: another codec than those of ``prophet train vae``, clips of less than four commands, or RUN/decoder
            was made with other settings.
    """
    if not codec.folded:
        raise ValueError(
            f"--decoder-steps {config.decoder_steps}: the codec of {config.base} is a {type(codec.vae).__name__}; "
            "expected one of `prophet train vae`. Leave the option out: such a codec has seen more than these episodes"
        )
    run = config.run_folder / "decoder"
    # On Tabletop with a dark table, 300 steps on 50 episodes reach 32 dB on held-out frames, from 15.
    loop = LoopConfig(
        steps=config.decoder_steps, batch_size=4, learning_rate=2e-3, weight_decay=0.0, warmup_steps=20,
        decay_fraction=0.5, ema_decay=0.98, log_every=25, save_every=100, eval_every=0, seed=config.loop.seed,
        mixed_precision=config.loop.mixed_precision,
    )  # fmt: skip
    train_vae(
        VAEConfig(
            data=config.data,
            validation=None,
            source=source,
            groups=min(_GROUPS, (source.clip_length or 0) // VideoCodec.temporal_stride),
            run=run,
            cache=run / "cache",
            init=folder,
            decoder_only=True,
            difference_weight=3.0,
            loop=loop,
            resume=(run / "checkpoints" / "last.pt").exists(),
        )
    )
    return run / "vae"


def take_decoder(world: ProphetWorldModel, folder: Path) -> None:
    """Give a world the decoder of a codec from :func:`train_decoder`, in place; its own encoder stays to the bit."""
    trained = load_network(type(world.codec.vae), folder, torch.float32)
    world.codec.vae.decoder.load_state_dict(trained.decoder.state_dict())


@torch.no_grad()
def codec_limits(codec: VideoCodec, episodes: Sequence[Episode]) -> dict[str, float]:
    """What no denoiser can surpass by much: real clips, coded and decoded, beside their first frame repeated.

    Args:
        codec: the codec.
        episodes: clips at the size of the codec.

    Returns:
        ``psnr`` (dB), ``epe`` (pixels) and ``cos`` of the round trip, ``last_frame_psnr`` and ``last_frame_epe``;
        means over clips.
    """
    rows = []
    for episode in episodes:
        real = episode.frames
        last = len(real) - 1
        index = np.minimum(np.arange(1 + 4 * -(-last // 4)), last)
        coded = codec.decode(codec.encode(torch.from_numpy(real[index].copy())[None]))[0, :last].cpu().numpy()
        flow, row = farneback_flow(real), []
        for video in (np.concatenate([real[:1], coded]), np.repeat(real[:1], last + 1, axis=0)):
            scores = score_episode(
                real, video, flow, farneback_flow(video), threshold=default_threshold(real.shape[1]), block=None
            )
            summary = scores.summary(last)
            row += [summary["psnr"], summary["epe_mean"], summary["cos_mean"]]
        rows.append(row)
    psnr, epe, cos, last_psnr, last_epe, _ = np.array(rows)[:, :6].T
    defined = cos[~np.isnan(cos)]
    return {
        "psnr": float(psnr.mean()),
        "epe": float(epe.mean()),
        "cos": float(defined.mean()) if len(defined) else float("nan"),
        "last_frame_psnr": float(last_psnr.mean()),
        "last_frame_epe": float(last_epe.mean()),
    }


def warn_of_the_codec(config: AdaptConfig, limits: dict[str, float]) -> None:
    """Log what the codec alone loses; a warning where that is too much for any adaptation."""
    logger.info("the codec alone: %.1f dB, EPE %.3f px on held-out clips", limits["psnr"], limits["epe"])
    if limits["epe"] >= limits["last_frame_epe"]:
        logger.warning(
            "the codec hardly knows such images: coded and decoded, real clips have an EPE of %.3f px, their first "
            "frame repeated has %.3f; no denoiser can mend that. %s", limits["epe"], limits["last_frame_epe"],
            "Give more --decoder-steps" if config.decoder_steps else
            "--decoder-steps 400 trains the decoder on them first, if the codec is one of `prophet train vae`",
        )  # fmt: skip
