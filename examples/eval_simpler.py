"""SimplerEnv's evaluation loop on an imagined world: the import of ``simpler_env`` is the one line that differs.

``python examples/eval_simpler.py`` takes a few seconds on one CPU core. Without ``env_id=``, ``Prophet-Bridge-v0``
stands behind the task; its weights are yours to train.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro

from prophet_gym.compat import simpler as simpler_env
from prophet_gym.compat.simpler import get_image_from_maniskill2_obs_dict


@dataclass(frozen=True)
class Config:
    """Size of the evaluation."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    episodes: int = 2
    """Start frames, episode_id 0, 1, ..."""
    horizon: int = 40
    """Time limit in commands."""
    chunk_length: int = 8
    """Commands per prediction: what the policy plans at once."""


def policy(image: np.ndarray, instruction: str) -> np.ndarray:
    """Reaches down and closes the gripper, whatever it sees: put yours here."""
    return np.array([0.0, 0.0, -0.004, 0.0, 0.0, 0.0, -1.0])


def main(config: Config) -> None:
    """Evaluate, as SimplerEnv's users do: success is the last step's."""
    env = simpler_env.make(
        "widowx_carrot_on_plate",
        env_id="Prophet-Tabletop-v0",
        checkpoint=config.checkpoint,
        horizon=config.horizon,
        chunk_length=config.chunk_length,
        action_buffer="chunk",
    )
    successes = []
    for episode_id in range(config.episodes):
        obs, _ = env.reset(options={"obj_init_options": {"episode_id": episode_id}})
        instruction = env.get_language_instruction()
        done, truncated = False, False
        while not truncated:
            image = get_image_from_maniskill2_obs_dict(env, obs)
            obs, reward, done, truncated, info = env.step(policy(image, instruction))
        successes.append(done)
        print(f"{instruction}: success {done}, judged {info['judge_valid']}, {info['elapsed_steps']} commands")
    print(f"success rate {np.mean(successes):.2f} of {len(successes)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
