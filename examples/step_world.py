"""Step an imagined world: commands in, frames and a verdict out, the rollout as an MP4.

``python examples/step_world.py`` takes a few seconds on one CPU core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import prophet_gym
from prophet_gym.metrics import save_mp4

gym.register_envs(prophet_gym)


@dataclass(frozen=True)
class Config:
    """What is stepped."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    out: Path = Path("runs/examples/step_world.mp4")
    """The video."""
    horizon: int = 40
    """Commands of the rollout."""
    seed: int = 0
    """Of start frame, noise and commands."""


def main(config: Config) -> None:
    """Play random commands until the rollout ends."""
    env = gym.make("Prophet-Tabletop-v0", checkpoint=config.checkpoint, horizon=config.horizon)
    env.action_space.seed(config.seed)
    observation, info = env.reset(seed=config.seed)
    print(f"{info['instruction']} | weights: {info['checkpoint']}")
    frames = [observation["image"][None]]
    terminated = truncated = False
    while not (terminated or truncated):
        chunk = env.action_space.sample()
        chunk[:] = chunk[0]  # one command held for the whole chunk: independent ones cancel each other out
        observation, reward, terminated, truncated, info = env.step(chunk)
        frames.append(info["frames"])  # one image per command; observation["image"] is the last of them
        print(f"env step {info['env_step']}: end-effector at {observation['state'][:3].round(3)} m, reward {reward:g}")
    # A judge that abstains is not a judge that says no: then the reward of 0 means nothing.
    print(f"verdict: {info['verdict']}" if info["judge_valid"] else f"not judged: {info['verdict'].reason}")
    video = np.concatenate(frames).repeat(4, axis=1).repeat(4, axis=2)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_mp4(config.out, video, fps=env.metadata["render_fps"])
    print(f"{len(video)} frames in {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
