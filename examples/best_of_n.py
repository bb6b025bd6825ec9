"""Best of N in imagination: fork a running rollout, try a random plan in each copy, judge them, play the best.

Random shooting, the simplest planner there is. ``python examples/best_of_n.py`` takes seconds on one CPU core; more
members find better plans, and more holes in the judge.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import tyro

import prophet_gym


@dataclass(frozen=True)
class Config:
    """Size of the search."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    members: int = 32
    """Plans tried."""
    horizon: int = 40
    """Commands of the rollout."""
    seed: int = 0
    """Of start frame, noise and plans."""


def draw_plans(space: gym.spaces.Box, members: int, chunks: int, rng: np.random.Generator) -> np.ndarray:
    """Return (chunks, members, C, 7) commands: each chunk holds one random command, so that plans go somewhere."""
    held = rng.uniform(space.low[0], space.high[0], (chunks, members, 1, space.shape[1]))
    held[..., 6] = held[..., 6] > 0.5  # jaws open or closed
    return np.repeat(held, space.shape[0], axis=2).astype(np.float32)


def score(verdict: prophet_gym.Verdict) -> float:
    """The judge's belief in success; an abstention ranks behind every judged plan."""
    return verdict.score if verdict.valid else -np.inf


def play(env: gym.Env, plan: np.ndarray) -> prophet_gym.Verdict:
    """Execute the chunks (chunks, C, 7) of one plan and return the verdict at the horizon."""
    for chunk in plan:
        *_, info = env.step(chunk)
    return info["verdict"]


def main(config: Config) -> None:
    """Fork in the middle of a rollout, search, restore, compare."""
    env = gym.make("Prophet-Tabletop-v0", checkpoint=config.checkpoint, horizon=config.horizon)
    world = env.unwrapped
    rng = np.random.default_rng(config.seed)
    chunk_length = env.action_space.shape[0]
    chunks = -(-config.horizon // chunk_length)
    _, info = env.reset(seed=config.seed)
    env.step(draw_plans(env.action_space, 1, 1, rng)[0, 0])  # some way into the rollout
    middle = world.get_state()  # frames, history, pose, counters, random numbers: all that the future depends on

    members = world.fork(config.members)  # a vector environment; `env` itself stays where it is
    plans = draw_plans(env.action_space, config.members, chunks - 1, rng)
    for chunk in plans:  # one model call per chunk for all members
        *_, outcome = members.step(chunk)
    scores = np.array([score(verdict) for verdict in outcome["verdict"]])
    best, worst = int(scores.argmax()), int(scores.argmin())
    judged = np.isfinite(scores)
    print(f"{info['instruction']}: {judged.sum()} of {config.members} plans judged")
    if not judged.any():
        print(f"nothing to choose by: {outcome['verdict'][0].reason}")

    # Members share their parent's noise, so the winner's future is what happens when its plan is played.
    print(f"best plan:  {scores[best]:.3f} imagined, {score(play(env, plans[:, best])):.3f} played")
    world.set_state(middle)  # back to the fork, as often as you like
    print(f"worst plan: {scores[worst]:.3f} imagined, {score(play(env, plans[:, worst])):.3f} played")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
