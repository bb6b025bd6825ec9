"""Few-shot adaptation (``prophet adapt``): a pretrained world and a few episodes become a new environment.

Paper 3.2.5 and 4.1: LoRA of rank 16 in the backbone, everything that Prophet adds in full, the codec as it is. Audit,
split, training with an eye on held-out episodes, then one self-contained folder for ``gym.make("Prophet-Custom-v0",
checkpoint=FOLDER)``. Where the data lack cameras, the new world draws no action frames and needs none: its denoiser
loses that stream. Where the base has its memory's gate closed (Cosmos backbones), the gate opens during the run. Where
the codec is a small one that cannot draw the new images, its decoder can be trained first; the paper's has no need.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..atomic import atomic_folder, atomic_text
from ..audit import audit, format_audit
from ..data.episode import Episode
from ..metrics.evaluate import evaluate_world_model
from ..registration import ASSETS
from ..strict_json import to_json
from ..weights import locate_weights
from ..world_model.lora import add_lora, load_adapter, merge_adapter
from ..world_model.prophet import ProphetConfig, ProphetWorldModel
from ..world_model.tensor_files import list_tensors
from ..world_model.transformer import ProphetTransformer
from .adapt_codec import codec_limits, take_decoder, train_decoder, warn_of_the_codec
from .adapt_config import AdaptConfig
from .adapt_data import Split, draws_actions, evaluation_windows, first_frames, split_data
from .best import BestAdapter
from .chunks import ChunkSampler
from .clips import encode_clips, load_clips
from .config import ObjectiveConfig
from .loop import prepare_run, settled, train_loop
from .model_card import model_card
from .world_model import chunk_loss, drawn_size, validation_numbers

__all__ = ["adapt", "memory_gate"]

logger = logging.getLogger(__name__)

AUDITED = 50  # episodes, from the first
CODEC_CLIPS = 8  # that the codec alone is measured on
_CASTS = {"F32": "float", "F16": "half", "BF16": "bfloat16"}  # methods of a network by the format of its file


def adapt(config: AdaptConfig) -> dict[str, Any]:
    """Adapt a world to a data set and write the new environment to ``config.out``.

    Returns:
        ``step`` of the best weights, ``metrics`` of the result, ``before``, of the base on the same clips (both as of
        :func:`prophet_gym.metrics.evaluate_world_model`), and ``codec``, the limits that its codec sets (as of
        :func:`prophet_gym.training.adapt_codec.codec_limits`).

    Raises:
        ValueError: the folder exists, the base is none, the audit finds faults, the data do not suffice or fit, or an
            existing run without ``resume``.
        FloatingPointError: loss or gradient are not finite; ``resume`` starts from the last checkpoint.
    """
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; give another folder for the new environment")
    folder = locate_weights(config.base, ASSETS, "prophet.json")
    if config.keep_judge and not (folder / "judge").is_dir():
        raise ValueError(f"{config.base} has no judge/; leave --keep-judge out")
    config = replace(config, loop=settled(config.loop))
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    prepare_run(config.run_folder, settings, config.resume)
    base = ProphetWorldModel.from_pretrained(folder)
    split = split_data(config, base.image_size, base.chunk_length, base.config.history_frames)
    if split.action_spec.num_effectors > base.num_effectors:
        raise ValueError(
            f"{config.data}: commands of {split.action_spec.num_effectors} end-effectors, the base drives at most "
            f"{base.num_effectors}; expected a base with as many"
        )
    if split.action_spec.delta != base.action_spec.delta:
        logger.warning(
            "the base knows %r deltas, the data have %r ones: it learns anew what commands mean, so expect to need "
            "more episodes", base.action_spec.delta, split.action_spec.delta,
        )  # fmt: skip
    draws = draws_actions(config, split, base.requires_camera)
    data = f"{split.num_training} episodes of {config.data.resolve().name}"
    warnings = _audited(config, split)
    prophet_config = replace(
        base.config,
        name=config.world_name,
        trained_on=f"{base.config.trained_on}; adapted to {data}",
        action_spec=split.action_spec,
    )
    windows = evaluation_windows(config, split, base.image_size)
    decoder = None
    if config.decoder_steps:
        decoder = train_decoder(config, base.codec, folder / "vae", split.source)
        take_decoder(base, decoder)
    before, limits, best = _train(config, base, prophet_config, split, windows, draws)
    if best.record["step"] == 0:
        trained_on = f"{base.config.trained_on}; adaptation to {data} did not improve it"
        prophet_config = replace(prophet_config, trained_on=trained_on)
    with atomic_folder(config.out) as out:
        _write_world(folder, decoder, best, prophet_config, draws, out)
        first_frames(split, base.image_size).save(out / "snapshots")
        if config.keep_adapter:
            shutil.copytree(best.folder, out / "adapter")
        if config.keep_judge:
            shutil.copytree(folder / "judge", out / "judge")
        world = ProphetWorldModel.from_pretrained(out, device=base.device)
        world.checkpoint_info["source"] = config.out.name
        measured = _evaluate(world, windows, config, out / "evaluation")
        (out / "README.md").write_text(
            model_card(
                config, base.config, prophet_config, split, best.record, measured, before, limits, warnings, draws
            )
        )
    return {"step": best.record["step"], "metrics": measured, "before": before, "codec": limits}


def memory_gate(step: int, config: AdaptConfig, initial: float) -> float:
    """Gate of the memory at a step: from its initial value linearly to 1 over ``gate_fraction`` of the run."""
    duration = config.gate_fraction * config.loop.steps
    return 1.0 if step >= duration else initial + (1.0 - initial) * step / duration


def without_action_frames(transformer: ProphetTransformer) -> None:
    """Take the action-frame stream out, in place: what is left is the network that ``action_frames=None`` runs."""
    transformer.action_frame_stream = None
    transformer.register_to_config(action_frames="none")


def _audited(config: AdaptConfig, split: Split) -> list[str]:
    """Findings of the audit, in words.

    Raises:
        ValueError: there are faults, and they are not to be ignored.
    """
    report = audit(split.episodes, limit=AUDITED)
    logger.info("%s", format_audit(report))
    if report.exit_code and not config.ignore_faults:
        faults = [f"{f.check}: {f.message}" for f in report.findings if f.level == "fault"]
        raise ValueError(
            f"{config.data}: the audit finds {len(faults)} fault(s): {'; '.join(faults)}. Mend the data or their card; "
            "--ignore-faults goes on all the same"
        )
    return [f"{finding.level}, {finding.check}: {finding.message}" for finding in report.findings]


def _train(
    config: AdaptConfig,
    base: ProphetWorldModel,
    prophet_config: ProphetConfig,
    split: Split,
    windows: list[Episode],
    draws: bool,
) -> tuple[dict[str, Any], dict[str, float], BestAdapter]:
    """Train the adapter; returns the report of the base before training, the codec's limits, and the best weights."""
    run = config.run_folder
    accelerator = Accelerator(mixed_precision=config.loop.mixed_precision, log_with="tensorboard", project_dir=run)
    accelerator.init_trackers("tensorboard")
    transformer, vae = base.transformer, base.codec.vae.requires_grad_(False).to(accelerator.device)
    if base.requires_camera and not draws:
        without_action_frames(transformer)
    limits = codec_limits(base.codec, windows[:CODEC_CLIPS])
    warn_of_the_codec(config, limits)
    objective = _objective(config, base, transformer)
    clips = load_clips(
        config.data,
        run / "clips",
        source=split.source,
        num_effectors=base.num_effectors,
        drawn_size=drawn_size(objective.action_frames, base.image_size, int(transformer.config.action_frame_cells)),
    )
    latents = encode_clips(vae, clips, run / "latents")
    sampler = ChunkSampler(
        clips,
        latents,
        objective,
        chunk_length=base.chunk_length,
        history=base.config.history_frames,
        vae=vae,
    )
    initial_gate = float(transformer.config.memory_gate)
    add_lora(transformer.to(accelerator.device), rank=config.rank, alpha=config.rank, seed=config.loop.seed)
    going_on = config.resume and (run / "checkpoints" / "last.pt").exists()
    best = BestAdapter(run, config.patience * config.loop.eval_every, resume=going_on)
    loss_of = chunk_loss(sampler, transformer, objective)

    def set_gate(step: int) -> float:
        gate = memory_gate(step, config, initial_gate)
        transformer.register_to_config(memory_gate=gate)
        return gate

    def loss_fn(model: Callable[..., Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        gate = set_gate(step)
        loss, numbers = loss_of(model, step)
        return loss, {**numbers, "memory_gate": gate}

    def measure(step: int) -> tuple[dict[str, Any], dict[str, float]]:
        world = ProphetWorldModel(transformer, vae, prophet_config)
        report = _evaluate(world, windows, config, run / "pictures" / f"step_{step:06d}")
        numbers = validation_numbers(report)
        epe = numbers["validation_epe_mean"]
        kept = best.offer(transformer, step, epe)
        logger.info("step %d: EPE on held-out clips %.4f px%s", step, epe, ", the best so far" if kept else "")
        return report, numbers

    def measure_trained(_: ProphetTransformer, step: int) -> dict[str, float]:
        gate = set_gate(step)
        return {**measure(step)[1], "memory_gate": gate}

    before_file = run / "before.json"
    if going_on:
        before = json.loads(before_file.read_text())
    else:
        before = measure(0)[0]
        atomic_text(before_file, to_json(before))
    train_loop(
        transformer,
        loss_fn,
        config.loop,
        run,
        accelerator=accelerator,
        resume=config.resume,
        evaluate=measure_trained,
        stop=best.exhausted,
    )
    accelerator.end_training()
    return before, limits, best


def _objective(config: AdaptConfig, base: ProphetWorldModel, transformer: ProphetTransformer) -> ObjectiveConfig:
    steps = base.config.num_inference_steps
    first_step = config.first_step
    if first_step is None:  # a world that samples in a step or two spends half of its life at pure noise
        first_step = 0.5 if steps <= 2 else 0.0
    return ObjectiveConfig(
        action_frames=transformer.config.action_frames,
        self_rollout=config.self_rollout,
        first_step=first_step,
        object_weight=config.object_weight,
        num_inference_steps=steps,
        loop=config.loop,
    )


def _evaluate(world: ProphetWorldModel, windows: list[Episode], config: AdaptConfig, out: Path) -> dict[str, Any]:
    return evaluate_world_model(
        world, windows, len(windows[0]), batch_size=config.loop.batch_size, seed=config.loop.seed, out=out
    )


def _write_world(
    folder: Path, decoder: Path | None, best: BestAdapter, prophet_config: ProphetConfig, draws: bool, out: Path
) -> None:
    """Base and best adapter, merged, in the base's number format."""
    fresh = ProphetWorldModel.from_pretrained(folder)
    if decoder is not None:
        take_decoder(fresh, decoder)
    transformer, vae = fresh.transformer, fresh.codec.vae
    if fresh.requires_camera and not draws:
        without_action_frames(transformer)
    load_adapter(transformer, best.folder)
    merge_adapter(transformer)
    transformer.register_to_config(memory_gate=best.record["memory_gate"])
    for name, network in (("transformer", transformer), ("vae", vae)):
        getattr(network, _CASTS[next(iter(list_tensors(folder / name).values())).dtype])()
    ProphetWorldModel(transformer, vae, prophet_config).save_pretrained(out)
