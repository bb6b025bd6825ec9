"""A LIBERO evaluation loop on an imagined world: the import of ``OffScreenRenderEnv`` is the one line that differs.

``python examples/eval_libero.py`` takes a few seconds on one CPU core. Without ``env_id=``, the suite in the file's
path gives the world, for instance ``Prophet-LiberoGoal-v0``; its weights are yours to train.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro

from prophet_gym.compat.libero import OffScreenRenderEnv


@dataclass(frozen=True)
class Config:
    """Size of the evaluation."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    episodes: int = 2
    """Rollouts."""
    max_steps: int = 40
    """Commands of a rollout, after those that wait."""


def policy(image: np.ndarray, state: np.ndarray) -> list[float]:
    """Reaches down and closes the gripper, whatever it sees: put yours here."""
    return [0.0, 0.0, -0.1, 0.0, 0.0, 0.0, 1.0]


def main(config: Config) -> None:
    """Evaluate, as LIBERO's users do: `done` is success."""
    env_args = {"bddl_file_name": "libero_goal/task.bddl", "camera_heights": 256, "camera_widths": 256}
    env = OffScreenRenderEnv(
        **env_args, env_id="Prophet-Tabletop-v0", checkpoint=config.checkpoint, action_buffer="chunk", chunk_length=8
    )
    env.seed(0)
    successes, num_steps_wait = 0, 2
    for _ in range(config.episodes):
        obs = env.reset()
        for t in range(config.max_steps + num_steps_wait):
            if t < num_steps_wait:
                action = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
            else:
                image = obs["agentview_image"][::-1, ::-1]
                state = np.concatenate([obs["robot0_eef_pos"], obs["robot0_eef_quat"], obs["robot0_gripper_qpos"]])
                action = policy(image, state)
            obs, reward, done, info = env.step(action)
            if done:
                successes += 1
                break
        print(f"{env.language_instruction}: success {done} after {t + 1} commands")
    env.close()
    print(f"success rate {successes / config.episodes:.2f} of {config.episodes}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
