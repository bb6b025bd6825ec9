"""Configuration of a world-model run.

Departures from the paper, each a field: rectified-flow velocity loss, as Cosmos-Predict2 trains (the paper writes noise
prediction); clips of random length, so that every chunk length works; chunks with a possible contact are drawn more
often and its place weighs more; the start frame and the history are blurred by a little noise and, in a share of the
steps, imagined, because in a rollout they are the model's own. For one denoising step there is also the energy score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .clips import ClipSource
from .loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is drawn how often and weighs how much; what sampler, imagined starts and loss read."""

    action_frames: str = "spatial"
    """"none" (scalar stream alone), "pooled" (Eqs 10 and 11) or "spatial"."""
    full_length: float = 0.7
    """Share of steps with full chunks; the others draw a length uniformly from 1 to the chunk length."""
    eventful: float = 0.5
    """Share of samples from chunks in which an end-effector comes near a labelled object, whatever happens then."""
    old_rollout: float = 0.6
    """Share of samples whose rollout began with the episode; that of the others began later, at any frame."""
    condition_noise: float = 0.05
    """Largest standard deviation of noise on the clean frame and the history, in units of latents."""
    self_rollout: float = 0.0
    """Share of steps, reached after a fifth of the run, whose chunks start where the model's own rollout has led."""
    first_step: float = 0.0
    """Share of samples at t = 1, the pure noise from which every rollout starts."""
    timestep_shift: float = 3.0
    """t = s u / (1 + (s - 1) u) with uniform u, for the other samples."""
    motion_weight: float = 0.0
    """Extra loss weight, growing to this value, of latent positions that differ from the start frame. It favours motion
    where the outcome is open."""
    object_weight: float = 0.0
    """Extra loss weight of the latent positions around labelled objects (where they start) and end-effectors."""
    presence_weight: float = 0.0
    """Extra loss weight of the latent positions around labelled objects (where they truly are). It favours an object in
    each of several likely places over its faded mean."""
    objective: Literal["velocity", "median", "energy"] = "velocity"
    """"velocity": rectified flow, any number of denoising steps. For one step: "median", the most likely outcome, and
    "energy", the energy score of two samples, where noise decides what is open."""
    colour_weight: float = 0.0
    """Weight of distances of mean colours around each place, for "median" and "energy": an object somewhere near its
    place counts as nearer to the truth than none."""
    num_inference_steps: int = 4
    """Denoising steps stored with the checkpoint."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""

    def __post_init__(self) -> None:
        if self.action_frames not in ("none", "pooled", "spatial"):
            raise ValueError(f'action_frames={self.action_frames!r}: expected "none", "pooled" or "spatial"')
        if self.objective not in ("velocity", "median", "energy"):
            raise ValueError(f'objective={self.objective!r}: expected "velocity", "median" or "energy"')
        if self.objective != "velocity" and self.num_inference_steps != 1:
            raise ValueError(
                f"objective={self.objective!r} trains one denoising step, got num_inference_steps="
                f"{self.num_inference_steps}; give 1, or train on velocity"
            )
        if self.objective != "velocity" and self.motion_weight + self.presence_weight > 0:
            raise ValueError(
                f"objective={self.objective!r} with motion_weight={self.motion_weight} and presence_weight="
                f"{self.presence_weight}: what happened must not decide what weighs more; give 0, or train on velocity"
            )
        if self.objective == "velocity" and self.colour_weight > 0:
            raise ValueError(
                f"colour_weight={self.colour_weight} with objective='velocity', which has no distances; give 0, or "
                'objective="median" or "energy"'
            )
        for name in ("full_length", "eventful", "old_rollout", "self_rollout", "first_step"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if not 0.0 < self.timestep_shift < math.inf:
            raise ValueError(
                f"timestep_shift={self.timestep_shift}: expected a finite number above 0; 1 draws times uniformly"
            )
        if not 0.0 <= self.condition_noise < math.inf:
            raise ValueError(
                f"condition_noise={self.condition_noise}: expected a finite standard deviation of at least 0"
            )
        for name in ("motion_weight", "object_weight", "presence_weight", "colour_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected an extra weight of 0 or more")


@dataclass(frozen=True)
class WorldModelConfig(ObjectiveConfig):
    """Configuration of a world-model run."""

    data: Path
    """Training episodes: a folder of them, or a data set of another format."""
    vae: Path
    """Folder of the trained codec."""
    run: Path = Path("runs/world-model")
    """Run folder; the checkpoint ends in RUN/prophet."""
    cache: Path = Path("runs/cache")
    """Folder of decoded clips and latents."""
    init: Path | None = None
    """Checkpoint whose denoiser the run starts from (same architecture); by default fresh weights."""
    source: ClipSource = field(default_factory=ClipSource)
    """How the data become clips of one length and size."""
    validation: Path | None = None
    """Folder of held-out episodes for evaluation during training."""
    name: str = "tiny"
    """Name of the checkpoint."""
    trained_on: str = ""
    """One sentence on the data; default: the folder's name and size."""
    num_attention_heads: int = 4
    """Attention heads of 64 channels."""
    num_layers: int = 6
    """Transformer blocks."""
    adaln_lora_dim: int = 48
    """Rank of the AdaLN-LoRA."""
    residual: bool = False
    """Denoise differences from the start frame: with few recordings of many scenes, backgrounds need not be learned."""
    still_below: float = 0.0
    """Change in grey levels up to which a pixel keeps its value of the chunk's start frame, stored with the checkpoint:
    against the flicker of a small codec where little moves. 0 shows all as decoded."""
    history: bool = True
    """Attend to what was returned before the chunk; without it, to its start frame alone (an ablation)."""
    resume: bool = False
    """Continue an interrupted run."""
