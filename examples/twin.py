"""The world model beside the truth: one start, one list of commands, played by MuJoCo and imagined by Prophet.

``python examples/twin.py`` writes one picture, simulator above, imagination below. Needs MuJoCo rendering (OSMesa or
EGL); takes seconds on one CPU core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import prophet_gym
from prophet_gym.metrics import Comparison, draw_strips, fidelity_metrics, save_png
from prophet_gym.sims.expert import ExpertConfig, ScriptedExpert

gym.register_envs(prophet_gym)


@dataclass(frozen=True)
class Config:
    """What is played."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    out: Path = Path("runs/examples/twin.png")
    """The picture."""
    horizon: int = 40
    """Commands at most; the simulator stops at success."""
    seed: int = 4_000_000
    """Of scene and noise; no training scene has a seed this high."""


def main(config: Config) -> None:
    """Play the script in the simulator, then its commands in the world model."""
    truth = gym.make("Tabletop-v0", horizon=config.horizon, chunk_length=1)
    observation, info = truth.reset(seed=config.seed)
    snapshot = truth.unwrapped.snapshot()  # image, instruction, pose, camera: all that the world model gets to know
    expert = ScriptedExpert(ExpertConfig(), seed=config.seed)  # it looks at the simulator's state, so it goes first
    commands, real = [], [observation["image"]]
    terminated = truncated = False
    while not (terminated or truncated):
        commands.append(expert.act(truth.unwrapped.sim))
        _, _, terminated, truncated, info = truth.step(commands[-1][None])
        real.append(info["frames"][-1])
    print(f"{info['instruction']}: simulator says success={terminated} after {len(commands)} commands")

    # Both ids have the same spaces and info keys; here the world model takes the commands in chunks of its own.
    world = gym.make("Prophet-Tabletop-v0", checkpoint=config.checkpoint, horizon=len(commands))
    observation, _ = world.reset(seed=config.seed, options={"snapshot": snapshot})
    imagined, length = [observation["image"][None]], world.action_space.shape[0]
    for start in range(0, len(commands), length):
        *_, info = world.step(np.array(commands[start : start + length], dtype=np.float32))
        imagined.append(info["frames"])
    verdict = info["verdict"]
    print(f"judge on the imagined frames: {verdict.success if verdict.valid else verdict.reason}")

    comparison = Comparison(snapshot.instruction, np.stack(real), np.concatenate(imagined))
    figures = fidelity_metrics(comparison.real[1:], comparison.imagined[1:])
    print(f"PSNR {figures['psnr']:.1f} dB, SSIM {figures['ssim']:.3f}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(config.out, draw_strips([comparison]))
    print(f"picture: {config.out}")
    truth.close()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
