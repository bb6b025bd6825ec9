"""``ProphetEnv``: one imagined world behind ``gymnasium.Env``; a single slot of the batched engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from .arguments import known_options
from .snapshot import Snapshot
from .vector_env import ProphetVectorEnv
from .world_model.state import WorldModel

__all__ = ["ProphetEnv"]


class ProphetEnv(gym.Env):
    """A world model as an environment: a snapshot to start from, action chunks in, judged success out.

    Observation: ``Dict(image (H, W, 3) uint8, state (8N,) float32)``, see :mod:`prophet_gym.observations`.
    Action: a chunk ``Box(C, 7N)`` of native commands (:class:`prophet_gym.ActionSpec`); any C from 1 to the model's
    maximum is accepted. One step is one chunk.
    Reward: 1 where the judge sees success, else 0. ``terminated`` is judged success, ``truncated`` the horizon; the
    chunk that reaches the horizon is executed to its end.

    Info: ``instruction``, ``env_step`` (chunks so far), ``is_success``, ``judge_valid`` (False where the judge failed
    or abstained: mask that rollout, its reward of 0 is no verdict), ``verdict`` (None on steps that were not judged),
    ``checkpoint`` (which weights run, trained on what) and, after a step, ``frames`` (C, H, W, 3) uint8.

    Args:
        world_model: see :class:`ProphetVectorEnv`, as for all the following.
        horizon: commands after which a rollout is truncated.
        snapshots: where rollouts start; without them every reset needs ``options={"snapshot": Snapshot(...)}``.
        judge: a judge or a callable ``(frames, instruction) -> Verdict | bool | float``.
        judge_every_chunk: ask the judge after every chunk instead of once at the horizon.
        chunk_length: commands in ``action_space``; default the model's maximum.
        num_inference_steps: denoising steps; default the model's.
        render_mode: None or "rgb_array" (``render`` returns the current frame).

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        world_model: WorldModel,
        *,
        horizon: int,
        snapshots: Sequence[Snapshot] | None = None,
        judge: Any = None,
        judge_every_chunk: bool = False,
        chunk_length: int | None = None,
        num_inference_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self._engine = ProphetVectorEnv(
            world_model,
            horizon=horizon,
            snapshots=snapshots,
            judge=judge,
            judge_every_chunk=judge_every_chunk,
            chunk_length=chunk_length,
            num_inference_steps=num_inference_steps,
            autoreset_mode=AutoresetMode.DISABLED,
            render_mode=render_mode,
        )
        self.world_model, self.render_mode = world_model, render_mode
        self.snapshots, self.judge = snapshots, self._engine.judge
        self.horizon, self.chunk_length = self._engine.horizon, self._engine.chunk_length
        self.observation_space = self._engine.single_observation_space
        self.action_space = self._engine.single_action_space
        self.metadata = {**self.metadata, "render_fps": world_model.action_spec.control_hz}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts a rollout.

        Args:
            seed: of the noise and of the snapshot drawn; None goes on with the generator of the last reset.
            options: ``{"snapshot": Snapshot}`` to start there.

        Raises:
            ValueError: an unknown option, or a snapshot that does not fit the model.
        """
        super().reset(seed=seed)
        given = known_options(options, ("snapshot",)).get("snapshot")
        observation, info = self._engine.reset(seed=seed, options={"snapshots": [given]})
        self._np_random = self._engine.slots[0].rng
        return _first(observation), own_info(info)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes a chunk (C, 7N) of native commands.

        Raises:
            ValueError: called before ``reset`` or after the rollout ended, or the action is of the wrong shape, not
                finite, out of bounds or longer than the model's maximum.
        """
        action = self.world_model.action_spec.check(action, self.world_model.chunk_length)
        observation, reward, terminated, truncated, info = self._engine.step(action[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), own_info(info)

    def render(self) -> np.ndarray | None:
        """Returns the current frame (H, W, 3) uint8, or None without ``render_mode``."""
        frames = self._engine.render()
        return None if frames is None else frames[0]

    def get_state(self) -> dict[str, Any]:
        """Returns all that the future depends on, see :meth:`ProphetVectorEnv.get_state`."""
        return self._engine.get_state()

    def set_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Restores :meth:`get_state`'s result, here or in another process, and returns the observation.

        Raises:
            ValueError: not such a state, or one that another checkpoint or dtype left; nothing has changed then.
        """
        observation = _first(self._engine.set_state(state))
        self._np_random = self._engine.slots[0].rng
        return observation

    def fork(self, n: int, *, seeds: Sequence[int] | None = None) -> ProphetVectorEnv:
        """Returns n members that go on from here, as a vector environment with autoreset disabled.

        Members draw the same noise (equal actions, equal futures) unless ``seeds``, one per member, are given.

        Raises:
            ValueError: called before ``reset``, n below 1, or another number of seeds.
        """
        return self._engine.fork(n, seeds=seeds)


def _first(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value[0] for key, value in observation.items()}


def own_info(info: dict[str, Any]) -> dict[str, Any]:
    """Returns what a vector info says about its first slot, numbers as plain Python values."""
    own = {key: info[key][0] for key in info if not key.startswith("_") and info[f"_{key}"][0]}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in own.items()}
