"""``interface="flat"``: image in, one normalised vector out, for learners that know neither dicts nor chunks.

Stable-Baselines3 and most single-file learners want an image ``Box`` and a symmetric action ``Box`` of one dimension.
The observation is the image alone; the action is the chunk, flattened and scaled to [-1, 1].
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorWrapper
from gymnasium.vector.utils import batch_space

__all__ = ["FlatEnv", "FlatVectorEnv", "to_chunk"]

_TOLERANCE = 1e-6  # float32 rounding is not a user's error


def to_chunk(action: np.ndarray, chunk_space: Any) -> np.ndarray:
    """Maps flat actions (..., C * 7N) in [-1, 1] linearly onto chunks (..., C, 7N) of the ``Box`` ``chunk_space``.

    Raises:
        ValueError: wrong length, not finite, or outside [-1, 1].
    """
    action, size = np.asarray(action, dtype=np.float64), int(np.prod(chunk_space.shape))
    if action.ndim < 1 or action.shape[-1] != size:
        raise ValueError(
            f"Flat action of shape {action.shape}; expected (..., {size}): a chunk {chunk_space.shape}, flattened."
        )
    if not np.isfinite(action).all() or np.abs(action).max(initial=0.0) > 1.0 + _TOLERANCE:
        raise ValueError(
            f"Flat action with values from {action.min()} to {action.max()}; expected finite numbers in [-1, 1]. "
            "Clip or squash the policy's output."
        )
    action = action.reshape(*action.shape[:-1], *chunk_space.shape)
    low, high = chunk_space.low.astype(np.float64), chunk_space.high.astype(np.float64)
    native = (low + (action + 1.0) / 2.0 * (high - low)).astype(np.float32)
    return np.clip(native, chunk_space.low, chunk_space.high)


def _action_space(chunk_space: Any) -> Box:
    return Box(-1.0, 1.0, (int(np.prod(chunk_space.shape)),), np.float32)


class FlatEnv(gym.Wrapper, RecordConstructorArgs):
    """A chunk environment, world model or simulator, with ``Box(H, W, 3)`` uint8 in and ``Box(C * 7N,)`` out.

    ``env.unwrapped`` is the chunk environment. Infos are passed on unchanged.
    """

    def __init__(self, env: Any) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self.observation_space = env.observation_space["image"]
        self.action_space = _action_space(env.action_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a rollout; returns the image and info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation["image"], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Executes a flat action (C * 7N,) in [-1, 1]."""
        if np.ndim(action) != 1:
            raise ValueError(f"Flat action of shape {np.shape(action)}; expected {self.action_space.shape}.")
        observation, reward, terminated, truncated, info = self.env.step(to_chunk(action, self.env.action_space))
        return observation["image"], reward, terminated, truncated, info


class FlatVectorEnv(VectorWrapper):
    """:class:`FlatEnv` for vector environments: ``Box(B, H, W, 3)`` in, ``Box(B, C * 7N)`` out."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.single_observation_space = env.single_observation_space["image"]
        self.single_action_space = _action_space(env.single_action_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts rollouts; returns the images and infos."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation["image"], info

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Executes flat actions (B, C * 7N) in [-1, 1]."""
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"Flat actions of shape {np.shape(actions)}; expected {self.action_space.shape}.")
        chunks = to_chunk(actions, self.env.single_action_space)
        observation, reward, terminated, truncated, info = self.env.step(chunks)
        for i, last in enumerate(info.get("final_obs", ())):
            info["final_obs"][i] = None if last is None else last["image"]
        return observation["image"], reward, terminated, truncated, info
