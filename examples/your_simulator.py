"""Reinforce a policy in somebody else's simulator: Gymnasium's MuJoCo pendulum, behind the same trainer as Prophet.

    python examples/your_simulator.py --updates 40

The policy starts from nothing, its commands are noise. `ChunkedEnv` turns an environment with single commands into one
with chunks; the trainer sees a vector environment like any other.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv

from prophet_gym.compat.chunked import ChunkedEnv
from prophet_gym.sims.vector import make_sync_vector_env
from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig
from prophrl_agents.config import TrainConfig
from prophrl_agents.evaluate import compare, evaluate_policy, evaluate_starts
from prophrl_agents.trainer import GRPOTrainer

CHUNK, TASK = 2, "balance the pole"


@dataclass(frozen=True)
class Config:
    """Size of the run; the default takes a few minutes on two cores."""

    run: Path = Path("runs/examples/your_simulator")
    """Run folder."""
    updates: int = 40
    """Updates."""
    rollouts: int = 256
    """Rollouts of an update, in groups of 8."""
    commands: int = 200
    """Longest episode."""
    starts: int = 100
    """Episodes of the evaluation before and after."""
    seed: int = 0
    """Of the policy, the starts and the noise."""


def make_pendulum(num_envs: int, commands: int) -> VectorEnv:
    """Returns slots that run until the pole falls, reward 1 per command; the state says it all, the image is blank."""

    def make() -> gym.Env:
        env = gym.make("InvertedPendulum-v5", max_episode_steps=commands)
        return ChunkedEnv(env, CHUNK, image=lambda _: np.zeros((8, 8, 3), np.uint8), image_size=8, instruction=TASK)

    return make_sync_vector_env(make, num_envs, AutoresetMode.DISABLED)


def make_policy(seed: int) -> SmallFlowPolicy:
    """Returns an untrained policy for the pendulum's force, one number in newtons from -3 to 3."""
    torch.manual_seed(seed)
    config = SmallFlowPolicyConfig(
        tuple(TASK.split()), image_size=8, state_dim=4, chunk_length=CHUNK, action_dim=1, trunk_width=8, feature_dim=32,
        head_width=64, head_blocks=2,
    )  # fmt: skip
    one, state = np.ones(1), np.ones(4)
    return SmallFlowPolicy(config, PolicyStatistics(0 * one, one, -3 * one, 3 * one, 0 * state, 0.1 * state))


def main(config: Config) -> None:
    """Measures, trains, measures again."""
    env, policy = make_pendulum(64, config.commands), make_policy(config.seed)
    starts = evaluate_starts(config.starts, 0)
    before = evaluate_policy(policy, env, starts)
    settings = TrainConfig(
        run=config.run,
        seed=config.seed,
        updates=config.updates,
        rollouts_per_update=config.rollouts,
        mini_batch=config.rollouts // 2,
        epochs=2,
        learning_rate=1e-3,
        warmup_updates=3,
        eval_every=0,
        videos_every=0,
    )
    GRPOTrainer(settings, policy=policy, env=env).train()
    after = evaluate_policy(policy, env, starts)
    env.close()
    rows = {name: one.rewards.mean() for name, one in (("before", before), ("after", after))}
    print(", ".join(f"{name}: {mean:.1f} of {config.commands} commands upright" for name, mean in rows.items()))
    upright = [replace(one, success=one.rewards >= config.commands) for one in (before, after)]
    gain = compare(*upright)
    print(f"whole episodes upright: {gain.before:.0%} before, {gain.after:.0%} after, n = {gain.starts}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
