"""Recording of what a policy does in a simulator, as episodes that world models and judges can learn from.

A world model that has never seen a policy's mistakes imagines them away, and the policy then learns to make them. A
policy that sees its block slip tries again; one that acts on imagined frames goes on as if it held it. So what a
policy does in a world model is played in the simulator, too: commands from the imagination, frames and success true.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import prophet_gym
from prophet_gym.actions import ActionSpec
from prophet_gym.data.episode import Episode
from prophet_gym.data.record import open_simulator, play, record_set
from prophet_gym.env import ProphetEnv
from prophet_gym.observations import make_observation
from prophet_gym.registration import find_world
from prophet_gym.sims.simulator import Simulator, take_snapshot
from prophet_gym.simulators import SIMULATORS
from prophrl_agents.policies.base import SampleMode
from prophrl_agents.policies.small import SmallFlowPolicy

gym.register_envs(prophet_gym)

__all__ = ["record_policy"]


def record_policy(
    out: str | Path,
    policy: str | Path,
    episodes: int,
    seed: int,
    *,
    steps: int = 40,
    noisy_share: float = 0.5,
    noise_level: float = 0.5,
    workers: int = 2,
    progress: bool = True,
    env_id: str = "Tabletop-v0",
    world: str | None = None,
    checkpoint: str | None = None,
    **options: Any,
) -> int:
    """Record a policy's episodes with seeds ``seed`` to ``seed + episodes - 1``; those already there are skipped.

    An episode is a pure function of seed and weights, those of the world included. Scenes, labels and layout are those
    of ``prophet record``; the recorded behaviour is "policy", or "noisy_policy" where the policy explored as it does
    while it learns; it ends in "_in_world" where the policy saw imagined frames.

    Args:
        out: folder of the set, made if absent.
        policy: folder of a policy for that simulator.
        episodes: size of the complete set.
        seed: seed of the first episode.
        steps: commands per episode.
        noisy_share: share of the episodes played in mode "sde", from 0 to 1; the others are played as deployed.
        noise_level: noise a of the flow SDE in those.
        workers: processes; 0 records in this one.
        progress: show a progress bar with the remaining time.
        env_id: a key of ``prophet_gym.simulators.SIMULATORS``.
        world: id of a world model of that simulator, whose frames the policy sees from the same start on; the simulator
            plays the commands. By default the policy sees the simulator.
        checkpoint: weights of the world model; the packaged ones by default.
        options: of the simulator, such as ``task``; images have the policy's size.

    Returns:
        Number of episodes recorded now.

    Raises:
        MissingExtraError: the simulator's project is not installed, or lacks assets.
        MissingCheckpointError: the world has no weights.
        ValueError: counts or shares out of range, no policy for that simulator in that folder, an unknown world, one
            that takes other commands or shorter chunks, a checkpoint without a world, or a folder with episodes of
            policies that saw something else.
    """
    if steps < 1 or not 0.0 <= noisy_share <= 1.0:
        raise ValueError(f"steps={steps}, noisy_share={noisy_share}; expected at least 1, and a share from 0 to 1")
    if world is None and checkpoint is not None:
        raise ValueError(f"checkpoint={checkpoint!r} is of a world model, and none is named; give world='Prophet-...'")
    for kept in (_load, _open):
        kept.cache_clear()  # of an earlier call; the folder may hold other weights by now
    found = _load(str(policy), noise_level)
    if env_id in SIMULATORS and SIMULATORS[env_id].has_tasks:
        options = {"image_size": found.config.image_size, **options}
    simulator = partial(open_simulator, env_id, **options)
    sim = simulator()
    spec, size, dimensions = sim.action_spec, sim.image_size, sim.action_spec.action_dim
    sim.close()
    if found.action_dim != dimensions or size != (found.config.image_size, found.config.image_size):
        raise ValueError(
            f"the policy in {policy} gives commands of {found.action_dim} numbers from images of "
            f"{found.config.image_size} pixels; {env_id} takes {dimensions} and shows {size}"
        )
    imagined = None if world is None else _Imagined(world, checkpoint, found.chunk_length, steps, size)
    if imagined is not None:
        imagined.require_conventions(spec, env_id)
    _require_one_way(Path(out), world)
    make = partial(
        _play_policy,
        policy=str(policy),
        steps=steps,
        noisy_share=noisy_share,
        noise_level=noise_level,
        imagined=imagined,
    )
    return record_set(out, episodes, seed, make, workers, progress, simulator)


@lru_cache(maxsize=1)
def _load(folder: str, noise_level: float) -> SmallFlowPolicy:
    if parent_process() is not None:
        torch.set_num_threads(1)  # workers share the cores
    policy = SmallFlowPolicy.from_pretrained(folder).eval()
    policy.set_flow(noise_level=noise_level)
    return policy


@dataclass(frozen=True)
class _Imagined:
    """The world model in whose frames a policy acts."""

    world: str
    checkpoint: str | None
    chunk_length: int
    steps: int
    image_size: tuple[int, int]

    @property
    def chunks(self) -> int:
        """Policy calls of an episode."""
        return -(-self.steps // self.chunk_length)

    def open(self) -> ProphetEnv:
        """Makes the environment; its judge is not asked."""
        env = gym.make(
            find_world(self.world).id,
            checkpoint=self.checkpoint,
            chunk_length=self.chunk_length,
            horizon=self.chunks * self.chunk_length,
            image_size=self.image_size,
            judge=lambda frames, instruction: False,
            disable_env_checker=True,
        )
        found: Any = env.unwrapped
        return found

    def require_conventions(self, spec: ActionSpec, env_id: str) -> None:
        """Requires, before anything is written, that commands mean the same in the simulator.

        Raises:
            ValueError: they do not, or the world cannot be opened.
        """
        env = self.open()
        names = ("num_effectors", "delta", "rotation", "gripper", "position_scale", "rotation_scale")
        other = {name: getattr(env.world_model.action_spec, name) for name in names}
        differing = [f"{n}={v!r} (expected {getattr(spec, n)!r})" for n, v in other.items() if v != getattr(spec, n)]
        env.close()
        if differing:
            raise ValueError(f"{self.world} takes other commands than {env_id}: {', '.join(differing)}")


def _require_one_way(folder: Path, world: str | None) -> None:
    there = next(folder.glob("episode_*/meta.json"), None)
    found = world if there is None else json.loads(there.read_text())["metadata"].get("world")
    if found != world:
        raise ValueError(
            f"{folder} holds episodes of policies that saw {found or 'the simulator'}, expected "
            f"{world or 'the simulator'}; give each a folder of its own"
        )


@lru_cache(maxsize=1)
def _open(imagined: _Imagined) -> ProphetEnv:
    return imagined.open()


def _play_policy(
    sim: Simulator,
    seed: int,
    *,
    policy: str,
    steps: int,
    noisy_share: float,
    noise_level: float,
    imagined: _Imagined | None,
) -> Episode:
    actor = _load(policy, noise_level)
    actor.reset()
    rng = np.random.default_rng((seed, 3))
    noisy = bool(rng.random() < noisy_share)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    mode: SampleMode = "sde" if noisy else "ode"

    def act(sim: Simulator) -> np.ndarray:
        seen = make_observation(sim.render(), sim.eef_pose, sim.gripper)
        batch = {"image": seen["image"][None], "state": seen["state"][None], "instruction": [sim.instruction]}
        return actor.select_action(batch, generator, mode)[0].numpy()

    sim.reset(seed=seed)
    behaviour = "noisy_policy" if noisy else "policy"
    if imagined is None:
        return play(sim, seed, act, steps=steps, behaviour=behaviour)
    env = _open(imagined)
    commands = iter(_imagined_commands(env, actor, sim, seed, generator, mode, imagined.chunks))
    episode = play(sim, seed, lambda _: next(commands), steps=steps, behaviour=f"{behaviour}_in_world")
    weights = env.world_model.checkpoint_info["name"]
    return replace(episode, metadata={**episode.metadata, "world": imagined.world, "checkpoint": weights})


def _imagined_commands(
    env: ProphetEnv,
    actor: SmallFlowPolicy,
    sim: Simulator,
    seed: int,
    generator: torch.Generator,
    mode: SampleMode,
    chunks: int,
) -> np.ndarray:
    """Returns the commands (chunks * CH, D) of a policy that sees what a world model imagines from here on."""
    seen, _ = env.reset(seed=seed, options={"snapshot": take_snapshot(sim)})
    commands: list[np.ndarray] = []
    while True:
        batch = {"image": seen["image"][None], "state": seen["state"][None], "instruction": [sim.instruction]}
        commands.append(actor.predict_action_chunk(batch, generator, mode)[0].numpy())
        if len(commands) == chunks:
            return np.concatenate(commands)
        seen, *_ = env.step(commands[-1])
