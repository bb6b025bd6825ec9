"""Settings of ``prophrl sft``, checked when they are made, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from prophet_gym.training.loop import LoopConfig
from prophrl_agents.policies.small import SmallFlowPolicyConfig

__all__ = ["SFT_PAPER", "SFT_SMOKE", "SFT_TABLETOP", "PolicySize", "SFTConfig"]


@dataclass(frozen=True)
class PolicySize:
    """Size of the policy; the rest of its configuration follows from the data."""

    chunk_length: int = SmallFlowPolicyConfig.chunk_length
    """Commands per policy call."""
    num_flow_steps: int = SmallFlowPolicyConfig.num_flow_steps
    """Flow steps K of sampling; it can be changed later, training does not depend on it."""
    trunk_width: int = SmallFlowPolicyConfig.trunk_width
    """Channels of the convolutions, a multiple of 8."""
    feature_dim: int = SmallFlowPolicyConfig.feature_dim
    """Length of the feature vector."""
    head_width: int = SmallFlowPolicyConfig.head_width
    """Hidden width of the flow head, even."""
    head_blocks: int = SmallFlowPolicyConfig.head_blocks
    """Residual blocks of the flow head."""


@dataclass(frozen=True)
class SFTConfig:
    """One imitation run.

    Raises:
        ValueError: a number out of range.
    """

    data: tuple[Path, ...]
    """Folders of episodes."""
    run: Path = Path("runs/sft")
    """Run folder; the policy ends in RUN/policy."""
    policy: PolicySize = field(default_factory=PolicySize)
    """Size of the policy."""
    only_success: bool = True
    """Leave out failures and episodes whose success is unknown."""
    behaviours: tuple[str, ...] = ()
    """Keep the episodes of these recorded behaviours, for example expert half_good; none named keeps all."""
    max_episodes: int = 0
    """Use the first so many episodes that pass the filter; 0 for all."""
    held_out: int = 16
    """Episodes kept out of training for the validation loss; 0 for none."""
    camera_name: str | None = None
    """Camera of recordings with several; by default the first in alphabetical order."""
    at_calls: float = 0.0
    """Share of samples from frames 0, CH, 2 CH, ... of their episodes, where a policy is called; others: from all."""
    shift: int = 2
    """Largest random shift of the images in pixels."""
    jitter: float = 0.1
    """Strength of the random change of colour, from 0 (none) up to, but not, 1."""
    env: str = "Tabletop-v0"
    """Simulator in which the policy is tried during training."""
    eval_episodes: int = 100
    """Episodes of one such trial, from fixed starts; 0 for none (no simulator is then needed)."""
    num_envs: int = 50
    """Simulators side by side."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(mixed_precision="no"))
    """Optimisation."""
    resume: bool = False
    """Continue an interrupted run."""

    def __post_init__(self) -> None:
        """Checks the numbers; the data is checked where it is read."""
        for name, least in (("max_episodes", 0), ("held_out", 0), ("shift", 0), ("eval_episodes", 0), ("num_envs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not 0.0 <= self.at_calls <= 1.0:
            raise ValueError(f"at_calls={self.at_calls}: expected a share from 0 to 1")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"jitter={self.jitter}: expected 0 (no change of colour) up to, but not, 1")


_DATA: Any = tyro.MISSING  # required on the command line

SFT_TABLETOP = SFTConfig(
    data=_DATA,
    policy=PolicySize(trunk_width=32),
    at_calls=0.5,  # the first call is one of five, but the first frame one of forty
    shift=1,  # a pixel is 0.9 cm on the table, and a grasp forgives 2 cm
    loop=LoopConfig(
        steps=8000, batch_size=128, learning_rate=2e-3, warmup_steps=100, decay_fraction=0.5, ema_decay=0.998,
        mixed_precision="no", eval_every=1000,
    ),
)  # fmt: skip
"""A policy of 2.5M parameters for Tabletop-v0 from a few thousand recorded episodes; 0.21 s a step on one CPU core."""
SFT_SMOKE = SFTConfig(
    data=_DATA,
    run=Path("runs/sft-smoke"),
    policy=PolicySize(trunk_width=16, feature_dim=64, head_width=64, head_blocks=2),
    max_episodes=16,
    held_out=2,
    eval_episodes=4,
    num_envs=4,
    loop=LoopConfig(
        steps=60, batch_size=32, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9, mixed_precision="no", log_every=10,
        save_every=30, eval_every=30,
    ),
)  # fmt: skip
"""A CPU minute that tries the whole path; its policy is good for nothing."""
SFT_PAPER = SFTConfig(
    data=_DATA,
    run=Path("runs/sft-paper"),
    loop=LoopConfig(
        steps=200_000, batch_size=64, learning_rate=2.5e-5, weight_decay=0.1, mixed_precision="no", save_every=5000,
        eval_every=10_000,
    ),
)  # fmt: skip
"""The optimiser of the paper's VLAs (4.1.3); warm-up and decay, which it does not state, are those of LoopConfig."""
