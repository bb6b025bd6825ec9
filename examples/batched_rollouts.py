"""Many rollouts at once: one model call steps all slots. What happens when a slot ends is the autoreset mode's choice.

``python examples/batched_rollouts.py`` runs all three modes and prints imagined frames per second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv

import prophet_gym

gym.register_envs(prophet_gym)


@dataclass(frozen=True)
class Config:
    """Size of the batch."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    num_envs: int = 16
    """Slots."""
    horizon: int = 40
    """Commands of a rollout."""
    steps: int = 12
    """Env steps (chunks) taken in each mode."""
    seed: int = 0
    """Slot i is seeded with seed + i, and is the same as a lone environment with that seed."""


def next_step(envs: VectorEnv, steps: int) -> tuple[int, int]:
    """The default: a slot that ended spends the next step on its reset. That step ignores its action, has reward 0.

    Learners mask those steps: a transition across two rollouts is no transition. Every slot ends at the same time here
    unless the judge is asked after each chunk (``judge_every_chunk=True``).
    """
    frames = rollouts = 0
    for _ in range(steps):
        _, _, terminated, truncated, info = envs.step(envs.action_space.sample())
        if "frames" in info:  # absent if every slot was reset in this step
            frames += info["_frames"].sum() * info["frames"].shape[1]  # "_frames": which slots moved
        rollouts += (terminated | truncated).sum()
    return frames, rollouts


def same_step(envs: VectorEnv, steps: int) -> tuple[int, int]:
    """A slot that ends is reset at once: the observation is the next rollout's, how the last one ended is in the info.

    No step is lost, but values must be bootstrapped from ``info["final_obs"]``, not from the observation.
    """
    frames = rollouts = 0
    for _ in range(steps):
        *_, info = envs.step(envs.action_space.sample())
        for facts, mask in ((info, info.get("_frames")), (info.get("final_info", {}), info.get("_final_info"))):
            if "frames" in facts:
                frames += mask.sum() * facts["frames"].shape[1]
        rollouts += info["_final_info"].sum() if "final_info" in info else 0
    return frames, rollouts


def disabled(envs: VectorEnv, steps: int) -> tuple[int, int]:
    """Slots that ended are held and cost nothing until the caller resets them: for groups that must end together."""
    frames = rollouts = 0
    for _ in range(steps):
        _, _, terminated, truncated, info = envs.step(envs.action_space.sample())
        frames += info["_frames"].sum() * info["frames"].shape[1]
        ended = terminated | truncated
        if ended.all():  # or at once those that ended: options={"reset_mask": ended}
            envs.reset(options={"reset_mask": np.ones(envs.num_envs, dtype=bool)})
            rollouts += envs.num_envs
    return frames, rollouts


MODES = {
    AutoresetMode.NEXT_STEP: next_step,
    AutoresetMode.SAME_STEP: same_step,
    AutoresetMode.DISABLED: disabled,
}


def main(config: Config) -> None:
    """Roll out in each mode."""
    for mode, run in MODES.items():
        envs = gym.make_vec(
            "Prophet-Tabletop-v0",
            num_envs=config.num_envs,
            checkpoint=config.checkpoint,
            horizon=config.horizon,
            autoreset_mode=mode,
        )
        envs.action_space.seed(config.seed)
        envs.reset(seed=config.seed)
        start = time.perf_counter()
        frames, rollouts = run(envs, config.steps)
        seconds = time.perf_counter() - start
        print(f"{mode.name:<10} {frames} frames, {rollouts} rollouts ended, {frames / seconds:.0f} frames/s")
        envs.close()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
