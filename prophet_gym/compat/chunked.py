"""``ChunkedEnv``: any single-command environment behind the chunk interface, so that ``prophrl`` can train in it.

Use it for simulators of other projects: ``gym.make`` one of theirs, wrap it, put slots side by side with
``gymnasium.vector.SyncVectorEnv`` or ``AsyncVectorEnv``. The other direction, single commands in a Prophet world, is
:mod:`prophet_gym.compat.flat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, flatten, flatten_space

from ..arguments import require_between

__all__ = ["ChunkedEnv"]


class ChunkedEnv(gym.Env):
    """Executes the rows of an action chunk one after the other, up to the end of the episode.

    Observation: ``Dict(image (H, W, 3) uint8, state (P,) float32)``. Action: ``Box(C, D)``, the bounds of the wrapped
    environment repeated; 1 to C rows are accepted. Reward: the sum over the executed rows. ``info`` is the last row's,
    with ``frames`` (c, H, W, 3) uint8 for a chunk of c rows, ``num_executed`` and ``instruction``. Where an episode
    ends inside a chunk, its last frame is repeated: a vector environment stacks the frames of its slots.

    Args:
        env: environment with a one-dimensional ``Box`` of actions.
        chunk_length: C.
        image: returns the image (H, W, 3) uint8 of an observation; default ``env.render()``.
        state: returns the state (P,) of an observation; default all of it, flattened.
        image_size: side in pixels to which images are resized.
        instruction: the goal in words.

    Raises:
        ValueError: the actions are no one-dimensional Box, or neither ``image`` nor a render mode gives images.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    action_space: Box

    def __init__(
        self,
        env: gym.Env,
        chunk_length: int,
        *,
        image: Callable[[Any], np.ndarray] | None = None,
        state: Callable[[Any], np.ndarray] | None = None,
        image_size: int = 64,
        instruction: str = "",
    ) -> None:
        require_between("chunk_length", chunk_length, 1, None)
        space = env.action_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(f"the environment's actions are {space}; expected Box(D,): wrap discrete ones first")
        if image is None and env.render_mode != "rgb_array":
            raise ValueError(
                f"render_mode is {env.render_mode!r}; expected 'rgb_array' (give it to gym.make), or image=, a "
                "function from observation to image"
            )
        self.env, self.chunk_length, self.instruction = env, chunk_length, instruction
        self.image_size, self.render_mode = image_size, env.render_mode
        self._image = image if image is not None else lambda observation: np.asarray(env.render())
        original = env.observation_space
        self._state = state if state is not None else lambda observation: flatten(original, observation)
        low, high = (
            np.repeat(bound[None].astype(np.float32), chunk_length, axis=0) for bound in (space.low, space.high)
        )
        self.action_space = Box(low, high, dtype=np.float32)
        if state is None:
            bounds: Any = flatten_space(original)
            states = Box(bounds.low.astype(np.float32), bounds.high.astype(np.float32), dtype=np.float32)
        else:
            states = Box(-np.inf, np.inf, (len(state(original.sample())),), np.float32)
        images = Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = Dict(image=images, state=states)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode of the wrapped environment."""
        super().reset(seed=seed)
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observe(observation), {**info, "instruction": self.instruction}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes up to C commands (c, D).

        Raises:
            ValueError: wrong shape, too many commands, not finite, or out of bounds.
        """
        action = np.asarray(action, np.float32)
        longest, size = self.action_space.shape
        if action.ndim != 2 or action.shape[1] != size or not 1 <= len(action) <= longest:
            raise ValueError(f"action chunk of shape {action.shape}; expected (c, {size}) with c from 1 to {longest}")
        low, high = self.action_space.low[: len(action)], self.action_space.high[: len(action)]
        if not ((action >= low - 1e-6) & (action <= high + 1e-6)).all():
            raise ValueError(
                f"actions from {action.min()} to {action.max()}; expected numbers within {self.action_space}"
            )
        frames, total = [], 0.0
        info: dict[str, Any] = {}
        for command in np.clip(action, low, high):
            observation, reward, terminated, truncated, info = self.env.step(command)
            seen = self._observe(observation)
            frames.append(seen["image"])
            total += float(reward)
            if terminated or truncated:
                break
        executed = len(frames)
        frames += frames[-1:] * (len(action) - executed)
        extra = {"frames": np.stack(frames), "num_executed": executed, "instruction": self.instruction}
        return seen, total, bool(terminated), bool(truncated), {**info, **extra}

    def render(self) -> Any:
        """Renders the wrapped environment."""
        return self.env.render()

    def close(self) -> None:
        """Closes the wrapped environment."""
        self.env.close()

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        image = np.ascontiguousarray(self._image(observation), np.uint8)
        if image.shape[:2] != (self.image_size, self.image_size):
            image = cv2.resize(image, (self.image_size, self.image_size), interpolation=cv2.INTER_AREA)
        return {"image": image.copy(), "state": np.asarray(self._state(observation), np.float32).copy()}
