"""Configuration of an adaptation: a pretrained world, a few episodes, and where the new environment goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .loop import LoopConfig


def adaptation_loop() -> LoopConfig:
    """Optimisation of an adaptation: few steps, evaluated often.

    The packaged world on 45 episodes of a new look, EPE on held-out clips after 100 steps, from 0.361 px: 0.309 at a
    rate of 3e-4, 0.284 at 1e-3, 0.279 at 3e-3.
    """
    return LoopConfig(
        steps=1000, batch_size=8, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99, log_every=10, save_every=100,
        eval_every=100,
    )  # fmt: skip


@dataclass(frozen=True)
class AdaptConfig:
    """Configuration of an adaptation."""

    data: Positional[Path]
    """Episodes of the new robot, scene or task: a data set of any format."""
    base: str
    """World to start from: a folder, a packaged name, or a hub id."""
    out: Path
    """Folder of the new environment; one that is there is not replaced."""
    run: Path | None = None
    """Folder of logs, checkpoints and decoded clips; default OUT-run."""
    name: str | None = None
    """Name of the new checkpoint; default that of OUT."""
    card: str | None = None
    """What the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file"""
    camera: str | None = None
    """Which camera; the card's or the first by default."""
    clip_length: int | None = None
    """Commands of a training clip; longer episodes give several, shorter ones are left out. By default what nine of ten
    episodes have, no more than chunk and history of the base together."""
    held_out: int | None = None
    """Episodes, the last ones, that are not trained on; default a tenth, at least 1."""
    ignore_faults: bool = False
    """Go on in spite of faults that the audit finds."""
    draw_actions: Literal["auto", "never"] = "auto"
    """"auto" draws action frames where the base does and the data have cameras and poses; "never" leaves them out."""
    rank: int = 16
    """Rank of the adapters; their scale is the same."""
    decoder_steps: int = 0
    """Steps in which the decoder of a small codec learns the new images before the denoiser does; 0 leaves the codec
    as it is. For codecs of `prophet train vae`, which know one scene."""
    gate_fraction: float = 0.3
    """Share of the run in which the memory's gate opens, where the base has it closed; 0 opens it at once."""
    first_step: float | None = None
    """Share of samples at pure noise; default 0.5 for a base that samples in one or two steps, else 0."""
    self_rollout: float = 0.0
    """Share of steps, reached after a fifth of the run, whose chunks start where the model's own rollout has led."""
    object_weight: float = 0.0
    """Extra loss weight of the latent positions around end-effectors (where cameras are known) and labelled objects."""
    evaluation_windows: int = 32
    """Clips of held-out episodes that an evaluation imagines, at most."""
    evaluation_frames: int = 40
    """Frames of each, at most."""
    patience: int = 5
    """Evaluations without a better EPE after which the run stops."""
    keep_adapter: bool = False
    """Also write the adapter alone, to OUT/adapter."""
    keep_judge: bool = False
    """Copy the judge of the base, which knows the base's tasks and images."""
    loop: LoopConfig = field(default_factory=adaptation_loop)
    """Optimisation."""
    resume: bool = False
    """Continue an interrupted run."""

    def __post_init__(self) -> None:
        for name in ("rank", "patience", "evaluation_windows", "evaluation_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("held_out", "clip_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1, or leave it out")
        if self.decoder_steps < 0:
            raise ValueError(f"decoder_steps={self.decoder_steps}: expected at least 0")
        if not 0.0 <= self.gate_fraction <= 1.0:
            raise ValueError(f"gate_fraction={self.gate_fraction}: expected a share from 0 to 1")
        if self.loop.eval_every < 1:
            raise ValueError("eval_every=0: expected at least 1; the best weights are those of an evaluation")

    @property
    def run_folder(self) -> Path:
        """Where logs, checkpoints and decoded clips are."""
        return self.out.with_name(self.out.name + "-run") if self.run is None else self.run

    @property
    def world_name(self) -> str:
        """Name of the new checkpoint."""
        return self.out.name if self.name is None else self.name
