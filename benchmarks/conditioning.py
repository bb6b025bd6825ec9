"""Ablation of action conditioning and history: equal data, codec, size, seed and steps; one table.

``python benchmarks/conditioning.py --data TRAIN --validation VAL --vae runs/vae/vae --steps 1000`` trains a denoiser
for each variant and evaluates all of them on the same held-out episodes. On 2 CPU cores a step of 32 samples takes
about 0.7 s, so the default takes about 40 minutes; finished variants are kept, interrupted ones continue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.metrics.evaluate import evaluate_world_model
from prophet_gym.strict_json import to_json
from prophet_gym.training.presets import WORLD_MODEL_TINY
from prophet_gym.training.world_model import train_world_model
from prophet_gym.world_model.prophet import ProphetWorldModel

VARIANTS = {
    "scalar": "scalar stream alone",
    "pooled": "scalar + pooled action frames (Eqs 10-11)",
    "spatial": "scalar + spatial action frames",
}
METRICS = {
    "psnr": "PSNR dB",
    "epe_mean": "EPE px",
    "cos_mean": "flow cosine",
    "block_within": "block within 3 px",
    "block_lost": "block lost",
}


@dataclass(frozen=True)
class Config:
    """Data and budget, the same for every variant."""

    data: Path
    """Folder of training episodes."""
    validation: Path
    """Folder of held-out episodes."""
    vae: Path
    """Folder of the trained codec."""
    out: Path = Path("runs/ablation")
    """Run folders and tables go here."""
    cache: Path = Path("runs/cache")
    """Decoded clips and latents."""
    steps: int = 1000
    """Optimiser steps of 32 samples per variant."""
    episodes: int = 64
    """Held-out episodes."""
    seed: int = 0
    """Of weights, batches and noise."""
    threads: int = 2
    """CPU threads."""


def run_variant(config: Config, variant: str) -> dict:
    """Train one variant, unless it is there, and evaluate it."""
    run = config.out / variant
    training = replace(
        WORLD_MODEL_TINY,
        data=config.data,
        vae=config.vae,
        run=run,
        cache=config.cache,
        name=f"ablation-{variant}",
        action_frames={"scalar": "none"}.get(variant, variant),
        loop=replace(
            WORLD_MODEL_TINY.loop, steps=config.steps, ema_decay=0.99, save_every=100, eval_every=0, seed=config.seed
        ),
    )
    if not (run / "prophet" / "prophet.json").exists():
        train_world_model(replace(training, resume=(run / "checkpoints" / "last.pt").exists()))
    world = ProphetWorldModel.from_pretrained(run / "prophet")
    held_out = EpisodeFolder(config.validation)[: config.episodes]
    return evaluate_world_model(world, held_out, seed=config.seed, out=run / "evaluation")


def main(config: Config) -> None:
    """Run all variants and write ``conditioning.md`` and ``conditioning.json``."""
    torch.set_num_threads(config.threads)
    rows, figures = [], {}
    for variant, label in VARIANTS.items():
        result = run_variant(config, variant)
        table = result["groups"]["all"]["horizons"][str(result["protocol"]["steps"])]
        figures[variant] = table
        if not rows:
            rows = ["| conditioning | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]
            baseline = table["predictors"]["last_frame"]
            rows.append("| last frame repeated | " + " | ".join(cell(baseline[key]) for key in METRICS) + " |")
        rows.append(f"| {label} | " + " | ".join(cell(table["predictors"]["model"][key]) for key in METRICS) + " |")
    note = f"\n{config.steps} steps of 32 samples, seed {config.seed}, n = {config.episodes}, 40 frames open loop.\n"
    (config.out / "conditioning.md").write_text("\n".join(rows) + "\n" + note)
    (config.out / "conditioning.json").write_text(to_json(figures))
    print((config.out / "conditioning.md").read_text())


def cell(figure: dict) -> str:
    """One figure with its 95 % interval."""
    value = figure["value"]
    if value is None or value != value:
        return "-"
    return f"{value:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
