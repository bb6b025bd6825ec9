"""Configuration of pretraining on a mixture; the defaults are the paper's where it states them (4.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from .config import ObjectiveConfig
from .loop import LoopConfig
from .parallel import Parallel


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining on a mixture of data sets."""

    mixture: Path
    """TOML file that names the data sets."""
    base: str | None = None
    """World to start from, weights and codec: a folder (as of `prophet from-cosmos`), a packaged name, or a hub id."""
    vae: Path | None = None
    """Without a base: folder of the trained codec; the denoiser starts from fresh weights."""
    run: Path = Path("runs/pretrain")
    """Run folder; the checkpoint ends in RUN/prophet."""
    cache: Path = Path("runs/cache-pretrain")
    """Folder of decoded clips and latents; with several machines, one that all of them see."""
    name: str = "pretrained"
    """Name of the checkpoint."""
    num_attention_heads: int = 4
    """Without a base: attention heads of 64 channels."""
    num_layers: int = 6
    """Without a base: transformer blocks."""
    adaln_lora_dim: int = 48
    """Without a base: rank of the AdaLN-LoRA."""
    action_frames: str = "spatial"
    """Without a base: "none", "pooled" (Eqs 10 and 11) or "spatial", for the data sets that have cameras."""
    epochs: float = 2.0
    """Chunks drawn in all, in units of the clips of the mixture."""
    batch_size: int = 16
    """Chunks of a micro-batch and process, all from one data set."""
    accumulation: int = 4
    """Micro-batches of an optimiser step, each from a data set of its own."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    warmup_steps: int = 500
    """Linear warm-up."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved."""
    gate_fraction: float = 0.3
    """Share of the run in which the memory's gate opens, where the base has it closed."""
    full_length: float = 0.7
    """Share of micro-batches with full chunks; the others draw a length from 1 to the chunk length."""
    old_rollout: float = 0.6
    """Share of samples whose rollout began with the clip; that of the others began later, at any frame."""
    condition_noise: float = 0.05
    """Largest standard deviation of noise on the clean frame and the history, in units of latents."""
    first_step: float = 0.0
    """Share of samples at t = 1, the pure noise from which every rollout starts."""
    timestep_shift: float = 3.0
    """t = s u / (1 + (s - 1) u) with uniform u, for the other samples."""
    gradient_checkpointing: bool = True
    """Compute the activations of the blocks twice instead of keeping them."""
    parallel: Parallel = "ddp"
    """With several processes: "ddp", all of the network in each, or "fsdp2", a share of every parameter."""
    mixed_precision: str = "bf16"
    """"no" or "bf16"."""
    seed: int = 0
    """Seed of initialisation, batches and noise."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two checkpoints."""
    resume: bool = False
    """Continue an interrupted run."""

    def __post_init__(self) -> None:
        if (self.base is None) == (self.vae is None):
            raise ValueError(
                f"base={self.base!r} and vae={self.vae}; expected one of them: a world to go on from, or a codec for a "
                "new denoiser"
            )
        if not self.epochs > 0 or self.accumulation < 1:
            raise ValueError(
                f"epochs={self.epochs}, accumulation={self.accumulation}; expected epochs above 0 and accumulation of "
                "at least 1"
            )
        if not 0.0 <= self.gate_fraction <= 1.0:
            raise ValueError(f"gate_fraction={self.gate_fraction}: expected a share from 0 to 1")
        if self.parallel not in ("ddp", "fsdp2"):
            raise ValueError(f'parallel={self.parallel!r}: expected "ddp" or "fsdp2"')
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f'mixed_precision={self.mixed_precision!r}: expected "no" or "bf16", which the plan counts'
            )
        self.objective(self.action_frames, 1)

    def steps(self, clips: int, processes: int) -> int:
        """Optimiser steps that draw ``epochs`` times as many chunks as there are clips."""
        return max(1, ceil(self.epochs * clips / (self.batch_size * self.accumulation * processes)))

    def objective(self, action_frames: str, steps: int) -> ObjectiveConfig:
        """What sampler and loss read; nothing is drawn for its events, as most data sets have no labels."""
        loop = LoopConfig(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            grad_clip=self.grad_clip,
            ema_decay=self.ema_decay,
            seed=self.seed,
            mixed_precision=self.mixed_precision,
            log_every=self.log_every,
            save_every=self.save_every,
            eval_every=0,
        )
        return ObjectiveConfig(
            action_frames=action_frames,
            full_length=self.full_length,
            eventful=0.0,
            old_rollout=self.old_rollout,
            condition_noise=self.condition_noise,
            first_step=self.first_step,
            timestep_shift=self.timestep_shift,
            loop=loop,
        )
