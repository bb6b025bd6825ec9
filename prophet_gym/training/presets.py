"""Training presets: ``tiny`` makes the shipped checkpoint, ``smoke`` runs the whole pipeline in a CPU minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

from .config import WorldModelConfig
from .loop import LoopConfig
from .vae import VAEConfig

_DATA: Any = tyro.MISSING  # required on the command line

VAE_TINY = VAEConfig(
    data=_DATA,
    validation=_DATA,
    loop=LoopConfig(
        steps=1500, batch_size=12, learning_rate=2e-3, weight_decay=0.0, warmup_steps=100, decay_fraction=0.5,
        ema_decay=0.995, log_every=25, save_every=200, eval_every=300,
    ),
)  # fmt: skip
VAE_SMOKE = VAEConfig(
    data=_DATA,
    validation=_DATA,
    run=Path("runs/vae-smoke"),
    cache=Path("runs/cache-smoke"),
    channels=32,
    loop=LoopConfig(
        steps=100, batch_size=4, learning_rate=2e-3, warmup_steps=10, ema_decay=0.9, log_every=10, save_every=50
    ),
)
WORLD_MODEL_TINY = WorldModelConfig(
    data=_DATA,
    vae=_DATA,
    name="prophet-tabletop-tiny",
    eventful=0.6,
    timestep_shift=8.0,
    first_step=0.5,
    object_weight=8.0,
    self_rollout=0.35,
    num_layers=5,
    num_inference_steps=1,
    loop=LoopConfig(
        steps=6000,
        muon_learning_rate=1e-3,
        warmup_steps=100,
        decay_fraction=0.4,
        ema_decay=0.995,
        log_every=25,
        save_every=250,
        eval_every=1000,
    ),
)
WORLD_MODEL_SMOKE = WorldModelConfig(
    data=_DATA,
    vae=_DATA,
    run=Path("runs/world-model-smoke"),
    cache=Path("runs/cache-smoke"),
    num_attention_heads=2,
    num_layers=2,
    loop=LoopConfig(steps=60, batch_size=8, warmup_steps=10, ema_decay=0.9, log_every=10, save_every=30),
)
