"""LeRobot's evaluation interface: a vector environment as ``lerobot-eval`` expects it, without importing lerobot.

An EnvHub repository's ``env.py`` is one line: ``from prophet_gym.compat.lerobot import make_env``. Commands are the
world's native ones: for the LIBERO worlds those of LIBERO.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import batch_space

from .single_step import SingleStepVectorEnv

__all__ = ["LeRobotSlot", "LeRobotVectorEnv", "make_env"]


class LeRobotSlot(gym.Env):
    """What loops ask of one slot: ``task``, ``task_description``, ``_max_episode_steps``, ``render()``.

    Stepping is the batch's: ``step`` and ``reset`` of a slot do not exist.
    """

    render_mode = "rgb_array"

    def __init__(self, batch: LeRobotVectorEnv, index: int) -> None:
        self._batch, self._index = batch, index
        self.metadata = batch.metadata
        self.observation_space, self.action_space = batch.single_observation_space, batch.single_action_space
        self._max_episode_steps = batch.world.horizon

    @property
    def task_description(self) -> str:
        """The goal of the running rollout in words."""
        return self._batch.instructions[self._index]

    @property
    def task(self) -> str:
        """The same as ``task_description``."""
        return self.task_description

    def render(self) -> np.ndarray:
        """Returns the latest real frame (H, W, 3) uint8, upright."""
        return self._batch.world.render()[self._index]


class LeRobotVectorEnv(SyncVectorEnv):
    """A batch of worlds, one model call a step, as the ``SyncVectorEnv`` that LeRobot's loops look for.

    Observation: ``pixels`` (B, H, W, 3) uint8 and ``agent_pos`` (B, 8) float32. Action: (B, 7) native commands of the
    world. Autoreset is ``SAME_STEP``: the step that ends a rollout carries ``final_info["is_success"]``, (B,) bool, and
    ``final_obs``; ``is_success`` is in ``info`` at every step. ``call`` and ``get_attr`` reach :class:`LeRobotSlot`.

    Args:
        engine: a chunk engine in the mode ``SAME_STEP``.
        action_buffer: "immediate" or "chunk".
        flipped: show ``pixels`` upside down, as LIBERO does and LeRobot's LiberoProcessorStep expects.

    Raises:
        ValueError: the engine does not fit.
    """

    # SyncVectorEnv.__init__ is not called: it would make single environments. The type is what LeRobot looks at.
    def __init__(self, engine: Any, *, action_buffer: str = "immediate", flipped: bool = False) -> None:
        self.world = SingleStepVectorEnv(engine, action_buffer=action_buffer)
        self.num_envs, self.flipped, self.render_mode = engine.num_envs, flipped, "rgb_array"
        self.autoreset_mode = self.world.autoreset_mode
        self.metadata = {**self.world.metadata, "render_modes": ["rgb_array"]}
        native = self.world.single_observation_space
        self.single_observation_space = Dict(pixels=native["image"], agent_pos=native["state"])
        self.single_action_space = self.world.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = self.world.action_space
        self.instructions: list[str] = [""] * self.num_envs
        self.envs = [LeRobotSlot(self, index) for index in range(self.num_envs)]

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts every rollout.

        Args:
            seed: one per slot; an integer s stands for s, s + 1, ...
            options: ``"snapshots"``, one per slot; others, which loops pass to all environments, have no effect.
        """
        starts = {key: value for key, value in (options or {}).items() if key == "snapshots"}
        observation, info = self.world.reset(seed=seed, options=starts)
        self.instructions = [str(text) for text in info["instruction"]]
        return self._observe(observation), info

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one command (B, 7) in every slot.

        Raises:
            ValueError: before ``reset``, wrong shape or not finite.
        """
        observation, reward, terminated, truncated, info = self.world.step(actions)
        if "final_obs" in info:
            ends = [None if end is None else self._observe(end) for end in info["final_obs"]]
            info["final_obs"] = np.array([*ends, None], dtype=object)[:-1]
            self.instructions = [str(text) for text in info["instruction"]]
        return self._observe(observation), reward, terminated, truncated, info

    def render(self) -> tuple[Any, ...]:
        """Returns the latest real frame (H, W, 3) uint8 of every slot, upright."""
        return self.world.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the engine."""
        self.world.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = observation["image"]
        pixels = np.ascontiguousarray(np.flip(images, axis=-3)) if self.flipped else images
        return {"pixels": pixels, "agent_pos": observation["state"]}


def make_env(
    n_envs: int = 1,
    use_async_envs: bool = False,
    *,
    env_id: str = "Prophet-Tabletop-v0",
    action_buffer: str = "immediate",
    flipped: bool = False,
    **options: Any,
) -> dict[str, dict[int, LeRobotVectorEnv]]:
    """Makes ``{suite: {task_id: vector environment}}``, as LeRobot's EnvHub asks of an ``env.py``.

    Args:
        n_envs: slots.
        use_async_envs: no matter: one model call steps all slots.
        env_id: a world or simulator; its name is the suite.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        flipped: show images upside down, as LIBERO does.
        options: of ``gym.make_vec(env_id, ...)``: ``checkpoint``, ``judge``, ``snapshots``, ``horizon``...

    Raises:
        MissingCheckpointError: no weights for ``env_id``.
    """
    from ..registration import make_chunk_engine

    engine = make_chunk_engine(env_id, n_envs, **{"autoreset_mode": "SameStep", **options})
    return {env_id: {0: LeRobotVectorEnv(engine, action_buffer=action_buffer, flipped=flipped)}}
