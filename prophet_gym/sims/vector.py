"""Simulators side by side, resettable from one snapshot per slot as world models are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ..arguments import known_options, per_slot

__all__ = ["SlotEnv", "make_sync_vector_env"]


class SlotEnv(gym.Wrapper):
    """Slot ``index`` of a vector environment: takes its own entry of ``options["snapshots"]``.

    Gymnasium hands the same options to every slot; here slot i starts from snapshot i.
    """

    def __init__(self, env: gym.Env, index: int, num_envs: int) -> None:
        super().__init__(env)
        self.index, self.num_envs = index, num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode, from ``options["snapshots"][index]`` if that is given and not None.

        Raises:
            ValueError: an unknown option, or another number of snapshots than slots.
        """
        options = known_options(options, ("snapshots",))
        snapshot = per_slot("options['snapshots']", options.get("snapshots"), self.num_envs)[self.index]
        return self.env.reset(seed=seed, options={} if snapshot is None else {"snapshot": snapshot})


def make_sync_vector_env(make: Callable[[], gym.Env], num_envs: int, autoreset_mode: AutoresetMode) -> SyncVectorEnv:
    """Returns Gymnasium's serial vector environment over ``num_envs`` calls of ``make``.

    ``reset`` takes ``options={"snapshots": [...], "reset_mask": mask}`` like :class:`prophet_gym.ProphetVectorEnv`.
    With ``AutoresetMode.DISABLED`` finished slots must be reset before the next step, as Gymnasium asks.
    """
    slots = [lambda i=i: SlotEnv(make(), i, num_envs) for i in range(num_envs)]
    return SyncVectorEnv(slots, autoreset_mode=autoreset_mode)
