"""Smooth random motion in any simulator: what can be recorded where nobody has written an expert."""

from __future__ import annotations

import numpy as np

from prophet_gym.actions import ActionSpec
from prophet_gym.sims.simulator import Simulator

__all__ = ["Wanderer"]

_MEMORY = 0.85  # share of a command that the next one keeps: about six commands in one direction
_REACH = 0.35  # root mean square of a command, as a share of the bounds
_TOGGLE = 0.05  # chance per command that a gripper changes its mind


class Wanderer:
    """Commands that drift: correlated noise in every direction, grippers that stay open or closed for a while.

    Args:
        spec: of the commands.
        seed: of the noise.
    """

    def __init__(self, spec: ActionSpec, seed: int) -> None:
        self._rng, self._spec = np.random.default_rng(seed), spec
        self._drift = np.zeros((spec.num_effectors, 6))
        self._open = np.ones(spec.num_effectors)

    def act(self, sim: Simulator) -> np.ndarray:
        """The next native command (7N,) float32, inside the bounds."""
        low, high = np.asarray(self._spec.low), np.asarray(self._spec.high)
        noise = self._rng.normal(0.0, np.sqrt(1 - _MEMORY**2), self._drift.shape)
        self._drift = _MEMORY * self._drift + noise
        self._open = np.where(self._rng.random(len(self._open)) < _TOGGLE, 1.0 - self._open, self._open)
        rest = np.zeros((1, len(self._open), 7))
        rest[0, :, 6] = self._open
        native = self._spec.from_canonical(rest).reshape(-1, 7)
        reach = _REACH * (high - low)[:6] / 2
        native[:, :6] = np.clip((high + low)[:6] / 2 + self._drift * reach, low[:6], high[:6])
        return native.reshape(-1).astype(np.float32)
