"""Pretraining of the denoiser on a mixture of data sets (``prophet train pretrain``; paper 4.1.1).

Every micro-batch comes from one data set, at its resolution and with its conditioning: action frames where cameras are
calibrated, the scalar stream alone elsewhere. Sample j of a micro-batch draws from generators seeded with (seed,
micro-batch, j), whichever process has it: W processes with B chunks each see what one process with W * B would.

Departures from the paper: the loss is Cosmos-Predict2's velocity loss; chunk lengths vary; cross-attention is not
learned without text, as its gradient is zero; the memory's gate opens during the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from ..registration import ASSETS
from ..weights import locate_weights
from ..world_model.presets import preset
from ..world_model.prophet import ProphetConfig, ProphetWorldModel, load_network
from ..world_model.transformer import ProphetTransformer
from ..world_model.video_vae import FoldedVideoVAE
from .chunks import ChunkBatch, ChunkSampler
from .clips import encode_clips, load_clips
from .loop import prepare_run, train_loop
from .mixture import OpenedDataset, draw_dataset, open_mixture, read_mixture
from .objective import ChunkDenoiser, ChunkNoise, mean_velocity_error
from .parallel import distribute, gathered, start_processes
from .pretrain_config import PretrainConfig
from .world_model import drawn_size

__all__ = ["MixtureSampler", "learn_what_is_used", "pretrain", "starting_configs", "starting_point"]

logger = logging.getLogger(__name__)

_CODECS = {"FoldedVideoVAE": (FoldedVideoVAE, "latent_channels"), "AutoencoderKLWan": (AutoencoderKLWan, "z_dim")}
"""Class of a codec and its name for the number of latent channels, by the class that ``config.json`` names."""


class MixtureSampler:
    """Draws micro-batches of a mixture; micro-batch i is a function of (seed, i).

    Args:
        samplers: one for each data set, all of the same objective but for the action frames.
        shares: probability of each.
        device: of the denoiser.
    """

    def __init__(self, samplers: list[ChunkSampler], shares: np.ndarray, device: torch.device) -> None:
        self.samplers, self.shares, self.device = samplers, shares, device
        self.seed = samplers[0].config.loop.seed

    def __call__(self, micro_batch: int, first: int, count: int) -> tuple[int, ChunkBatch, ChunkNoise]:
        """Samples ``first`` to ``first + count`` of a micro-batch: the data set, its chunks, and noise for them."""
        index = draw_dataset(self.shares, self.seed, micro_batch)
        sampler = self.samplers[index]
        length = sampler.draw_length(np.random.default_rng([self.seed, 12, micro_batch]))
        samples = range(first, first + count)
        placed = [sampler.place(np.random.default_rng([self.seed, 13, micro_batch, j]), 1, length) for j in samples]
        episodes, starts, waiting, age = (np.concatenate(values) for values in zip(*placed, strict=True))
        batch = sampler.gather(episodes, starts, length, waiting, age)
        latents, history = (torch.Size((1, *tensor.shape[1:])) for tensor in (batch.latents, batch.history))
        noise = []
        for j in samples:
            words = np.random.SeedSequence([self.seed, 14, micro_batch, j]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0] >> 1))
            noise.append(ChunkNoise.draw(latents, history, sampler.config, generator))
        return index, batch, ChunkNoise.joined(noise)


def starting_configs(config: PretrainConfig, num_effectors: int) -> tuple[dict[str, Any], Any, dict[str, Any], int]:
    """What a run starts from, without its weights.

    Returns:
        Keyword arguments of the denoiser, class and configuration of the codec, and frames of the history.

    Raises:
        ValueError: no such checkpoint or codec, or a codec of another class.
    """
    if config.base is not None:
        folder = locate_weights(config.base, ASSETS, "prophet.json")
        denoiser = json.loads((folder / "transformer" / "config.json").read_text())
        codec_folder = folder / "vae"
        history = ProphetConfig.from_dict(json.loads((folder / "prophet.json").read_text())).history_frames
    else:
        codec_folder, history = Path(config.vae or ""), ProphetConfig().history_frames
    if not (codec_folder / "config.json").is_file():
        raise ValueError(f"{codec_folder}: no config.json; expected a codec, as `prophet train vae` leaves in RUN/vae")
    codec = json.loads((codec_folder / "config.json").read_text())
    kind = codec.get("_class_name")
    if kind not in _CODECS:
        raise ValueError(
            f"{codec_folder}: a network of class {kind!r}; expected a codec, {' or '.join(_CODECS)}: give the folder "
            "that `prophet train vae` leaves in RUN/vae, or that of a Wan 2.1 VAE"
        )
    codec_class, channels = _CODECS[kind]
    if config.base is None:
        denoiser = preset(
            "tiny",
            latent_channels=codec[channels],
            num_attention_heads=config.num_attention_heads,
            num_layers=config.num_layers,
            adaln_lora_dim=config.adaln_lora_dim,
            num_effectors=num_effectors,
            action_frames=config.action_frames,
        )
    with torch.device("meta"):  # fills defaults in
        denoiser = dict(ProphetTransformer.from_config(denoiser).config)
    return {key: value for key, value in denoiser.items() if not key.startswith("_")}, codec_class, codec, history


def starting_point(config: PretrainConfig, num_effectors: int) -> tuple[ProphetTransformer, Any, ProphetConfig]:
    """Denoiser, codec and configuration that a run starts from: those of its base, or fresh ones beside a codec.

    Raises:
        ValueError: no such checkpoint or codec.
    """
    if config.base is not None:
        world = ProphetWorldModel.from_pretrained(locate_weights(config.base, ASSETS, "prophet.json"))
        return world.transformer, world.codec.vae, world.config
    denoiser, codec_class, _, history = starting_configs(config, num_effectors)
    vae = load_network(codec_class, Path(config.vae or ""), torch.float32).eval()
    torch.manual_seed(config.seed)
    return ProphetTransformer(**denoiser), vae, ProphetConfig(history_frames=history)


def pretrain(config: PretrainConfig) -> Path:
    """Train on a mixture and save the result to RUN/prophet.

    Its ``prophet.json`` names the image size and the conventions of the mixture's first data set: what the world runs
    with until it is adapted to a robot.

    Returns:
        The checkpoint.

    Raises:
        ValueError: a bad mixture, bad data, or an existing run without ``resume``.
        FloatingPointError: loss or gradient are not finite; ``resume`` starts from the last checkpoint.
    """
    run = Path(config.run)
    mixture = read_mixture(config.mixture)
    accelerator = start_processes(config.mixed_precision, run)
    if accelerator.is_main_process:
        settings = {key: value for key, value in asdict(config).items() if key != "resume"}
        shared = {"datasets": asdict(mixture), "processes": accelerator.num_processes}  # a step has chunks of each
        prepare_run(run, {**settings, **shared}, config.resume)
    accelerator.wait_for_everyone()
    effectors = max(dataset.source.open(dataset.path)[0].action_spec.num_effectors for dataset in mixture.datasets)
    transformer, vae, prophet_config = starting_point(config, effectors)
    opened = open_mixture(
        mixture,
        chunk_length=transformer.config.chunk_length,
        num_effectors=transformer.config.num_effectors,
        action_frames=transformer.config.action_frames,
    )
    _warn_of_deltas(opened)
    clips = [dataset.clips for dataset in opened]
    steps = config.steps(sum(clips), accelerator.num_processes)
    vae.requires_grad_(False).to(accelerator.device)
    if config.mixed_precision == "bf16" and not isinstance(vae, FoldedVideoVAE):
        vae.to(dtype=torch.bfloat16)  # it encodes every micro-batch, and the denoiser reads half precision anyway
    samplers = _samplers(config, opened, transformer, vae, prophet_config, steps, accelerator)
    sampler = MixtureSampler(samplers, mixture.shares(clips), accelerator.device)
    first = opened[0]
    sizes = ", ".join(f"{dataset.dataset.name} ({dataset.clips} clips)" for dataset in opened)
    prophet_config = replace(
        prophet_config,
        name=config.name,
        trained_on=f"a mixture of {sizes}" + (f", from {prophet_config.name}" if config.base else ""),
        image_size=first.image_size,
        action_spec=first.first.action_spec,
    )
    learn_what_is_used(transformer, any(dataset.draws for dataset in opened))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    varies = len({dataset.draws for dataset in opened}) > 1
    accelerator.init_trackers("tensorboard")
    trained = train_loop(
        transformer,
        _loss(config, sampler, opened, transformer, steps, accelerator),
        samplers[0].config.loop,
        run,
        accelerator=accelerator,
        resume=config.resume,
        wrap=lambda model: distribute(ChunkDenoiser(model), accelerator, config.parallel, varies=varies),
        accumulation=config.accumulation,
    )
    trained.register_to_config(memory_gate=1.0)  # a run that is resumed behind its last step has not opened it
    weights = gathered(trained.state_dict())  # shards of all processes
    if accelerator.is_main_process:
        _save(weights, trained, vae, prophet_config, run / "prophet")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the processes part here
    return run / "prophet"


def learn_what_is_used(transformer: ProphetTransformer, draws: bool) -> None:
    """Freeze what no batch of the run uses: cross-attention without text, and an idle stream of action frames.

    Their gradients would be zero; so they need no optimiser state either.
    """
    for name, parameter in transformer.named_parameters():
        idle = ".attn2." in name or ".norm2." in name or (name.startswith("action_frame_stream.") and not draws)
        parameter.requires_grad_(not idle)


def _samplers(
    config: PretrainConfig,
    opened: list[OpenedDataset],
    transformer: ProphetTransformer,
    vae: Any,
    prophet_config: ProphetConfig,
    steps: int,
    accelerator: Accelerator,
) -> list[ChunkSampler]:
    """Decode and encode every data set once, in the process whose turn it is, and open all of them."""
    kind = transformer.config.action_frames

    def load(dataset: OpenedDataset) -> tuple[Any, Any]:
        folder = Path(config.cache) / dataset.dataset.name
        frames = kind if dataset.draws else "none"
        clips = load_clips(
            dataset.dataset.path,
            folder / f"clips-{frames}",
            source=dataset.dataset.source,
            num_effectors=transformer.config.num_effectors,
            drawn_size=drawn_size(frames, dataset.image_size, int(transformer.config.action_frame_cells)),
        )
        return clips, encode_clips(vae, clips, folder / "latents")

    for i, dataset in enumerate(opened):
        height, width = dataset.image_size
        transformer.memory.check(prophet_config.history_frames // 4, (height // 8, width // 8))
        if i % accelerator.num_processes == accelerator.process_index:
            load(dataset)
    accelerator.wait_for_everyone()
    samplers = []
    for dataset in opened:
        objective = config.objective(kind if dataset.draws else "none", steps)
        clips, latents = load(dataset)
        samplers.append(
            ChunkSampler(
                clips,
                latents,
                objective,
                chunk_length=transformer.config.chunk_length,
                history=prophet_config.history_frames,
                vae=vae,
            )
        )
    return samplers


def _loss(
    config: PretrainConfig,
    sampler: MixtureSampler,
    opened: list[OpenedDataset],
    transformer: ProphetTransformer,
    steps: int,
    accelerator: Accelerator,
) -> Callable[[nn.Module, int], tuple[Tensor, dict[str, float]]]:
    """The loss of a micro-batch, as :func:`train_loop` takes it: of this process's share."""
    initial_gate = float(transformer.config.memory_gate)
    opening = max(1.0, config.gate_fraction * steps)

    def loss_fn(model: nn.Module, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        done = micro_batch // config.accumulation + 1  # never 0: a closed gate gives the memory no gradient
        gate = initial_gate + (1.0 - initial_gate) * min(1.0, done / opening)
        transformer.register_to_config(memory_gate=gate)
        first = accelerator.process_index * config.batch_size
        index, batch, noise = sampler(micro_batch, first, config.batch_size)
        loss = mean_velocity_error(model, batch, noise, sampler.device)
        return loss, {f"loss_{opened[index].dataset.name}": loss.item(), "memory_gate": gate}

    return loss_fn


def _warn_of_deltas(opened: list[OpenedDataset]) -> None:
    deltas = {dataset.dataset.name: dataset.first.action_spec.delta for dataset in opened}
    if len(set(deltas.values())) > 1:
        logger.warning(
            "commands mean different things in this mixture (%s): the denoiser must tell from the images which",
            ", ".join(f"{name}: {delta!r}" for name, delta in deltas.items()),
        )


def _save(
    weights: dict[str, Tensor], trained: ProphetTransformer, vae: Any, prophet_config: ProphetConfig, folder: Path
) -> None:
    with torch.device("meta"):
        transformer = ProphetTransformer.from_config(trained.config)
    transformer.load_state_dict(weights, assign=True)
    half = torch.float16 if isinstance(vae, FoldedVideoVAE) else torch.bfloat16
    ProphetWorldModel(transformer.to(half), vae.to(half), prophet_config).save_pretrained(folder)
