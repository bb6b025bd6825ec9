"""Stable-Baselines3's PPO on the batched ``VecEnv``: does the return rise, and is what was learned true?

``python benchmarks/sb3_ppo.py`` learns from pixels on ``Prophet-Tabletop-v0`` through the flat interface, with a
hand-written judge as its reward: *the hand ends in the left third of the picture*. Two chunks of four commands,
reward 0 or 1 at the end. Before and after learning, the same deterministic policy plays the same starts, in the
imagined world and in the simulator, which it never saw; there, the same judge looks at the simulator's frames.
Table and JSON go to ``runs/benchmark-sb3``.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from prophet_gym.atomic import atomic_text
from prophet_gym.compat.sb3 import make_vec_env
from prophet_gym.judges.calibration import wilson_interval
from prophet_gym.strict_json import to_json

WORLD, SIMULATOR = "Prophet-Tabletop-v0", "Tabletop-v0"
CHUNK, HORIZON = 4, 8
FIRST_START = 70_000  # seeds of the evaluation's starts; training counts from its own seed


@dataclass(frozen=True)
class Config:
    """Length of the runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of policy, starts and noise: one run each."""
    updates: int = 12
    """PPO updates."""
    n_envs: int = 32
    """Worlds side by side."""
    n_steps: int = 8
    """Env steps of each world between two updates."""
    starts: int = 128
    """Starts of an evaluation, a whole number of batches."""
    out: Path = Path("runs/benchmark-sb3")
    """Where table and figures go; finished seeds found there are kept."""


def hand_on_the_left(frames: np.ndarray, instruction: str) -> bool:
    """Judges whether the (dark) hand ends in the left third of the picture; the instruction does not matter."""
    columns = np.nonzero(frames[-1].max(axis=-1) < 70)[1]
    return bool(columns.size >= 8 and columns.mean() < frames.shape[2] / 3)


def make(env_id: str, n_envs: int, seed: int) -> Any:
    """Returns the batched ``VecEnv``; the simulator has a judge of its own, which is not asked here."""
    options: dict[str, Any] = {"chunk_length": CHUNK, "horizon": HORIZON}
    if env_id == WORLD:
        options |= {"judge": hand_on_the_left, "dtype": "auto"}
    return make_vec_env(env_id, n_envs, seed, env_kwargs=options)


def evaluate(model: PPO, env_id: str, config: Config) -> np.ndarray:
    """Returns the reward (starts,) of the deterministic policy from the same starts at every call."""
    env = make(env_id, config.n_envs, FIRST_START)
    rewards = []
    for batch in range(config.starts // config.n_envs):
        env.seed(FIRST_START + batch * config.n_envs)
        images = env.reset()
        frames = [images[:, None]]
        for _ in range(HORIZON // CHUNK):
            images, _, _, infos = env.step(model.predict(images, deterministic=True)[0])
            frames.append(np.stack([info["frames"] for info in infos]))
        goals = [info["instruction"] for info in infos]
        rollouts = np.concatenate(frames, axis=1)
        rewards += [float(hand_on_the_left(*pair)) for pair in zip(rollouts, goals, strict=True)]
    env.close()
    return np.array(rewards)


class Returns(BaseCallback):
    """The mean return of the rollouts of every update, as the exploring policy collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        newest = list(self.model.ep_info_buffer or ())
        self.means.append(float(np.mean([episode["r"] for episode in newest])))
        self.model.ep_info_buffer.clear()


def run(config: Config, seed: int) -> dict[str, Any]:
    """Learns with one seed; returns its figures."""
    env = make(WORLD, config.n_envs, seed)
    size = config.n_envs * config.n_steps
    model = PPO(
        "CnnPolicy",
        env,
        n_steps=config.n_steps,
        batch_size=min(64, size),
        n_epochs=6,
        learning_rate=6e-4,
        gamma=1.0,
        gae_lambda=1.0,
        stats_window_size=size,
        policy_kwargs={"features_extractor_kwargs": {"features_dim": 128}, "log_std_init": -0.5},
        seed=seed,
        device="cpu",
    )
    before = {env_id: evaluate(model, env_id, config) for env_id in (WORLD, SIMULATOR)}
    returns, start = Returns(), time.perf_counter()
    model.learn(config.updates * size, callback=returns)
    seconds = time.perf_counter() - start
    env.close()
    after = {env_id: evaluate(model, env_id, config) for env_id in (WORLD, SIMULATOR)}
    return {
        "seed": seed,
        "seconds": seconds,
        "returns": returns.means,
        "before": {env_id: rewards.tolist() for env_id, rewards in before.items()},
        "after": {env_id: rewards.tolist() for env_id, rewards in after.items()},
    }


def share(rewards: list[float]) -> str:
    """Returns the mean of 0/1 rewards with its 95 % Wilson interval."""
    low, high = wilson_interval(int(sum(rewards)), len(rewards))
    return f"{np.mean(rewards):.2f} [{low:.2f}, {high:.2f}]"


def table(config: Config, results: list[dict[str, Any]]) -> str:
    """Returns the Markdown table: one row per seed."""
    rollouts = config.n_envs * config.n_steps * CHUNK // HORIZON
    lines = [
        f"{config.updates} updates of {rollouts} rollouts; {config.starts} starts an evaluation; one thread of "
        f"{os.cpu_count()} cores ({platform.machine()})",
        "",
        f"| seed | return, first and last update | {WORLD}, before | after | {SIMULATOR}, before | after | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        cells = [share(one[when][env_id]) for env_id in (WORLD, SIMULATOR) for when in ("before", "after")]
        curve = f"{one['returns'][0]:.2f} → {one['returns'][-1]:.2f}"
        lines.append(f"| {one['seed']} | {curve} | {' | '.join(cells)} | {one['seconds'] / 60:.1f} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs the seeds that are missing and writes ``sb3_ppo.md`` and ``sb3_ppo.json``."""
    if config.starts % config.n_envs:
        raise ValueError(f"starts={config.starts} is no whole number of batches of n_envs={config.n_envs}")
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in config.seeds:
        kept = config.out / f"seed-{seed}.json"
        if not kept.exists():
            atomic_text(kept, to_json(run(config, seed)))
        results.append(json.loads(kept.read_text()))
    atomic_text(config.out / "sb3_ppo.json", to_json(results))
    atomic_text(config.out / "sb3_ppo.md", table(config, results) + "\n")
    print(table(config, results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
