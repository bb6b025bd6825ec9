"""Reinforcement in miniature (Tables 8 and 10): algorithms, worlds and numbers of snapshots, on equal budgets.

``python benchmarks/reinforcement.py`` reinforces one policy by every arm in every environment with every seed, then
evaluates the policy of each run in the simulator: same starts, same noise, paired with the policy they all began
from. Runs in Prophet never see a simulator: it gives no reward and chooses no checkpoint. Finished runs are kept and
interrupted ones continue, so the table can grow over several calls (``--arms``, ``--envs``, ``--seeds``,
``--snapshots``). One run of 32 updates takes ten to thirty minutes on one CPU core.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from prophet_gym.data.record import record_snapshots
from prophet_gym.devices import fast_dtype
from prophet_gym.strict_json import to_json
from prophrl_agents.config import TABLETOP, FlowScaleConfig, TrainConfig, WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import Comparison, Evaluation, compare, evaluate_policy, evaluate_starts
from prophrl_agents.governor import GovernorRules
from prophrl_agents.policies.small import SmallFlowPolicy
from prophrl_agents.run_folder import RunFolder
from prophrl_agents.trainer import GRPOTrainer

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "filtered_bc": ("filtered BC", {"algorithm": "filtered_bc"}),
    "flow_grpo": ("Flow-GRPO", {"algorithm": "flow_grpo", "flowscale": FlowScaleConfig(enabled=False)}),
    "fa_grpo": ("FA-GRPO", {"flowscale": FlowScaleConfig(enabled=False)}),
    "flowscale": ("FA-GRPO + FlowScale", {}),
}
SIMULATOR, FIRST_SNAPSHOT = "Tabletop-v0", 5_000_000


@dataclass(frozen=True)
class Config:
    """What is run, with which budget."""

    policy: Path
    """The policy that every run begins from."""
    out: Path = Path("runs/reinforcement")
    """Runs and tables."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Algorithms."""
    envs: tuple[str, ...] = ("Prophet-Tabletop-v0", SIMULATOR)
    """Environments that give the reward."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    snapshots: tuple[int, ...] = (1024,)
    """Numbers of snapshots that rollouts start from."""
    updates: int = 32
    """Updates of 256 rollouts."""
    learning_rate: float = TABLETOP.learning_rate
    """Peak learning rate of every arm."""
    ema_decay: float = TABLETOP.ema_decay
    """Of the running mean that is evaluated; 0: the last weights."""
    beta: float = 0.0
    """Weight of the KL to the first policy (arms other than filtered BC)."""
    checkpoint: str | None = None
    """World model; the packaged one by default."""
    judge: str | None = None
    """Judge of the world model; the checkpoint's by default."""
    num_inference_steps: int | None = None
    """Denoising steps; the checkpoint's by default."""
    dtype: str = "auto"
    """Precision of the world model; auto: bfloat16 where the processor multiplies it, else float32."""
    governor_every: int = 0
    """Updates between two checks of the judge against replays in the simulator, logged and not acted upon; 0: none."""
    starts: int = 800
    """Fresh scenes of an evaluation."""
    jobs: int = 2
    """Runs at a time, one CPU thread each."""


@dataclass(frozen=True)
class Run:
    """One cell and seed of the table."""

    arm: str
    env: str
    snapshots: int
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.arm}-{self.env}-{self.snapshots}-{self.seed}"


def training(config: Config, run: Run) -> TrainConfig:
    """Returns the settings of a run."""
    changes = ARMS[run.arm][1]
    governed = config.governor_every > 0 and run.env != SIMULATOR
    return replace(
        TABLETOP,
        policy=config.policy,
        run=config.out / run.name,
        resume=(config.out / run.name / "checkpoints").exists(),
        seed=run.seed,
        env=(run.env,),
        eval_env=(),
        eval_every=0,
        videos_every=0,
        updates=config.updates,
        learning_rate=config.learning_rate,
        ema_decay=config.ema_decay,
        warmup_updates=min(TABLETOP.warmup_updates, max(config.updates // 4, 1)),
        beta=0.0 if changes.get("algorithm") == "filtered_bc" else config.beta,
        snapshots=snapshot_folder(config, run.snapshots),
        governor_env=SIMULATOR if governed else None,
        governor=GovernorRules(every=max(config.governor_every, 1), rollouts=128, reaction="warn"),
        world=WorldConfig(
            checkpoint=config.checkpoint,
            judge=config.judge,
            num_inference_steps=config.num_inference_steps,
            dtype=fast_dtype("cpu") if config.dtype == "auto" else config.dtype,
        ),
        **changes,
    )


def snapshot_folder(config: Config, count: int) -> Path:
    """Returns where the first ``count`` starts are kept."""
    return config.out / f"snapshots-{count}"


def evaluated(config: Config, policy: Path, kept: Path) -> Evaluation:
    """Returns the evaluation of a policy in the simulator; its outcomes are kept in a file."""
    starts = evaluate_starts(config.starts, 0)
    if kept.exists():
        success = np.load(kept)
        ids, nothing = tuple(str(start.seed) for start in starts), np.zeros(len(starts))
        seeds = np.array([start.seed for start in starts])
        if len(success) != len(starts):
            raise ValueError(
                f"{kept} holds {len(success)} outcomes, expected {len(starts)}; delete it to evaluate anew"
            )
        return Evaluation(
            success, np.ones(len(starts), bool), nothing, nothing, seeds, nothing.astype(int), ids, ("",) * len(starts)
        )
    loaded = SmallFlowPolicy.from_pretrained(policy)
    env = make_environment(SIMULATOR, WorldConfig(num_envs=50), chunk_length=loaded.chunk_length)
    try:
        evaluation = evaluate_policy(loaded, env, starts)
    finally:
        env.close()
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial.npy")
    np.save(partial, evaluation.success)
    partial.rename(kept)  # a killed run leaves no half file
    return evaluation


def play(config: Config, run: Run) -> Comparison:
    """Trains and evaluates one run, as far as that is not done, and compares it with the first policy."""
    torch.set_num_threads(1)
    folder = config.out / run.name
    before = evaluated(config, config.policy, config.out / "before.npy")
    settings = training(config, run)
    if (folder / "policy" / "config.json").exists():
        RunFolder(folder).require(settings)  # its name does not tell the number of updates, among others
    else:
        GRPOTrainer(settings).train()
    return compare(before, evaluated(config, folder / "policy", folder / "success.npy"))


def tables(config: Config, results: dict[Run, Comparison]) -> str:
    """Returns the Markdown table: one row per arm, environment and number of snapshots."""
    cells: dict[tuple[str, str, int], list[Comparison]] = defaultdict(list)
    for run, result in results.items():
        cells[run.arm, run.env, run.snapshots].append(result)
    before = next(iter(results.values())).before
    lines = [
        f"First policy: {100 * before:.1f} % in {SIMULATOR} (n = {config.starts}). Change in percentage points, "
        "paired, with its 95 % interval, by seed.",
        "",
        "| algorithm | reward from | snapshots | success % | change, mean | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for (arm, env, snapshots), group in cells.items():
        seeds = "; ".join(f"{one.difference:+.1f} [{one.low:+.1f}, {one.high:+.1f}]" for one in group)
        after, change = np.mean([one.after for one in group]), np.mean([one.difference for one in group])
        lines.append(f"| {ARMS[arm][0]} | {env} | {snapshots} | {100 * after:.1f} | {change:+.1f} | {seeds} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Runs what is missing and writes ``reinforcement.md`` and ``reinforcement.json``."""
    unknown = [arm for arm in config.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"unknown arms {unknown}; expected some of {list(ARMS)}")
    for count in config.snapshots:
        if not snapshot_folder(config, count).exists():
            record_snapshots(snapshot_folder(config, count), count, FIRST_SNAPSHOT)
    runs = [
        Run(arm, env, count, seed)
        for seed in config.seeds
        for count in config.snapshots
        for env in config.envs
        for arm in config.arms
    ]
    evaluated(config, config.policy, config.out / "before.npy")
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(zip(runs, pool.map(play, [config] * len(runs), runs), strict=True))
    (config.out / "reinforcement.md").write_text(tables(config, results))
    figures = [{"run": run.name, **result.to_dict()} for run, result in results.items()]
    (config.out / "reinforcement.json").write_text(to_json(figures))
    print(tables(config, results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
