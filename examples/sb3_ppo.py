"""Stable-Baselines3 on a world model: ``make_vec_env`` steps all slots in one model call, one vector per chunk.

``python examples/sb3_ppo.py`` takes a few hundred env steps, enough to see it run; ``benchmarks/sb3_ppo.py`` goes on
until something is learned, with an easier judge. Abstentions of the judge (``info["judge_valid"]``) count as reward 0
here, since PPO has no mask for them: give a judge that always decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from stable_baselines3 import PPO

from prophet_gym.compat.sb3 import make_vec_env


@dataclass(frozen=True)
class Config:
    """Length of the run."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    total_timesteps: int = 256
    """Env steps (chunks), rounded up to whole batches of rollouts."""
    n_envs: int = 4
    """Worlds side by side."""
    n_steps: int = 16
    """Env steps of each world between two updates."""
    horizon: int = 40
    """Commands of a rollout."""
    seed: int = 0
    """Of policy, start frames and noise."""


def main(config: Config) -> None:
    """Train, then act."""
    worlds = {"checkpoint": config.checkpoint, "horizon": config.horizon}
    env = make_vec_env("Prophet-Tabletop-v0", n_envs=config.n_envs, seed=config.seed, env_kwargs=worlds)
    batch_size = min(32, config.n_steps * config.n_envs)
    model = PPO(
        "CnnPolicy", env, n_steps=config.n_steps, batch_size=batch_size, seed=config.seed, device="cpu", verbose=1
    )
    model.learn(config.total_timesteps)
    env.seed(config.seed)
    observation = env.reset()
    done = [False]
    while not done[0]:
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, done, infos = env.step(action)
    print(f"{infos[0]['instruction']}: reward {reward[0]:g}, verdict {infos[0]['verdict']}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
