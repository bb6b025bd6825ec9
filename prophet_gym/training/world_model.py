"""Training of the denoiser (``prophet train world-model``) on latents of recorded episodes.

Departures from the paper, each a field of :class:`WorldModelConfig`: rectified-flow velocity loss, as Cosmos-Predict2
trains (the paper writes noise prediction); clips of random length, so that every chunk length works; chunks in which an
object moves are drawn more often; the clean frame and the history are blurred by a little noise, because in a rollout
they are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..actions import pad_chunk
from ..data.folder import EpisodeFolder
from ..metrics.evaluate import evaluate_world_model
from ..world_model.presets import preset
from ..world_model.prophet import ProphetConfig, ProphetWorldModel, load_network
from ..world_model.transformer import ProphetTransformer
from ..world_model.video_vae import FoldedVideoVAE
from .clips import ClipArrays, LatentArrays, encode_clips, load_clips
from .loop import LoopConfig, prepare_run, train_loop


@dataclass(frozen=True)
class WorldModelConfig:
    """Configuration of a world-model run."""

    data: Path
    """Folder of training episodes."""
    vae: Path
    """Folder of the trained codec."""
    run: Path = Path("runs/world-model")
    """Run folder; the checkpoint ends in RUN/prophet."""
    cache: Path = Path("runs/cache")
    """Folder of decoded clips and latents."""
    init: Path | None = None
    """Checkpoint whose denoiser the run starts from (same architecture); by default fresh weights."""
    validation: Path | None = None
    """Folder of held-out episodes for evaluation during training."""
    name: str = "tiny"
    """Name of the checkpoint."""
    trained_on: str = ""
    """One sentence on the data; default: the folder's name and size."""
    action_frames: str = "spatial"
    """"none" (scalar stream alone), "pooled" (Eqs 10 and 11) or "spatial"."""
    num_attention_heads: int = 4
    """Attention heads of 64 channels."""
    num_layers: int = 6
    """Transformer blocks."""
    adaln_lora_dim: int = 48
    """Rank of the AdaLN-LoRA."""
    full_length: float = 0.7
    """Share of steps with full chunks; the others draw a length uniformly from 1 to the chunk length."""
    eventful: float = 0.5
    """Share of samples from chunks in which a labelled object moves."""
    old_rollout: float = 0.6
    """Share of samples whose rollout began with the episode; that of the others began later, at any frame."""
    condition_noise: float = 0.05
    """Largest standard deviation of noise on the clean frame and the history, in units of latents."""
    timestep_shift: float = 3.0
    """t = s u / (1 + (s - 1) u) with uniform u."""
    motion_weight: float = 1.0
    """Extra loss weight, growing to this value, of latent positions that differ from the start frame."""
    num_inference_steps: int = 4
    """Denoising steps stored with the checkpoint."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    resume: bool = False
    """Continue an interrupted run."""

    def __post_init__(self) -> None:
        if self.action_frames not in ("none", "pooled", "spatial"):
            raise ValueError(f'action_frames={self.action_frames!r}: expected "none", "pooled" or "spatial"')
        for name in ("full_length", "eventful", "old_rollout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")


@dataclass(frozen=True, eq=False)
class ChunkBatch:
    """One mini-batch: B clips of L commands, T = 1 + ceil(L / 4) latent frames.

    Attributes:
        latents: clean latents (B, z, T, h, w); frame 0 is the start frame.
        history: (B, z, T_hist, h, w), oldest first.
        actions: commands padded to the chunk length, (B, C, N, 7).
        action_frames: drawn actions (B, 3, 1 + 4 (T - 1), h, w) in [-1, 1], for "pooled" their latents, or None.
    """

    latents: Tensor
    history: Tensor
    actions: Tensor
    action_frames: Tensor | None


class ChunkSampler:
    """Draws batches from recorded clips; batch i is a function of (seed, i)."""

    def __init__(
        self, clips: ClipArrays, latents: LatentArrays, config: WorldModelConfig, *, chunk_length: int, history: int,
        vae: FoldedVideoVAE,
    ) -> None:  # fmt: skip
        self.clips, self.latents, self.config, self.vae = clips, latents, config, vae
        self.chunk_length, self.groups = chunk_length, history // 4
        self.commands = clips.actions.shape[1]
        if self.commands < chunk_length:
            raise ValueError(f"episodes of {self.commands} commands; chunks of {chunk_length} need at least as many")
        counts = np.concatenate([np.zeros((len(clips), 1), int), np.cumsum(clips.eventful, axis=1)], axis=1)
        starts = np.arange(0, self.commands - chunk_length + 1, 2)
        # Full chunks, as (episode, start), in which a labelled object moves in at least three commands.
        busy = counts[:, starts + chunk_length] - counts[:, starts] >= 3
        episodes, columns = busy.nonzero()
        self.eventful = np.stack([episodes, starts[columns]], axis=1)

    def __call__(self, step: int, batch_size: int, length: int | None = None) -> ChunkBatch:
        """Batch of a step; ``length`` fixes the number of commands."""
        config = self.config
        rng = np.random.default_rng([config.loop.seed, 1, step])
        if length is None:
            full = rng.random() < config.full_length
            length = self.chunk_length if full else int(rng.integers(1, self.chunk_length + 1))
        episodes = rng.integers(len(self.clips), size=batch_size)
        starts = 2 * rng.integers(0, (self.commands - length) // 2 + 1, size=batch_size)
        chosen = rng.random(batch_size) < config.eventful
        if len(self.eventful):
            picks = self.eventful[rng.integers(len(self.eventful), size=batch_size)]
            offset = 2 * rng.integers(0, (self.chunk_length - length) // 2 + 1, size=batch_size)
            episodes = np.where(chosen, picks[:, 0], episodes)
            starts = np.where(chosen, picks[:, 1] + offset, starts)
        waiting = np.minimum(2 * (rng.random(batch_size) < 0.2), starts)
        oldest = (starts - waiting) // 4
        age = np.where(rng.random(batch_size) < config.old_rollout, oldest, rng.integers(0, oldest + 1))
        return self.gather(episodes, starts, length, waiting, age)

    def gather(
        self, episodes: np.ndarray, starts: np.ndarray, length: int, waiting: np.ndarray, age: np.ndarray
    ) -> ChunkBatch:
        """Clips with the history that a rollout would have at their start.

        Args:
            episodes: (B,) indices.
            starts: (B,) even start frames.
            length: commands of each clip.
            waiting: (B,) 0 or 2, frames before the start that wait for their group of four to fill.
            age: (B,) complete groups since the snapshot of the imagined rollout, which is frame
                ``start - waiting - 4 age``; the history before it repeats that frame (Alg. 1, line 1).
        """
        groups = -(-length // 4)
        # group[i] codes frames 2 i - 3 ... 2 i, so the j-th group of the clip has 2 i = start + 4 (j + 1).
        columns = starts[:, None] // 2 + 2 * np.arange(1, groups + 1)
        whole = length // 4
        parts = [self.latents.single[episodes, starts // 2][:, None]]
        if whole:
            parts.append(self.latents.group[episodes[:, None], columns[:, :whole]])
        if whole < groups:
            parts.append(self._partial_group(episodes, starts, length))
        latents = torch.from_numpy(np.concatenate(parts, axis=1)).float().transpose(1, 2)
        newest = (starts - waiting) // 2  # group[i] ends at frame 2 i
        back = np.arange(self.groups)[::-1]
        history = np.where(
            (back < age[:, None])[..., None, None, None],
            self.latents.group[episodes[:, None], np.maximum(newest[:, None] - 2 * back, 0)],
            self.latents.single[episodes, newest - 2 * age][:, None],
        )
        commands = self.clips.actions[episodes[:, None], starts[:, None] + np.arange(length)]
        frames = None
        if self.config.action_frames != "none":
            index = np.minimum(starts[:, None] + np.arange(1 + 4 * groups), (starts + length)[:, None])
            drawn = torch.from_numpy(self.clips.drawn[episodes[:, None], index])
            frames = (drawn.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3)
        if self.config.action_frames == "pooled":
            frames = self._encode(frames)
        return ChunkBatch(
            latents,
            torch.from_numpy(history).float().transpose(1, 2),
            torch.from_numpy(pad_chunk(commands, self.chunk_length)),
            frames,
        )

    @torch.no_grad()
    def _encode(self, video: Tensor) -> Tensor:
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.encode(video.to(self.vae.device)).cpu()

    def _partial_group(self, episodes: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Latents of the last, incomplete group with its last frame repeated: after the clip, the scene holds still."""
        index = np.minimum(starts[:, None] + 4 * (length // 4) + np.arange(1, 5), (starts + length)[:, None])
        frames = torch.from_numpy(self.clips.frames[episodes[:, None], np.concatenate([index[:, :1], index], axis=1)])
        return (
            self._encode((frames.float() / 127.5 - 1.0).permute(0, 4, 1, 2, 3))[:, :, 1:].transpose(1, 2).half().numpy()
        )


def velocity_loss(
    model: Callable[..., Tensor],
    transformer: ProphetTransformer,
    batch: ChunkBatch,
    config: WorldModelConfig,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Rectified-flow loss ||v - (eps - z_0)||^2 over all latent frames but the first.

    All noise follows from (seed, step) and is drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
    clean, b = batch.latents, len(batch.latents)
    level = config.condition_noise * torch.rand(b, 1, 1, 1, 1, generator=generator)
    start = clean[:, :, :1] + level * torch.randn(clean[:, :, :1].shape, generator=generator)
    history = batch.history + level * torch.randn(batch.history.shape, generator=generator)
    u = torch.rand(b, generator=generator)
    t = config.timestep_shift * u / (1.0 + (config.timestep_shift - 1.0) * u)
    noise = torch.randn(clean[:, :, 1:].shape, generator=generator)
    t_full = t.view(b, 1, 1, 1, 1)
    noisy = (1.0 - t_full) * clean[:, :, 1:] + t_full * noise
    mask = clean.new_zeros(b, 1, *clean.shape[2:])
    mask[:, :, 0] = 1.0
    times = torch.cat([torch.zeros(b, 1), t[:, None].expand(-1, clean.shape[2] - 1)], dim=1)
    device = transformer.device
    drawn = None if batch.action_frames is None else batch.action_frames.to(device)
    condition = transformer.condition(batch.actions.to(device), drawn, history.to(device))
    inputs = torch.cat([start, noisy], dim=2).to(device)
    velocity = model(inputs, mask.to(device), times.to(device), condition)[:, :, 1:].float()
    clean = clean.to(device)
    error = (velocity - (noise.to(device) - clean[:, :, 1:])).square().mean(dim=1)
    change = (clean[:, :, 1:] - clean[:, :, :1]).square().mean(dim=1)
    weight = 1.0 + config.motion_weight * change.clamp(max=1.0)
    moving = change > 0.25
    numbers = {"velocity_mse": error.mean().item()}
    if moving.any():
        numbers["velocity_mse_moving"] = error[moving].mean().item()
    return (weight * error).sum() / weight.sum(), numbers


def validator(config: WorldModelConfig, count: int = 32) -> Callable[[ProphetWorldModel, int], dict[str, float]]:
    """Open-loop evaluation on the first ``count`` held-out episodes; strips and videos go to RUN/pictures."""
    episodes = EpisodeFolder(config.validation)[:count]
    steps = min(40, min(len(episode.actions) for episode in episodes))

    def evaluate(world: ProphetWorldModel, step: int) -> dict[str, float]:
        out = Path(config.run) / "pictures" / f"step_{step:06d}"
        report = evaluate_world_model(world, episodes, steps, batch_size=count, out=out)
        tables = report["groups"]["all"]["horizons"][str(steps)]
        names = ("psnr", "epe_mean", "cos_mean", "block_within", "block_lost")
        numbers = {f"validation_{name}": tables["predictors"]["model"][name]["value"] for name in names}
        return {**numbers, **{name: figure["value"] for name, figure in tables["against"].items()}}

    return evaluate


def train_world_model(
    config: WorldModelConfig,
    evaluate: Callable[[ProphetWorldModel, int], dict[str, float]] | None = None,
) -> ProphetWorldModel:
    """Train a Prophet on one data set and save it to RUN/prophet.

    Args:
        config: the run.
        evaluate: maps a world model with the averaged weights and the step to numbers for the log; default
            :func:`validator` where the configuration names held-out episodes.

    Raises:
        ValueError: bad data or an existing run without ``resume``.
    """
    run, cache = Path(config.run), Path(config.cache)
    if evaluate is None and config.validation is not None:
        evaluate = validator(config)
    prepare_run(run, {k: v for k, v in asdict(config).items() if k != "resume"}, config.resume)
    accelerator = Accelerator(mixed_precision=config.loop.mixed_precision, log_with="tensorboard", project_dir=run)
    vae = load_network(FoldedVideoVAE, Path(config.vae), torch.float32).eval().to(accelerator.device)
    vae.requires_grad_(False)
    clips = load_clips(config.data, cache / f"train-{config.action_frames}", drawn_size=_drawn_size(config))
    latents = encode_clips(vae, clips, cache / f"latents-{Path(config.vae).parent.name}")
    torch.manual_seed(config.loop.seed)
    transformer = ProphetTransformer(
        **preset(
            "tiny",
            latent_channels=vae.config.latent_channels,
            num_attention_heads=config.num_attention_heads,
            num_layers=config.num_layers,
            adaln_lora_dim=config.adaln_lora_dim,
            num_effectors=clips.actions.shape[2],
            action_frames=config.action_frames,
        )
    )
    if config.init is not None:
        source = load_network(ProphetTransformer, Path(config.init) / "transformer", torch.float32)
        try:
            transformer.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{config.init}: its denoiser has another architecture than this run ({error})") from error
    prophet_config = ProphetConfig(
        name=config.name,
        trained_on=config.trained_on or f"{len(clips)} episodes of {Path(config.data).name}",
        image_size=tuple(clips.frames.shape[2:4]),
        num_inference_steps=config.num_inference_steps,
        action_spec=clips.action_spec,
    )
    sampler = ChunkSampler(clips, latents, config, chunk_length=20, history=prophet_config.history_frames, vae=vae)
    accelerator.init_trackers("tensorboard")

    def loss_fn(model: Callable[..., Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        batch = sampler(step, config.loop.batch_size)
        return velocity_loss(model, transformer, batch, config, step)

    def evaluate_step(model: ProphetTransformer, step: int) -> dict[str, float]:
        world = ProphetWorldModel(model, vae, prophet_config)
        return evaluate(world, step) if evaluate is not None else {}

    transformer = train_loop(
        transformer, loss_fn, config.loop, run, accelerator=accelerator, resume=config.resume, evaluate=evaluate_step
    )
    accelerator.end_training()
    ProphetWorldModel(transformer.half(), vae.half(), prophet_config).save_pretrained(run / "prophet")
    return ProphetWorldModel.from_pretrained(run / "prophet")


def _drawn_size(config: WorldModelConfig) -> tuple[int, int] | None:
    """Size of the stored action frames: full for the codec, that of the cells where they are averaged anyway."""
    if config.action_frames == "none":
        return None
    height, width = EpisodeFolder(config.data)[0].frames.shape[1:3]
    if config.action_frames == "pooled":
        return height, width
    cells = ProphetTransformer.default_cells
    return height // 8 * cells, width // 8 * cells
