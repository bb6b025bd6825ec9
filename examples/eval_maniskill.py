"""ManiSkill3's evaluation loop on imagined worlds: the import of ``gymnasium`` is the one line that differs.

``python examples/eval_maniskill.py`` takes a few seconds on one CPU core. Without ``env_id=``, ``Prophet-Bridge-v0``
stands behind the task; its weights are yours to train.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from prophet_gym.compat import maniskill as gym


@dataclass(frozen=True)
class Config:
    """Size of the evaluation."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    num_envs: int = 2
    """Worlds side by side, one model call a step."""
    episodes: int = 4
    """Start frames, episode_id 0, 1, ..., in whole batches."""
    horizon: int = 40
    """Time limit in commands."""
    chunk_length: int = 8
    """Commands per prediction: what the policy plans at once."""


def policy(images: torch.Tensor, instructions: list[str]) -> torch.Tensor:
    """Reaches down and closes the gripper, whatever it sees (B, 480, 640, 3): put yours here."""
    return torch.tensor([[0.0, 0.0, -0.004, 0.0, 0.0, 0.0, -1.0]]).repeat(len(images), 1)


def main(config: Config) -> None:
    """Evaluate, as ManiSkill's users do: every entry of the last step's info is averaged."""
    env = gym.make(
        "PutCarrotOnPlateInScene-v1",
        obs_mode="rgb+segmentation",
        num_envs=config.num_envs,
        env_id="Prophet-Tabletop-v0",
        checkpoint=config.checkpoint,
        max_episode_steps=config.horizon,
        chunk_length=config.chunk_length,
        action_buffer="chunk",
    )
    metrics, count = defaultdict(list), 0
    while count < config.episodes:
        ids = torch.arange(count, count + config.num_envs)
        obs, _ = env.reset(seed=count, options={"episode_id": ids})
        instructions = env.unwrapped.get_language_instruction()
        truncated = torch.zeros(config.num_envs, dtype=torch.bool)
        while not truncated.any():
            image = obs["sensor_data"]["3rd_view_camera"]["rgb"]
            obs, reward, terminated, truncated, info = env.step(policy(image, instructions))
        for key, value in info.items():
            metrics[key].append(value.flatten().float().numpy())
        count += config.num_envs
        print(f"{instructions}: success {info['success'].tolist()}, judged {info['judge_valid'].tolist()}")
    env.close()
    print(f"success rate {np.mean(metrics['success']):.2f} of {count}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
