"""Where the seconds of reinforcement go: rollouts in Prophet and in the simulator, and the update after them.

``python benchmarks/loop.py`` collects one batch of rollouts in each environment with the same policy and learns from
it, after a warm-up; the ratio of the two rollout rates is of the same run.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from prophet_gym.strict_json import to_json
from prophrl_agents.config import TABLETOP, WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import evaluate_starts
from prophrl_agents.learner import Learner
from prophrl_agents.policies.small import SmallFlowPolicy
from prophrl_agents.rollout import collect_groups
from prophrl_agents.update import update_policy

ENVIRONMENTS = {"Prophet-Tabletop-v0": "bfloat16", "Prophet-Tabletop-v0 (float32)": "float32", "Tabletop-v0": None}


@dataclass(frozen=True)
class Config:
    """Size of the measurement."""

    policy: Path = Path("tabletop-sft")
    """Packaged name or folder of the policy."""
    out: Path = Path("runs/benchmark-loop")
    """Where loop.md and loop.json go."""
    rollouts: int = 256
    """Rollouts of a batch, in groups of 8."""
    slots: int = 64
    """Rollouts side by side."""
    batches: int = 3
    """Batches that are measured; one more warms up."""
    threads: int = 2
    """CPU threads."""


def measure(config: Config, name: str, dtype: str | None) -> dict[str, float]:
    """Returns the mean seconds of each stage of one environment."""
    settings = replace(TABLETOP, rollouts_per_update=config.rollouts, mini_batch=config.rollouts // 2, log_grad_every=0)
    policy = SmallFlowPolicy.from_pretrained(config.policy)
    learner = Learner.build(policy, settings)
    world = WorldConfig(num_envs=config.slots, dtype=dtype)
    env = make_environment(name.split()[0], world, chunk_length=policy.chunk_length)
    starts = evaluate_starts(config.rollouts // 8 * (config.batches + 1), 0)
    total = {"env": 0.0, "policy": 0.0, "collect": 0.0, "update": 0.0, "commands": 0.0}
    for i in range(config.batches + 1):
        batch = collect_groups(env, policy, starts[i :: config.batches + 1], 8, noise_seed=i)
        update = update_policy(learner, batch, settings, i)
        if i:
            total["env"] += batch.seconds["env"] / config.batches
            total["policy"] += batch.seconds["policy"] / config.batches
            total["collect"] += batch.seconds["total"] / config.batches
            total["update"] += update["seconds_update"] / config.batches
            total["commands"] += float(batch.mask.sum()) / config.batches
    env.close()
    return total


def main(config: Config) -> None:
    """Measures, prints and writes the table."""
    torch.set_num_threads(config.threads)
    results = {name: measure(config, name, dtype) for name, dtype in ENVIRONMENTS.items()}
    lines = [
        f"{config.rollouts} rollouts an update, {config.slots} side by side, {config.threads} threads of "
        f"{os.cpu_count()} cores ({platform.machine()}), mean of {config.batches} batches",
        "",
        "| environment | world and judge, s | policy, s | update, s | rollouts/s | frames/s | against the simulator |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = config.rollouts / results["Tabletop-v0"]["collect"]
    for name, one in results.items():
        rate = config.rollouts / one["collect"]
        lines.append(
            f"| {name} | {one['env']:.2f} | {one['policy']:.2f} | {one['update']:.2f} | {rate:.1f} | "
            f"{one['commands'] / one['collect']:.0f} | x{rate / reference:.2f} |"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "loop.md").write_text("\n".join(lines) + "\n")
    (config.out / "loop.json").write_text(to_json(results))
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
