"""Training of the denoiser (``prophet train world-model``) on latents of recorded episodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..metrics.evaluate import evaluate_world_model
from ..world_model.presets import preset
from ..world_model.prophet import ProphetConfig, ProphetWorldModel, load_network, require_network
from ..world_model.transformer import ProphetTransformer
from ..world_model.video_vae import FoldedVideoVAE
from .chunks import ChunkSampler
from .clips import encode_clips, load_clips
from .config import ObjectiveConfig, WorldModelConfig
from .latent_colours import fit_latent_colours
from .loop import prepare_run, settled, train_loop
from .objective import velocity_loss
from .one_step import one_step_loss
from .self_rollout import SelfRollout

logger = logging.getLogger(__name__)


def validator(config: WorldModelConfig, count: int = 32) -> Callable[[ProphetWorldModel, int], dict[str, float]]:
    """Open-loop evaluation on the first ``count`` held-out episodes; strips and videos go to RUN/pictures.

    Episodes without poses start at the origin, where their commands lead on from; that is enough without action frames.

    Raises:
        ValueError: fewer than two episodes, or action frames are to be drawn and a camera or poses are missing.
    """
    episodes = replace(config.source, episodes=None).open(config.validation)[:count]
    if len(episodes) < 2:
        raise ValueError(f"{config.validation}: {len(episodes)} episode(s) to evaluate on; expected at least 2")
    blind = [e.name for e in episodes if e.camera is None or e.eef_pose is None]
    if blind and config.action_frames != "none":
        raise ValueError(
            f"{config.validation}: {len(blind)} of {len(episodes)} episodes have no camera or no poses ({blind[0]}), "
            f"and action_frames={config.action_frames!r} draws actions; validate on others, or train with "
            "action_frames='none'"
        )
    episodes = [episode.with_poses() for episode in episodes]
    steps = min(40, min(len(episode.actions) for episode in episodes))

    def evaluate(world: ProphetWorldModel, step: int) -> dict[str, float]:
        out = Path(config.run) / "pictures" / f"step_{step:06d}"
        return validation_numbers(evaluate_world_model(world, episodes, steps, batch_size=count, out=out))

    return evaluate


def validation_numbers(report: dict[str, Any]) -> dict[str, float]:
    """Figures for the log of a report of :func:`evaluate_world_model`, over all its episodes and frames."""
    tables = report["groups"]["all"]["horizons"][str(report["protocol"]["steps"])]
    names = ("psnr", "epe_mean", "cos_mean", "block_within", "block_lost")
    numbers = {f"validation_{name}": tables["predictors"]["model"][name]["value"] for name in names}
    return {**numbers, **{name: figure["value"] for name, figure in tables["against"].items()}}


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
        ValueError: bad data, no codec or checkpoint in the folder named, or an existing run without ``resume``.
    """
    run, cache = Path(config.run), Path(config.cache)
    require_network(Path(config.vae))
    if config.init is not None:
        require_network(Path(config.init) / "transformer")
    if evaluate is None and config.validation is not None:
        evaluate = validator(config)
    config = replace(config, loop=settled(config.loop))
    prepare_run(run, {k: v for k, v in asdict(config).items() if k != "resume"}, config.resume)
    accelerator = Accelerator(mixed_precision=config.loop.mixed_precision, log_with="tensorboard", project_dir=run)
    vae = load_network(FoldedVideoVAE, Path(config.vae), torch.float32).eval().to(accelerator.device)
    vae.requires_grad_(False)
    clips = load_clips(
        config.data,
        cache / f"train-{config.action_frames}",
        source=config.source,
        drawn_size=drawn_size(config.action_frames, config.source.open(config.data)[0].frames.shape[1:3]),
    )
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
            residual=config.residual,
            **({} if config.history else {"memory_levels": ()}),
        )
    )
    if config.init is not None:
        start_from(transformer, Path(config.init))
    prophet_config = ProphetConfig(
        name=config.name,
        trained_on=config.trained_on or f"{len(clips)} episodes of {Path(config.data).name}",
        image_size=tuple(clips.frames.shape[2:4]),
        num_inference_steps=config.num_inference_steps,
        action_spec=clips.action_spec,
        still_below=config.still_below,
    )
    sampler = ChunkSampler(clips, latents, config, chunk_length=20, history=prophet_config.history_frames, vae=vae)
    accelerator.init_trackers("tensorboard")
    loss_fn = chunk_loss(sampler, transformer, config)

    def evaluate_step(model: ProphetTransformer, step: int) -> dict[str, float]:
        world = ProphetWorldModel(model, vae, prophet_config)
        return evaluate(world, step) if evaluate is not None else {}

    transformer = train_loop(
        transformer, loss_fn, config.loop, run, accelerator=accelerator, resume=config.resume, evaluate=evaluate_step
    )
    accelerator.end_training()
    ProphetWorldModel(transformer.half(), vae.half(), prophet_config).save_pretrained(run / "prophet")
    return ProphetWorldModel.from_pretrained(run / "prophet")


def chunk_loss(
    sampler: ChunkSampler, transformer: ProphetTransformer, config: ObjectiveConfig
) -> Callable[[Callable[..., Tensor], int], tuple[Tensor, dict[str, float]]]:
    """The loss of a step, as :func:`train_loop` takes it, on recorded chunks and on those that follow imagined ones."""
    self_rollout = SelfRollout(sampler, transformer, sampler.vae, config)
    loss = velocity_loss if config.objective == "velocity" else one_step_loss
    if config.colour_weight > 0:
        loss = partial(one_step_loss, colours=fit_latent_colours(sampler.clips, sampler.latents))

    def loss_fn(model: Callable[..., Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        batch = (self_rollout if self_rollout.due(step) else sampler)(step, config.loop.batch_size)
        return loss(model, transformer, batch, config, step)

    return loss_fn


def start_from(transformer: ProphetTransformer, checkpoint: Path) -> None:
    """Copy the denoiser of a checkpoint; of a deeper one, evenly spaced blocks (the first and the last among them).

    Where the new one draws no action frames or remembers nothing, that part of the checkpoint is left out. A warning
    says where only one of both is ``residual``: such weights have to learn anew what they are given and asked for.

    Raises:
        ValueError: not a checkpoint, or another architecture.
    """
    source = load_network(ProphetTransformer, checkpoint / "transformer", torch.float32)
    blocks, wanted = source.transformer_blocks, len(transformer.transformer_blocks)
    if len(blocks) > wanted:
        kept = torch.linspace(0, len(blocks) - 1, wanted).round().int().tolist()
        source.transformer_blocks = torch.nn.ModuleList([blocks[i] for i in kept])
    if source.config.residual != transformer.config.residual:
        logger.warning(
            "%s: its denoiser has residual=%s, this run residual=%s; give the same to go on where it ended",
            checkpoint, source.config.residual, transformer.config.residual,
        )  # fmt: skip
    if transformer.action_frame_stream is None:
        source.action_frame_stream = None
    if not transformer.memory.levels:
        source.memory.projections = torch.nn.ModuleList()
    try:
        transformer.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: its denoiser has another architecture than this run ({error})") from error


def drawn_size(
    action_frames: str, image_size: tuple[int, int], cells: int = ProphetTransformer.default_cells
) -> tuple[int, int] | None:
    """Size of the stored action frames: full for the codec, that of the cells where they are averaged anyway."""
    if action_frames == "none":
        return None
    height, width = image_size
    return (height, width) if action_frames == "pooled" else (height // 8 * cells, width // 8 * cells)
