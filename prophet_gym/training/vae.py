"""Training of the small video codec (``prophet train vae``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..metrics.fidelity import psnr_per_frame
from ..strict_json import to_json
from ..world_model.codec import VideoCodec
from ..world_model.prophet import load_network
from ..world_model.video_vae import FoldedVideoVAE
from .clips import ClipArrays, ClipSource, load_clips
from .loop import LoopConfig, prepare_run, settled, train_loop


@dataclass(frozen=True)
class VAEConfig:
    """Configuration of a codec run."""

    data: Path
    """Training episodes: a folder of them, or a data set of another format."""
    validation: Path | None
    """Held-out episodes, of the same kind; None measures nothing."""
    source: ClipSource = field(default_factory=ClipSource)
    """How the data become clips of one length and size."""
    groups: int = 4
    """Groups of four frames of a training clip."""
    run: Path = Path("runs/vae")
    """Run folder; the codec ends in RUN/vae."""
    cache: Path = Path("runs/cache")
    """Folder for decoded clips, shared with the world model's run."""
    init: Path | None = None
    """Codec to start from (same architecture); by default fresh weights."""
    decoder_only: bool = False
    """Leave the encoder of ``init`` as it is, so that its latents, and denoisers trained on them, stay valid."""
    difference_weight: float = 0.0
    """Weight of the squared error of differences between neighbouring frames, which punishes flicker."""
    latent_channels: int = 32
    """Channels of a latent frame."""
    channels: int = 96
    """Width of the convolutions."""
    foreground_weight: float = 4.0
    """Extra weight of pixels that differ from the median image of the data."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence to a standard normal, mean over latent elements."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=6000, batch_size=12, decay_fraction=0.5))
    """Optimisation."""
    resume: bool = False
    """Continue an interrupted run."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: expected at least 1")
        if self.decoder_only and self.init is None:
            raise ValueError("decoder_only=True without init: expected the codec whose encoder is kept")


def median_image(clips: ClipArrays, count: int = 512, seed: int = 0) -> np.ndarray:
    """Per-pixel median (H, W, 3) uint8 of ``count`` random frames: what stays the same between scenes."""
    rng = np.random.default_rng(seed)
    picks = zip(rng.integers(len(clips), size=count), rng.integers(clips.frames.shape[1], size=count), strict=True)
    return np.median(np.stack([clips.frames[e, t] for e, t in picks]), axis=0).astype(np.uint8)


def sample_clips(clips: ClipArrays, batch_size: int, groups: int, rng: np.random.Generator) -> Tensor:
    """Random clips (B, 3, 1 + 4 groups, H, W) in [-1, 1]; in every eighth the last group repeats its first frame."""
    length = clips.frames.shape[1]
    span = 1 + VideoCodec.temporal_stride * groups
    picked = []
    for episode in rng.integers(len(clips), size=batch_size):
        index = int(rng.integers(length - span + 1)) + np.arange(span)
        if rng.random() < 0.125:
            index[-3:] = index[-4]
        picked.append(clips.frames[episode][index])
    return to_unit(np.stack(picked))


def to_unit(frames: np.ndarray) -> Tensor:
    """Frames (B, T, H, W, 3) uint8 to (B, 3, T, H, W) float32 in [-1, 1]."""
    return (torch.from_numpy(frames).float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)


def train_vae(config: VAEConfig) -> dict[str, float]:
    """Train a :class:`FoldedVideoVAE` and return its held-out metrics.

    Raises:
        ValueError: bad data or an existing run without ``resume``.
    """
    run = Path(config.run)
    config = replace(config, loop=settled(config.loop))
    prepare_run(run, {k: v for k, v in asdict(config).items() if k != "resume"}, config.resume)
    clips = load_clips(config.data, Path(config.cache) / "train", source=config.source, one_robot=False)
    length, needed = clips.actions.shape[1], VideoCodec.temporal_stride * config.groups
    if length < needed:
        raise ValueError(
            f"{config.data}: clips of {length} commands; expected at least {needed} for groups={config.groups}: give "
            "longer clips or fewer groups"
        )
    held_out = None
    if config.validation is not None:
        held_out = load_clips(
            config.validation,
            Path(config.cache) / "validation",
            source=replace(config.source, episodes=None),
            one_robot=False,
        )
    torch.manual_seed(config.loop.seed)
    if config.init is None:
        vae = FoldedVideoVAE(config.latent_channels, config.channels)
    else:
        vae = load_network(FoldedVideoVAE, Path(config.init), torch.float32)
        vae.encoder.requires_grad_(not config.decoder_only)
    vae = vae.to(memory_format=torch.channels_last)
    background = to_unit(median_image(clips)[None, None])
    accelerator = Accelerator(mixed_precision=config.loop.mixed_precision, log_with="tensorboard", project_dir=run)
    accelerator.init_trackers("tensorboard")

    def loss_fn(_: FoldedVideoVAE, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([config.loop.seed, step])
        video = sample_clips(clips, config.loop.batch_size, config.groups, rng).to(accelerator.device)
        still = video[:, :, :1].expand(-1, -1, VideoCodec.temporal_stride, -1, -1)
        groups = torch.cat([still, video[:, :, 1:]], dim=2).unflatten(2, (-1, VideoCodec.temporal_stride)).movedim(2, 1)
        noise = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
        mean, log_variance = (x.float() for x in vae.encode_groups(groups.flatten(0, 1)))
        drawn = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=noise).to(mean)
        latents = drawn.unflatten(0, groups.shape[:2])
        decoded = vae.decode_groups(latents[:, :-1].flatten(0, 1), latents[:, 1:].flatten(0, 1)).float()
        now = groups[:, 1:].flatten(0, 1)
        foreground = ((now - background.to(now)).abs().amax(1, keepdim=True) > 0.15).float()
        weight = 1.0 + config.foreground_weight * foreground
        error = (weight * (decoded - now).square()).mean()
        if config.difference_weight:
            steps = [x.unflatten(0, (len(video), -1)).transpose(1, 2).flatten(2, 3).diff(dim=2) for x in (decoded, now)]
            error = error + config.difference_weight * (steps[0] - steps[1]).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        plain = (decoded.detach() - now).square().mean().item()
        return error + config.kl_weight * kl, {"psnr": -10 * np.log10(plain / 4), "kl": kl.item()}

    def evaluate(model: FoldedVideoVAE, step: int) -> dict[str, float]:
        if held_out is None:
            return {}
        real, coded = reconstruct(model, held_out)
        panel = np.concatenate([np.concatenate(list(x[0, ::4]), axis=1) for x in (real, coded)])
        (run / "pictures").mkdir(exist_ok=True)
        cv2.imwrite(
            str(run / "pictures" / f"step_{step:06d}.png"), np.kron(panel, np.ones((4, 4, 1), np.uint8))[..., ::-1]
        )
        values = psnr_per_frame(real.reshape(-1, *real.shape[2:]), coded.reshape(-1, *coded.shape[2:]))
        return {"validation_psnr": float(values.mean())}

    vae = train_loop(vae, loss_fn, config.loop, run, accelerator=accelerator, resume=config.resume, evaluate=evaluate)
    accelerator.end_training()
    if not config.decoder_only:
        mean, std = latent_statistics(vae, clips, config.groups)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.register_to_config(_name_or_path="")  # diffusers would store where the initial weights were loaded from
    vae.half().save_pretrained(run / "vae")
    metrics = evaluate(vae.float(), config.loop.steps)
    (run / "metrics.json").write_text(to_json(metrics))
    return metrics


@torch.no_grad()
def reconstruct(vae: FoldedVideoVAE, clips: ClipArrays, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Real frames and their codec round trip, both (count, 4 n, H, W, 3) uint8, of the first ``count`` episodes."""
    last = 1 + (clips.frames.shape[1] - 1) // 4 * 4
    frames = torch.from_numpy(clips.frames[:count, :last].copy())
    codec = VideoCodec(vae)
    coded = [codec.decode(codec.encode(frames[i : i + 8])).cpu() for i in range(0, len(frames), 8)]
    return frames[:, 1:].numpy(), torch.cat(coded).numpy()


@torch.no_grad()
def latent_statistics(
    vae: FoldedVideoVAE, clips: ClipArrays, groups: int = 4
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of raw latents over 256 random clips of so many groups of frames."""
    video = sample_clips(clips, 256, groups, np.random.default_rng(0)).to(vae.device)
    folded = video[:, :, 1:].unflatten(2, (-1, VideoCodec.temporal_stride)).movedim(2, 1).flatten(0, 1)
    mean = torch.cat([vae.encode_groups(part)[0] for part in folded.split(128)])
    flat = mean.float().transpose(0, 1).flatten(1)
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).tolist())
