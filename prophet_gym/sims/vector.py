"""Simulators side by side, resettable from one snapshot per slot as world models are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from ..arguments import known_options, per_slot

__all__ = ["HoldingSyncVectorEnv", "SlotEnv", "make_sync_vector_env", "without_frames"]


class SlotEnv(gym.Wrapper):
    """Slot ``index`` of a vector environment: takes its own entry of ``options["snapshots"]``.

    Gymnasium hands the same options to every slot; here slot i starts from snapshot i. After its episode ended the slot
    is held until the next reset: a step looks at no action and returns the last observation and flags, reward 0 and an
    empty info.
    """

    def __init__(self, env: gym.Env, index: int, num_envs: int) -> None:
        super().__init__(env)
        self.index, self.num_envs = index, num_envs
        self.held: tuple[Any, float, bool, bool, dict[str, Any]] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode, from ``options["snapshots"][index]`` if that is given and not None.

        Raises:
            ValueError: an unknown option, or another number of snapshots than slots.
        """
        options = known_options(options, ("snapshots",))
        snapshot = per_slot("options['snapshots']", options.get("snapshots"), self.num_envs)[self.index]
        observation, info = self.env.reset(seed=seed, options={} if snapshot is None else {"snapshot": snapshot})
        self.held = None
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Executes a chunk, unless the episode has ended."""
        if self.held is not None:
            return self.held
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.held = copy.deepcopy(observation), 0.0, terminated, truncated, {}
        return observation, reward, terminated, truncated, info

    def resume(self) -> None:
        """Lets an episode that ended in success, short of the horizon, go on, if the environment can."""
        if self.held is not None and not self.held[3]:
            unwrapped: Any = self.env.unwrapped
            unwrapped.resume()
            self.held = None


class HoldingSyncVectorEnv(SyncVectorEnv):
    """Gymnasium's serial vector environment over :class:`SlotEnv`, with finished slots held if autoreset is disabled.

    As in :class:`prophet_gym.ProphetVectorEnv`: their observations and flags stay, their reward is 0, their actions are
    not looked at, their info masks are False, and they cost nothing.
    """

    envs: list[SlotEnv]

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one chunk in every running slot.

        Raises:
            ValueError: every slot is held.
        """
        if self.autoreset_mode is AutoresetMode.DISABLED:
            if all(slot.held is not None for slot in self.envs):
                raise ValueError("step() after every episode ended: call reset() first.")
            self._autoreset_envs[:] = False  # where Gymnasium would stop for a slot that has not been reset
        return super().step(actions)

    def resume(self) -> None:
        """Lets episodes that ended in success, short of the horizon, go on; they may lose it again."""
        for slot in self.envs:
            slot.resume()


def make_sync_vector_env(
    make: Callable[[], gym.Env], num_envs: int, autoreset_mode: AutoresetMode
) -> HoldingSyncVectorEnv:
    """Returns a serial vector environment over ``num_envs`` calls of ``make``.

    ``reset`` takes ``options={"snapshots": [...], "reset_mask": mask}`` like :class:`prophet_gym.ProphetVectorEnv`.
    """
    slots = [lambda i=i: SlotEnv(make(), i, num_envs) for i in range(num_envs)]
    return HoldingSyncVectorEnv(slots, autoreset_mode=autoreset_mode)


@contextmanager
def without_frames(env: VectorEnv) -> Iterator[None]:
    """Meanwhile the simulators in ``env`` render what observations show and no more: steps have no ``info["frames"]``.

    Of a chunk that is its last frame. Rendering takes half of Tabletop's time with all of them. Nothing else changes;
    environments of another kind are left as they are.
    """
    vector: Any = env.unwrapped
    slots = vector.envs if isinstance(vector, HoldingSyncVectorEnv) else []
    simulators: list[Any] = [slot.unwrapped for slot in slots if hasattr(slot.unwrapped, "every_frame")]
    before = [simulator.every_frame for simulator in simulators]
    try:
        for simulator in simulators:
            simulator.every_frame = False
        yield
    finally:
        for simulator, value in zip(simulators, before, strict=True):
            simulator.every_frame = value
