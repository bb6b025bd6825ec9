"""Any callable can be the judge: here, is the block where the plate is? Checked, then used as the reward of a world.

``python examples/write_a_judge.py`` takes a few seconds on one CPU core.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro

import prophet_gym
from prophet_gym import Verdict

COLORS = {
    "red": (210, 35, 30),
    "green": (40, 160, 55),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "blue": (45, 85, 215),
    "white": (245, 245, 245),
}
"""RGB of blocks and plates on Tabletop."""


def centroid(frame: np.ndarray, color: str) -> np.ndarray | None:
    """Where an (H, W, 3) frame shows a colour: (u, v) as shares of width and height; None if it hardly does."""
    distance = np.linalg.norm(frame.astype(float) - COLORS[color], axis=-1)
    v, u = np.nonzero(distance < 60)
    return np.array([u.mean(), v.mean()]) / frame.shape[1::-1] if u.size > frame[..., 0].size / 500 else None


def block_on_plate(frames: np.ndarray, instruction: str) -> Verdict:
    """Judge "put the X block on the Y plate" by the last frame.

    Args:
        frames: (T, H, W, 3) uint8, the snapshot's frame first.
        instruction: the goal in words.

    Returns:
        A verdict that abstains on other instructions, and where block or plate is out of sight. It does not see whether
        the gripper let go: it will reward a policy that only carries the block there.
    """
    asked = re.fullmatch(r"put the (\w+) block on the (\w+) plate", instruction)
    if asked is None or not {asked[1], asked[2]} <= COLORS.keys():
        return Verdict.abstain(f"this judge does not know how to check {instruction!r}")
    block, plate = centroid(frames[-1], asked[1]), centroid(frames[-1], asked[2])
    if block is None or plate is None:
        return Verdict.abstain(f"no {asked[1] if block is None else asked[2]} in sight")
    apart = float(np.linalg.norm(block - plate))
    return Verdict(success=apart < 0.1, score=float(np.exp(-7 * apart)))


@dataclass(frozen=True)
class Config:
    """Where the judge is used."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    horizon: int = 40
    """Commands of a rollout."""
    rollouts: int = 4
    """Rollouts of random commands."""


def main(config: Config) -> None:
    """Check the judge, then let it give the reward."""
    prophet_gym.check_judge(block_on_plate)  # lengths, batches, bad input, repeatability; raises with the likely cause
    print("check_judge: passed")
    env = gym.make("Prophet-Tabletop-v0", checkpoint=config.checkpoint, horizon=config.horizon, judge=block_on_plate)
    for seed in range(config.rollouts):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        terminated = truncated = False
        while not (terminated or truncated):
            _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        said = f"{info['verdict'].score:.2f}" if info["judge_valid"] else f"abstains, {info['verdict'].reason}"
        print(f"{info['instruction']}: reward {reward:g} (judge: {said})")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
