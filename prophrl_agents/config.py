"""Settings of ``prophrl train``, checked when they are made, and their presets.

Numbers that the paper states are those of section 4.1.3; the others have their reason beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prophet_gym.errors import nearest
from prophrl_agents.advantages import AdvantageNorm
from prophrl_agents.flow_sde import LastStep
from prophrl_agents.governor import GovernorRules

__all__ = ["ALGORITHMS", "PAPER", "SMOKE", "TABLETOP", "FlowScaleConfig", "PPOConfig", "TrainConfig", "WorldConfig"]

Algorithm = Literal["fa_grpo", "flow_grpo", "filtered_bc", "ppo"]
ALGORITHMS = ("fa_grpo", "flow_grpo", "filtered_bc", "ppo")


@dataclass(frozen=True)
class WorldConfig:
    """How environments are made; None leaves the choice to the environment's registration."""

    num_envs: int = 64
    """Slots of each environment; rollouts that do not fit at once take several passes."""
    horizon: int | None = None
    """Commands after which a rollout is truncated."""
    chunk_length: int | None = None
    """Commands of one env step; the policy's by default."""
    num_inference_steps: int | None = None
    """Denoising steps of a world model."""
    dtype: str | None = None
    """Precision of a world model: float32, bfloat16, float16, or auto: bfloat16 where the hardware multiplies it."""
    checkpoint: str | None = None
    """World model: a folder, a packaged name or a hub id."""
    judge: str | None = None
    """Folder of the judge that rewards imagined rollouts."""
    task: str | None = None
    """Task of simulators that have several (LIBERO, SimplerEnv): number or name; None draws one for every rollout.
    World models have none; their snapshots say what is asked for."""
    image_size: int | None = None
    """Side of the images of these simulators, pixels; by default the policy's."""


@dataclass(frozen=True)
class FlowScaleConfig:
    """FlowScale weights of the flow steps (Eqs 20-22); see prophrl_agents.flowscale_weights."""

    enabled: bool = True
    """Off: every flow step has weight 1."""
    p: float = 0.5
    """Dependence on the noise; 0.5 makes weights proportional to the standard deviation."""
    alpha: float = 0.1
    """Share of the uniform weight; 1 is the same as off."""
    w_min: float = 0.1
    """Smallest weight."""
    w_max: float = 5.0
    """Largest weight."""
    renorm: Literal["project"] | None = "project"
    """"project" keeps the mean weight at 1 inside the bounds; None is the paper's formula as printed."""


@dataclass(frozen=True)
class PPOConfig:
    """What algorithm "ppo" needs beyond the group algorithms."""

    gamma: float = 1.0
    """Discount per policy call; the reward comes once, at the end."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation, per policy call."""
    critic_learning_rate: float = 1e-3
    """AdamW learning rate of the value network, which starts from nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """One reinforcement run.

    Raises:
        ValueError: a number out of range, counts that do not divide, or settings that exclude each other.
    """

    policy: Path = Path("runs/sft/policy")
    """Folder of the policy to improve, as save_pretrained wrote it."""
    run: Path = Path("runs/train")
    """Run folder. Results: run/policy (last, or the running mean) and run/best: of the best evaluation, or, with a
    governor, the weights that acted when it saw the highest true success."""
    resume: bool = False
    """Continue the run in that folder; on a CPU to the same bits."""
    seed: int = 0
    """Seed of starts, policy noise and mini-batches; update u draws from (seed, u)."""
    env: tuple[str, ...] = ("Prophet-Tabletop-v0",)
    """Environments that give the reward, each one task or several; every update collects equally from all."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """How environments are made."""
    ray_workers: int = 0
    """Ray workers that collect the rollouts of each environment, with world.num_envs slots each; 0: this process."""
    snapshots: Path | None = None
    """Folder of snapshots (SnapshotSet) to start from; by default the environment's own, or what it makes of seeds."""
    algorithm: Algorithm = "fa_grpo"
    """"fa_grpo", "flow_grpo", "filtered_bc" (imitate the successful rollouts) or "ppo" (with a value network)."""
    flowscale: FlowScaleConfig = field(default_factory=FlowScaleConfig)
    """Weights of the flow steps; filtered_bc has no use for them."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Settings of algorithm "ppo"."""
    updates: int = 100
    """Updates: rollouts are collected, then learned from."""
    rollouts_per_update: int = 256
    """Rollouts of one update, over all environments and processes."""
    group_size: int = 8
    """Rollouts from one start, compared with each other."""
    mini_batch: int = 128
    """Rollouts of one optimiser step, over all processes; whole groups."""
    epochs: int = 1
    """Passes over the rollouts of an update."""
    micro_batch: int = 256
    """Policy calls of one forward pass; gradients accumulate, so it changes memory and nothing else."""
    advantage_norm: AdvantageNorm = "population"
    """"population" (GRPO), "none" (Dr.GRPO) or "rloo"; PPO standardises over the batch instead."""
    dynamic_sampling: bool = False
    """Leave groups without contrast out of the loss's denominator (DAPO)."""
    clip_low: float = 0.2
    """Ratios are clipped from 1 - this."""
    clip_high: float = 0.28
    """Ratios are clipped to 1 + this (DAPO's clip-higher)."""
    dual_clip: float | None = None
    """Bound on the objective of negative advantages, 3.0 is customary."""
    beta: float = 0.0
    """Weight of the exact KL to the policy the run started from; the paper states no value, 0.01 is a good start."""
    noise_level: float | None = None
    """Noise a of the flow SDE while learning; None keeps the policy's."""
    num_flow_steps: int | None = None
    """Flow steps K; None keeps the policy's."""
    last_step: LastStep | None = None
    """Whether the last flow step is noisy ("sde") or not ("ode"); None keeps the policy's."""
    learning_rate: float = 5e-6
    """AdamW without weight decay (the KL is the way to hold on to the start); 5e-6 suits VLAs."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly."""
    grad_clip: float = 1.0
    """Largest gradient norm of an optimiser step."""
    ema_decay: float = 0.0
    """What the running mean of the weights keeps of itself at an update; that mean is evaluated and saved, while the
    present weights act and learn. 0: no mean, the present weights are saved."""
    freeze_trunk: bool = False
    """Reinforce the flow head alone."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Networks run under autocast to this precision; log-probabilities stay float32."""
    log_grad_every: int = 10
    """Updates between two measurements of the gradient norm per flow step (K extra backward passes); 0 for never."""
    eval_env: tuple[str, ...] = ()
    """Environments of evaluation, for example the simulator; by default those that give the reward."""
    eval_every: int = 10
    """Updates between two evaluations, the first before any update; 0 for none."""
    eval_starts: int = 200
    """Rollouts of an evaluation and environment; the same starts and noise each time, of seeds that training never
    draws. Without ``eval_env`` they begin in the snapshots that training begins in."""
    stop_at_success: float | None = None
    """Stop when the success rate of the training rollouts since the last evaluation reaches this."""
    patience: int = 0
    """Stop after so many evaluations without a new best; 0 for never."""
    governor_env: str | None = None
    """Simulator in which the governor replays rollouts that were judged, to see what is true; it gives no reward."""
    governor: GovernorRules = field(default_factory=GovernorRules)
    """When the governor looks, and what it does about what it sees."""
    save_every: int = 1
    """Updates between two checkpoints."""
    videos_every: int = 20
    """Updates between two pairs of videos, of a good and a bad rollout; 0 for none."""

    def __post_init__(self) -> None:
        """Checks every setting."""
        object.__setattr__(self, "run", Path(self.run))
        counts = ("updates", "rollouts_per_update", "mini_batch", "epochs", "micro_batch", "eval_starts", "save_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.world.num_envs < 1:
            raise ValueError(f"world.num_envs is {self.world.num_envs}, expected at least 1")
        or_none = ("seed", "ray_workers", "warmup_updates", "log_grad_every", "eval_every", "patience", "videos_every")
        for name in or_none:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        self._check_batches()
        self._check_algorithm()
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected 0 (no mean) or a share below 1, such as 0.9")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}, expected 'no' or 'bf16'")
        if self.stop_at_success is not None and not 0 < self.stop_at_success <= 1:
            raise ValueError(f"stop_at_success is {self.stop_at_success}, expected a rate in (0, 1], or None")
        if not self.eval_every and (self.patience or self.stop_at_success is not None):
            raise ValueError("patience and stop_at_success are looked at when evaluating; set eval_every above 0")

    def learning_rate_at(self, update: int) -> float:
        """Returns the learning rate of an update, counted from 0."""
        return self.learning_rate * min(1.0, (update + 1) / max(self.warmup_updates, 1))

    def _check_batches(self) -> None:
        if isinstance(self.env, str) or not self.env:
            raise ValueError(f"env is {self.env!r}, expected one id or more, such as ('Prophet-Tabletop-v0',)")
        if isinstance(self.eval_env, str):
            raise ValueError(f"eval_env is {self.eval_env!r}, expected a tuple of ids: ({self.eval_env!r},)")
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}, expected at least 2 (default 8): one rollout has nothing to be "
                "compared with"
            )
        if self.rollouts_per_update % (self.group_size * len(self.env)):
            raise ValueError(
                f"rollouts_per_update is {self.rollouts_per_update}, expected a multiple of group_size "
                f"{self.group_size} times {len(self.env)} environments: whole groups, as many of each environment"
            )
        if self.mini_batch % self.group_size or self.rollouts_per_update % self.mini_batch:
            raise ValueError(
                f"mini_batch is {self.mini_batch}, expected a multiple of group_size {self.group_size} that divides "
                f"rollouts_per_update {self.rollouts_per_update}: mini-batches hold whole groups and are equally large"
            )

    def _check_algorithm(self) -> None:
        if self.algorithm not in ALGORITHMS:
            hint = nearest(self.algorithm, ALGORITHMS)
            raise ValueError(f"algorithm is {self.algorithm!r}, expected one of {ALGORITHMS}.{hint}")
        if self.advantage_norm not in ("population", "none", "rloo"):
            raise ValueError(f"advantage_norm is {self.advantage_norm!r}, expected 'population', 'none' or 'rloo'")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            clip = f"clip_low={self.clip_low}, clip_high={self.clip_high}"
            raise ValueError(f"{clip}, expected 0 <= clip_low < 1 and clip_high >= 0")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip is {self.dual_clip}, expected above 1 + clip_high = {1 + self.clip_high}")
        if not self.beta >= 0 or (self.beta and self.algorithm == "filtered_bc"):
            raise ValueError(f"beta is {self.beta}, expected 0 or more, and 0 for 'filtered_bc', which has no KL term")
        if self.dynamic_sampling and self.algorithm not in ("fa_grpo", "flow_grpo"):
            raise ValueError(f"dynamic_sampling is about groups, which {self.algorithm!r} does not compare; drop it")
        if self.noise_level is not None and not self.noise_level > 0 and self.algorithm != "filtered_bc":
            raise ValueError(f"noise_level is {self.noise_level}, expected above 0: without noise nothing is explored")
        ppo = self.ppo
        if not (0 <= ppo.gamma <= 1 and 0 <= ppo.gae_lambda <= 1 and ppo.critic_learning_rate > 0):
            raise ValueError(f"{ppo}: expected gamma and gae_lambda from 0 to 1 and a positive critic_learning_rate")


PAPER = TrainConfig()
"""Section 4.1.3: groups of 8, 256 rollouts, mini-batches of 128, 100 updates."""

TABLETOP = TrainConfig(
    updates=32,
    epochs=2,
    learning_rate=1.5e-4,
    warmup_updates=6,
    freeze_trunk=True,
    ema_decay=0.9,
    noise_level=0.5,
    eval_env=("Tabletop-v0",),
    governor_env="Tabletop-v0",
)
"""The small policy in the packaged world, on a CPU; larger steps or fewer rollouts were unstable."""

SMOKE = TrainConfig(
    world=WorldConfig(num_envs=8, num_inference_steps=1),
    updates=2,
    rollouts_per_update=16,
    group_size=4,
    mini_batch=8,
    learning_rate=1.5e-4,
    eval_every=2,
    eval_starts=8,
    videos_every=1,
    log_grad_every=1,
)
"""Every stage once or twice, in a CPU minute; nothing is learned."""
