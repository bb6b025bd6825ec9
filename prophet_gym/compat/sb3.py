"""Stable-Baselines3 on the batched engine; ``from prophet_gym.compat.sb3 import make_vec_env`` is the line to change.

Stable-Baselines3 takes no ``gymnasium.vector.VectorEnv``, and ``DummyVecEnv`` would run the world model once per slot.
This adapter steps all slots in one model call, with the flat interface: an image in, one vector per chunk out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from ..registration import WORLDS
from .flat import FlatVectorEnv

__all__ = ["ProphetVecEnv", "make_vec_env"]


class ProphetVecEnv(VecEnv):
    """A flat vector environment as a ``VecEnv``.

    Infos are one dict per slot, with the world's keys and, where a rollout ended, ``terminal_observation``,
    ``TimeLimit.truncated`` (the horizon, and no success) and ``is_success``. An abstention of the judge counts as
    reward 0, and ``judge_valid`` is False: Stable-Baselines3 has no mask for it.

    Args:
        env: a :class:`prophet_gym.compat.flat.FlatVectorEnv` in the autoreset mode ``SAME_STEP``.

    Raises:
        ValueError: another kind of environment or mode.
    """

    def __init__(self, env: FlatVectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(env, FlatVectorEnv) or mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"{type(env).__name__} with autoreset_mode {mode}: expected what gym.make_vec(..., interface='flat', "
                "autoreset_mode='SameStep') makes."
            )
        self.env = env
        self.render_mode = "rgb_array"  # VecEnv asks for it in its constructor
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata

    def reset(self) -> np.ndarray:
        """Starts every rollout, with the seeds of :meth:`seed` if it was called; returns images (B, H, W, 3)."""
        given = any(seed is not None for seed in self._seeds)
        images, info = self.env.reset(seed=list(self._seeds) if given else None)
        self.reset_infos = [_slot_info(info, i) for i in range(self.num_envs)]
        self._reset_seeds()
        return images

    def step_async(self, actions: np.ndarray) -> None:
        """Takes flat actions (B, C * 7N) in [-1, 1]."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Steps all slots; returns images (B, H, W, 3), reward (B,) float32, done (B,) and infos."""
        images, reward, terminated, truncated, info = self.env.step(self._actions)
        done = terminated | truncated
        infos = []
        for i in range(self.num_envs):
            if not done[i]:
                infos.append(_slot_info(info, i))
                continue
            own = _slot_info(info["final_info"], i)
            timed_out = bool(truncated[i] and not terminated[i])
            infos.append({**own, "terminal_observation": info["final_obs"][i], "TimeLimit.truncated": timed_out})
            self.reset_infos[i] = _slot_info(info, i)
        return images, reward.astype(np.float32), done, infos

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Returns the current frames; the environment needs ``render_mode="rgb_array"``."""
        frames: Any = self.env.render()
        return [None] * self.num_envs if frames is None else frames

    def close(self) -> None:
        """Closes the engine."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of the engine, which all slots share, once per slot."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.env.unwrapped, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuses: slots share one engine."""
        raise ValueError(f"set_attr({attr_name!r}): slots share one engine; set it there, on .env.unwrapped.")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refuses: slots share one engine."""
        raise ValueError(f"env_method({method_name!r}): slots share one engine; call it there, on .env.unwrapped.")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns False for every slot."""
        return [False for _ in self._get_indices(indices)]


def make_vec_env(
    env_id: str, n_envs: int = 1, seed: int | None = None, *, env_kwargs: dict[str, Any] | None = None
) -> VecMonitor:
    """Makes a monitored batch of worlds; stands in for Stable-Baselines3's function of this name.

    Args:
        env_id: a world or simulator.
        n_envs: slots.
        seed: of the first reset; slot i gets ``seed + i``.
        env_kwargs: of ``gym.make_vec(env_id, ...)``.

    Raises:
        MissingCheckpointError: no weights for ``env_id``.
        ValueError: an unknown id.
    """
    options = {"interface": "flat", "autoreset_mode": "SameStep", **(env_kwargs or {})}
    try:
        engine: Any = gym.make_vec(env_id, num_envs=n_envs, **options)
    except gym.error.UnregisteredEnv as error:
        raise ValueError(f"env_id={env_id!r}: {error} The worlds are {sorted(WORLDS)}.") from error
    env = ProphetVecEnv(engine)
    env.seed(seed)
    return VecMonitor(env)


def _slot_info(info: dict[str, Any], index: int) -> dict[str, Any]:
    """The entries of a vector info that slot ``index`` has."""
    skip = ("final_obs", "final_info")
    own = {k: v[index] for k, v in info.items() if not k.startswith("_") and k not in skip and info[f"_{k}"][index]}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in own.items()}
