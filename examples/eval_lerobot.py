"""LeRobot's rollout loop on a batch of imagined worlds; lerobot itself is not needed.

``python examples/eval_lerobot.py`` takes a few seconds on one CPU core. To serve a world from a hub repository, its
``env.py`` is one line: ``from prophet_gym.compat.lerobot import make_env``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro

from prophet_gym.compat.lerobot import make_env


@dataclass(frozen=True)
class Config:
    """Size of the evaluation."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    num_envs: int = 4
    """Worlds side by side."""
    horizon: int = 40
    """Time limit in commands, a whole number of chunks of 8."""
    seed: int = 0
    """Of the first start frame."""


def select_action(observation: dict) -> np.ndarray:
    """Reaches down and closes the gripper, whatever it sees: put your policy here."""
    return np.tile(np.array([0.0, 0.0, -0.004, 0.0, 0.0, 0.0, 0.0], np.float32), (len(observation["pixels"]), 1))


def main(config: Config) -> None:
    """Roll out once, as LeRobot does: success is in `final_info` of the step that ends a rollout."""
    options = {"checkpoint": config.checkpoint, "horizon": config.horizon, "chunk_length": 8}
    env = make_env(n_envs=config.num_envs, action_buffer="chunk", **options)["Prophet-Tabletop-v0"][0]
    observation, info = env.reset(seed=[config.seed + i for i in range(config.num_envs)])
    tasks = env.call("task_description")
    done, success = np.zeros((2, config.num_envs), dtype=bool)
    for _ in range(env.call("_max_episode_steps")[0]):
        observation, reward, terminated, truncated, info = env.step(select_action(observation))
        if "final_info" in info:
            success |= info["final_info"]["is_success"] & ~done
        done |= terminated | truncated
        if done.all():
            break
    for task, succeeded in zip(tasks, success, strict=True):
        print(f"{task}: success {succeeded}")
    print(f"success rate {success.mean():.2f} of {config.num_envs}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
