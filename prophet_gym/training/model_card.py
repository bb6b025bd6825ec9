"""The model card of an adapted world: what it is made of, how it measures, and what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..metrics.report import AGAINST, LABELS
from ..world_model.prophet import ProphetConfig
from .adapt_config import AdaptConfig, adaptation_loop
from .adapt_data import Split

_COLUMNS = ("psnr", "ssim", "epe_mean", "cos_mean")


def adapt_command(config: AdaptConfig) -> str:
    """The command line that repeats a run, without what has its default; of paths only the names."""
    words = ["prophet adapt", Path(config.data).resolve().name]
    places: list[tuple[Any, Any]] = [
        (config, field) for field in fields(config) if field.name not in ("data", "loop", "resume")
    ]
    places += [(config.loop, field) for field in fields(config.loop)]
    usual = adaptation_loop()
    for owner, field in places:
        value = getattr(owner, field.name)
        default = getattr(usual, field.name) if owner is config.loop else field.default
        if default is MISSING or value != default:
            is_place = field.name in ("out", "run") or (field.name == "base" and Path(value).is_dir())
            shown = Path(value).name if is_place else value
            flag = field.name.replace("_", "-")
            words.append(f"--{flag} {shown}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{flag}")
    return " ".join(words)


def model_card(
    config: AdaptConfig,
    base: ProphetConfig,
    world: ProphetConfig,
    split: Split,
    record: Mapping[str, Any],
    measured: Mapping[str, Any],
    before: Mapping[str, Any],
    limits: Mapping[str, float],
    findings: list[str],
    draws: bool,
) -> str:
    """Return ``README.md`` of an adapted world.

    Args:
        config: the run.
        base: the world it started from.
        world: the result.
        split: the data.
        record: step, error and memory gate of the best weights.
        measured: evaluation of the result on held-out clips.
        before: the same of the base, with this world's codec.
        limits: what the codec alone loses, of :func:`prophet_gym.training.adapt_codec.codec_limits`.
        findings: of the audit.
        draws: whether it draws action frames.
    """
    protocol = measured["protocol"]
    name = config.data.resolve().name
    kept = f"The weights are the average at step {record['step']}, the best EPE of the run."
    if record["step"] == 0:
        kept = "The adaptation did not get better than its base on the held-out clips: these are the base's weights."
    spec = world.action_spec
    lines = [
        f"# {world.name}",
        "",
        f"A world model for `gym.make(\"Prophet-Custom-v0\", checkpoint=...)`: `{base.name}` adapted with LoRA to "
        f"{split.num_training} episodes of `{name}`. {kept}",
        "",
        "## Made by",
        f"`{adapt_command(config)}`, seed {config.loop.seed}.",
        "",
        f"- Base: `{base.name}`, trained on {base.trained_on}. Its licence and its data's still hold.",
        f"- Data: `{name}`, {len(split.episodes)} episodes; the last {len(split.held_out)} are held out.",
        f"- Images: stretched to {world.image_size[0]}x{world.image_size[1]} pixels.",
        f"- Commands: {spec.num_effectors} end-effector(s), {spec.delta!r} deltas, {spec.rotation} rotations, "
        f"{spec.gripper} gripper, {spec.control_hz:g} Hz.",
        f"- Action frames: {'drawn, so every start needs a calibrated camera' if draws else 'none; no camera needed'}.",
        f"- Memory gate: {record['memory_gate']:.2f}.",
        f"- Audit: {'; '.join(findings) or 'nothing found'}.",
        "",
        "## Measured",
        f"Open-loop rollouts of {protocol['num_episodes']} clips of the held-out episodes, {protocol['steps']} frames "
        f"each, {protocol['num_inference_steps']} denoising step(s), seed {protocol['seed']}; 95 % bootstrap intervals "
        "over clips. Pictures and all figures: `evaluation/`. The best step was chosen on these same clips, which "
        "favours this world a little.",
        "",
        "| | " + " | ".join(LABELS[key][0] for key in _COLUMNS) + " |",
        "|---|" + "---|" * len(_COLUMNS),
        *_rows(measured, before),
        "",
        *_against(measured),
        f"- The codec alone, real clips coded and decoded: PSNR {limits['psnr']:.2f} dB, EPE {limits['epe']:.3f} px; "
        "the denoiser can hardly do better.",
        "",
        "## Limits",
        *_limits(split, draws),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _rows(measured: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    rows = {"this world": _predictors(measured)["model"], "its base, before": _predictors(before)["model"]}
    rows["last frame repeated"] = _predictors(measured)["last_frame"]
    rows["this world, shuffled actions"] = _predictors(measured)["shuffled_actions"]
    return [
        f"| {name} | " + " | ".join(_figure(row[key], LABELS[key][1]) for key in _COLUMNS) + " |"
        for name, row in rows.items()
    ]


def _against(measured: Mapping[str, Any]) -> list[str]:
    return [f"- {label}: {_figure(_horizon(measured)['against'][key], spec)}" for key, (label, spec) in AGAINST.items()]


def _horizon(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return report["groups"]["all"]["horizons"][str(report["protocol"]["steps"])]


def _predictors(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return _horizon(report)["predictors"]


def _figure(figure: Mapping[str, Any], spec: str) -> str:
    value, low, high = (math.nan if figure[key] is None else float(figure[key]) for key in ("value", "low", "high"))
    if not math.isfinite(value):
        return "-"
    return format(value, spec) + (f" [{low:{spec}}, {high:{spec}}]" if math.isfinite(low) else "")


def _limits(split: Split, draws: bool) -> list[str]:
    lines = [
        f"- Beside its base's data it knows {split.num_training} episodes: other scenes and motions are guesses.",
        "- If shuffled actions score nearly as well as true ones, it ignores its commands: train no policy in it.",
        "- A judge of success is yours to give: `gym.make(..., judge=...)`, unless this folder has a `judge/`.",
    ]
    if not split.posed:
        lines.append(
            "- The data have no measured poses. Snapshots begin at the origin of the world with the first commanded "
            "gripper opening, so `state` is relative to the start, and workspace limits mean nothing."
        )
    if not draws:
        lines.append("- Commands reach it as numbers alone; with calibrated cameras a world follows them better.")
    return lines
