"""The training loop shared by codec, world model and their fine-tuning: steps, logs, checkpoints, resume.

Randomness is stateless: step i draws from generators seeded with (seed, i), so that a resumed run sees the batches and
the noise that the interrupted run would have seen and ends with the same bits on the CPU. A checkpoint holds whole
tensors, however many processes trained and whether they shared the parameters out.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ..atomic import atomic_text
from ..devices import fast_dtype
from ..strict_json import to_json
from .parallel import gathered, keep_gradients, shard_as, shard_optimizer_state

_PLACES = ("run", "out", "cache")  # settings that say where files go: they change nothing of what is learned


@dataclass(frozen=True)
class LoopConfig:
    """Optimisation and bookkeeping of one run."""

    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 32
    """Samples of a step and process."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.0
    """Learning rate of Muon for the weight matrices of the transformer blocks; 0 trains everything with AdamW."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 200
    """Linear warm-up."""
    decay_fraction: float = 0.3
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved."""
    seed: int = 0
    """Seed of initialisation, batches and noise."""
    mixed_precision: str = "auto"
    """"no", "bf16" (accelerate), or "auto": bf16 where the hardware multiplies it; emulated, it takes three times as
    long as float32. fp16 would need a loss scaler, which two optimisers cannot share."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two checkpoints."""
    eval_every: int = 2000
    """Steps between two evaluations; 0 evaluates at the end alone."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch_size", "log_every", "save_every"), 1)
        for name, least in {**counts, "eval_every": 0, "warmup_steps": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        for name in ("learning_rate", "muon_learning_rate", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number of at least 0")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip={self.grad_clip}: expected a norm above 0")
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(f'mixed_precision={self.mixed_precision!r}: expected "auto", "no" or "bf16"')
        for name in ("decay_fraction", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")

    def learning_rate_factor(self, step: int) -> float:
        """Trapezoid: linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay_steps = max(1, round(self.decay_fraction * self.steps))
        return min(warm, max(0.0, (self.steps - step) / decay_steps), 1.0)


def settled(loop: LoopConfig) -> LoopConfig:
    """Returns the configuration with the precision that runs here for "auto": what a run stores, and goes on with."""
    if loop.mixed_precision != "auto":
        return loop
    found = fast_dtype(PartialState().device)
    return replace(loop, mixed_precision="bf16" if found == "bfloat16" else "no")


def atomic_save(values: dict[str, Any], path: Path) -> None:
    """``torch.save`` through a temporary file: a killed run leaves the previous file usable."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(values, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`atomic_save` wrote, to the CPU.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        values: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is missing or damaged ({reason}); put a whole copy in its place, or start again in an empty folder"
        ) from error
    return values


def prepare_run(run: Path, config: dict[str, Any], resume: bool) -> None:
    """Create the run folder and store its configuration.

    A run that was interrupted before its first checkpoint can be started again in its folder, also with other settings.

    Raises:
        ValueError: the folder holds a run and ``resume`` is off, or another one's or a damaged ``config.json``, or the
            settings to resume with differ in more than where files go.
    """
    checkpoint, stored = run / "checkpoints" / "last.pt", run / "config.json"
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; expected a folder for the run")
    if checkpoint.exists() and not resume:
        raise ValueError(f"{run}: already holds a run; give --resume to continue it, or another folder")
    if resume and not stored.exists():
        raise ValueError(f"{run}: nothing to resume; leave --resume out")
    text = json.dumps(config, indent=1, default=str) + "\n"
    if stored.exists():
        _require_same_run(stored, json.loads(text), checkpoint.exists())
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    atomic_text(stored, text)


def _require_same_run(stored: Path, config: dict[str, Any], trained: bool) -> None:
    """Without a checkpoint the same command will do, which is known by the names of its settings."""
    try:
        known = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{stored} is not valid JSON ({error}); restore it, or give an empty folder") from error
    if not isinstance(known, dict) or (not trained and known.keys() != config.keys()):
        raise ValueError(f"{stored} is not the configuration of such a run; give an empty folder")
    old, new = (_flat({key: value for key, value in of.items() if key not in _PLACES}) for of in (known, config))
    differing = [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]
    if trained and differing:
        raise ValueError(
            f"{stored.parent}: the stored config.json differs from this one, stored -> given: {', '.join(differing)}; "
            "resume with the same settings"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as JSON text, by their names with dots, such as ``loop.steps``."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: json.dumps(value)}
    return flat


def forget_after(metrics: Path, step: int) -> bool:
    """Drop the lines of ``metrics.jsonl`` beyond ``step``, which a resumed run writes again, and a torn last one.

    Returns:
        Whether a line with an evaluation of ``step`` is left.
    """
    if not metrics.exists():
        return False
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = [line for line in whole if json.loads(line)["step"] <= step]
    temporary = metrics.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(metrics)
    return any(values["step"] == step and "loss" not in values for values in map(json.loads, lines))


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of ``transformer_blocks`` and AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            use_muon = config.muon_learning_rate > 0 and parameter.ndim == 2 and "transformer_blocks" in name
            (matrices if use_muon else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
        )
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def train_loop(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, int], tuple[Tensor, dict[str, float]]],
    config: LoopConfig,
    run: Path,
    *,
    accelerator: Accelerator,
    resume: bool = False,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    accumulation: int = 1,
) -> nn.Module:
    """Train ``model`` and return it with its averaged (EMA) weights.

    Parameters that require no gradient stay as they are; they are neither averaged nor stored in checkpoints.

    Args:
        model: the network.
        loss_fn: maps (wrapped model, micro-batch) to the loss and numbers to log; all its randomness follows from the
            number of the micro-batch, which is that of the step where there is one a step.
        config: optimisation and bookkeeping.
        run: run folder; gets ``metrics.jsonl`` and ``checkpoints/last.pt``, which holds the seconds of all sessions.
        accelerator: devices, mixed precision, gradient scaling.
        resume: continue from ``checkpoints/last.pt``.
        evaluate: called with the averaged model and the step; its numbers are logged.
        stop: asked after each evaluation but the last, also of a resumed run at one; True ends the run there.
        progress: show a bar with the remaining time.
        wrap: puts the model on the devices of all processes (:func:`.parallel.distribute`); by default there is one.
        accumulation: micro-batches of a step, whose gradients are averaged.

    Raises:
        FloatingPointError: loss or gradient are not finite; the last checkpoint stays usable.
        ValueError: several processes without ``wrap``, or a checkpoint that is damaged or of other settings.
    """
    if accelerator.num_processes > 1 and wrap is None:
        raise ValueError(
            f"{accelerator.num_processes} processes; this run takes one device, start it without a launcher "
            "(`prophet train pretrain` takes many)"
        )
    path = run / "checkpoints" / "last.pt"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    saved: dict[str, Any] = {}
    if resume and path.exists():
        saved = load_checkpoint(path)
        _load_trained(model, saved["model"], frozen, path)
    wrapped = accelerator.prepare_model(model) if wrap is None else wrap(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = build_optimizers(model, config)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    ema = EMAModel(trained, decay=config.ema_decay, use_ema_warmup=True, power=3 / 4)
    start = saved.get("step", 0)
    began = time.monotonic() - saved.get("seconds", 0.0)  # as if earlier sessions had ended just now
    if saved:
        averages = [shard_as(value, p) for value, p in zip(saved["ema"]["shadow_params"], trained, strict=True)]
        ema.load_state_dict({**saved["ema"], "shadow_params": averages})
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
        saved.clear()
    known = accelerator.is_main_process and forget_after(run / "metrics.jsonl", start)
    ema.to(accelerator.device)

    def save(step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        tensors = {name: value for name, value in model.state_dict().items() if name not in frozen}
        whole = gathered({"step": step, "model": tensors, "ema": ema.state_dict(), "optimizers": states})
        if accelerator.is_main_process:
            atomic_save({**whole, "seconds": time.monotonic() - began}, path)

    def evaluate_averages(step: int) -> None:
        if evaluate is not None:
            ema.store(trained)
            ema.copy_to(trained)
            model.eval()
            _log(run, accelerator, {"step": step, **evaluate(model, step)})
            ema.restore(trained)

    def due(step: int) -> bool:
        return evaluate is not None and config.eval_every > 0 and step % config.eval_every == 0 and step < config.steps

    ended = False
    if start and due(start):  # the run was killed in or after the evaluation that follows its last checkpoint
        if not known:
            evaluate_averages(start)
        ended = stop is not None and stop()
    bar = tqdm(
        range(config.steps if ended else start, config.steps),
        initial=start,
        total=config.steps,
        disable=not (progress and accelerator.is_main_process),
        mininterval=5.0,
    )
    clock, seen = time.monotonic(), start
    for step in bar:
        factor = config.learning_rate_factor(step)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = rate * factor
        model.train()
        parts = []
        for micro in range(step * accumulation, (step + 1) * accumulation):
            last = micro == (step + 1) * accumulation - 1
            with nullcontext() if last else keep_gradients(wrapped):
                with accelerator.autocast():
                    loss, numbers = loss_fn(wrapped, micro)
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"loss {loss.item()} at step {step}; the last checkpoint is {path}")
                accelerator.backward(loss / accumulation)
            parts.append({"loss": loss.item(), **numbers})
        norm = float(gathered(accelerator.clip_grad_norm_(trained, config.grad_clip)))  # the same in all processes
        if not math.isfinite(norm):  # a step would spoil the weights, and the next checkpoint with them
            raise FloatingPointError(f"gradient of norm {norm} at step {step}; the last checkpoint is {path}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.step(trained)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            now = time.monotonic()
            samples = (done - seen) * accumulation * accelerator.num_processes * config.batch_size
            means = _means(parts, accelerator)
            line = {
                "step": done,
                "loss": means.pop("loss"),
                "grad_norm": norm,
                "lr_factor": factor,
                "samples_per_second": samples / (now - clock),
                **means,
            }
            clock, seen = now, done
            _log(run, accelerator, line)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
        if done % config.save_every == 0 or done == config.steps:
            save(done)
        if due(done):
            evaluate_averages(done)
            clock, seen = time.monotonic(), done
            if stop is not None and stop():
                ended = True
                break
    if wrap is None:
        model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    ema.copy_to(trained)
    model.eval()
    if evaluate is not None and not ended and not (known and start == config.steps):
        _log(run, accelerator, {"step": config.steps, **evaluate(model, config.steps)})
    return model


def _load_trained(model: nn.Module, tensors: dict[str, Tensor], frozen: set[str], path: Path) -> None:
    """Load a checkpoint that lacks what is frozen; runs of earlier versions hold that, too."""
    report = model.load_state_dict(tensors, strict=False)
    missing = sorted(set(report.missing_keys) - frozen)
    if missing or report.unexpected_keys:
        raise ValueError(f"{path}: missing {missing}, unknown {report.unexpected_keys}; resume with the same settings")


def _means(parts: list[dict[str, float]], accelerator: Accelerator) -> dict[str, float]:
    """Mean of each number over the micro-batches of a step that have it, and over processes, which have the same."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    values = [[part[name] for part in parts if name in part] for name in names]
    means = [sum(known) / len(known) for known in values]
    if accelerator.num_processes > 1:
        means = accelerator.reduce(torch.tensor(means, device=accelerator.device), "mean").tolist()
    return dict(zip(names, means, strict=True))


def _log(run: Path, accelerator: Accelerator, line: dict[str, float]) -> None:
    if accelerator.is_main_process:
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(to_json(line, indent=None))
        numbers = {k: v for k, v in line.items() if k != "step" and v is not None}
        accelerator.log(numbers, step=int(line["step"]))
