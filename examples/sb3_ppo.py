"""Stable-Baselines3 on a world model: ``interface="flat"`` gives an image in and one vector per chunk out.

``python examples/sb3_ppo.py`` takes a few hundred env steps, enough to see it run; success from pixels and a sparse
reward needs far more. Abstentions of the judge (``info["judge_valid"]``) count as reward 0 here, since PPO has no mask
for them: give a judge that always decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import tyro
from stable_baselines3 import PPO

import prophet_gym  # noqa: F401  registers the ids


@dataclass(frozen=True)
class Config:
    """Length of the run."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    total_timesteps: int = 256
    """Env steps (chunks), rounded up to whole batches of rollouts."""
    n_steps: int = 64
    """Env steps between two updates."""
    horizon: int = 40
    """Commands of a rollout."""
    seed: int = 0
    """Of policy, start frames and noise."""


def main(config: Config) -> None:
    """Train, then act."""
    env = gym.make("Prophet-Tabletop-v0", checkpoint=config.checkpoint, horizon=config.horizon, interface="flat")
    batch_size = min(32, config.n_steps)
    model = PPO(
        "CnnPolicy", env, n_steps=config.n_steps, batch_size=batch_size, seed=config.seed, device="cpu", verbose=1
    )
    model.learn(config.total_timesteps)
    observation, info = env.reset(seed=config.seed)
    terminated = truncated = False
    while not (terminated or truncated):
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, info = env.step(action)
    print(f"{info['instruction']}: reward {reward:g}, verdict {info['verdict']}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
