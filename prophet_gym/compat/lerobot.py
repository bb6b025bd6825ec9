"""LeRobot's evaluation interface: environments as ``lerobot-eval`` expects them, without importing lerobot.

Three ways lead here: ``--env.type=prophet`` (:mod:`prophet_gym.lerobot_env`), an EnvHub repository whose ``env.py`` is
one line, ``from prophet_gym.compat.lerobot import make_env``, and Gymnasium's ``make`` and ``make_vec`` with
``interface="lerobot"``. Commands are the world's native ones: for the LIBERO worlds those of LIBERO.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import batch_space

from ..arguments import known_options, require_between
from ..env import own_info
from .single_step import SingleStepVectorEnv

__all__ = ["LeRobotEnv", "LeRobotSlot", "LeRobotVectorEnv", "make_env"]


class LeRobotEnv(gym.Env):
    """One world as the single environments look that LeRobot 0.4 puts into a ``SyncVectorEnv`` of its own.

    Observation: ``pixels`` (H, W, 3) uint8 and ``agent_pos`` (8,) float32. Action: (7,) native commands of the world.
    ``info["is_success"]`` is there at every step. A batch of these calls the world model once per slot; prefer
    :class:`LeRobotVectorEnv`, which calls it once.

    Args:
        engine: a chunk engine of one slot with autoreset disabled.
        action_buffer: "immediate" or "chunk".

    Raises:
        ValueError: the engine does not fit.
    """

    def __init__(self, engine: Any, *, action_buffer: str = "immediate") -> None:
        self.world = SingleStepVectorEnv(engine, action_buffer=action_buffer)
        self.metadata, self.render_mode = {**self.world.metadata, "render_modes": ["rgb_array"]}, "rgb_array"
        self.observation_space = _observation_space(self.world)
        self.action_space = self.world.single_action_space
        self._max_episode_steps = self.world.horizon
        self.task_description = ""

    @property
    def task(self) -> str:
        """The same as ``task_description``: the goal of the running rollout in words."""
        return self.task_description

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts a rollout.

        Args:
            seed: of the noise and of the snapshot drawn.
            options: ``{"snapshots": [snapshot]}``.

        Raises:
            ValueError: an unknown option.
        """
        observation, info = self.world.reset(seed=seed, options=_starts(options))
        self.task_description = str(info["instruction"][0])
        return self._observe(observation), own_info(info)

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Takes one command (7,).

        Raises:
            ValueError: before ``reset``, after the time limit, wrong shape or not finite.
        """
        observation, reward, terminated, truncated, info = self.world.step(np.asarray(action, np.float64)[None])
        return self._observe(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), own_info(info)

    def render(self) -> np.ndarray:
        """Returns the latest real frame (H, W, 3) uint8."""
        return self.world.render()[0]

    def close(self) -> None:
        """Closes the world."""
        self.world.close()

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"pixels": observation["image"][0], "agent_pos": observation["state"][0]}


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
        self.single_observation_space = _observation_space(self.world)
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
            options: ``"snapshots"``, one per slot.

        Raises:
            ValueError: an unknown option, or another number of seeds or snapshots than slots.
        """
        observation, info = self.world.reset(seed=seed, options=_starts(options))
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
    cfg: Any = None,
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
        cfg: no matter: the ``HubEnvConfig`` that LeRobot hands to an ``env.py``. What the world is, ``env.py`` says.
        env_id: a world or simulator; its name is the suite.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        flipped: show images upside down, as LIBERO does.
        options: of ``gym.make_vec(env_id, ...)``: ``checkpoint``, ``judge``, ``snapshots``, ``horizon``...

    Raises:
        MissingCheckpointError: no weights for ``env_id``.
        ValueError: an unknown id or option, or ``n_envs`` below 1.
    """
    from ..registration import make_chunk_engine

    require_between("n_envs", n_envs, 1, None)
    engine = make_chunk_engine(env_id, n_envs, **{"autoreset_mode": "SameStep", **options})
    return {env_id: {0: LeRobotVectorEnv(engine, action_buffer=action_buffer, flipped=flipped)}}


def _observation_space(world: SingleStepVectorEnv) -> Dict:
    native = world.single_observation_space
    return Dict(pixels=native["image"], agent_pos=native["state"])


def _starts(options: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the options of the engine's reset, without the marks that LeRobot's loops set for wrappers of theirs."""
    ours = {key: value for key, value in (options or {}).items() if not key.startswith("lerobot")}
    return known_options(ours, ("snapshots",))
