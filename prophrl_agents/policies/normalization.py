"""Action and state statistics of a policy, stored with its weights.

The flow works on actions of mean 0 and standard deviation 1. On the way out, actions are brought back to native units
and clipped to the bounds kept here: the environment's action space refuses commands outside, and a Gaussian step can
always leave it. The log-probability is that of the unclipped chunk, the clip counts as part of the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Normalizer", "PolicyStatistics"]

CONSTANT = 1e-6
"""Standard deviations below this (native units) count as a constant dimension, normalised to 0."""


@dataclass(frozen=True, eq=False)
class PolicyStatistics:
    """Statistics of the demonstrations, in native units.

    Attributes:
        action_mean: (D,) mean.
        action_std: (D,) standard deviation; 0 for a dimension that never moves, which then stays at its mean.
        action_low: (D,) lower bound of a command.
        action_high: (D,) upper bound of a command.
        state_mean: (P,) mean of the proprioceptive state.
        state_std: (P,) standard deviation.

    Raises:
        ValueError: lengths that disagree, non-finite means or deviations, negative deviations, bounds out of order.
    """

    action_mean: np.ndarray
    action_std: np.ndarray
    action_low: np.ndarray
    action_high: np.ndarray
    state_mean: np.ndarray
    state_std: np.ndarray

    def __post_init__(self) -> None:
        """Converts to float32 vectors and checks them."""
        for field in fields(self):
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), dtype=np.float32).copy())
        for prefix in ("action", "state"):
            mean, std = getattr(self, f"{prefix}_mean"), getattr(self, f"{prefix}_std")
            if mean.ndim != 1 or mean.shape != std.shape:
                raise ValueError(
                    f"{prefix}_mean {mean.shape}, {prefix}_std {std.shape}: expected two vectors of one length"
                )
            if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
                raise ValueError(
                    f"{prefix}_mean {mean}, {prefix}_std {std}: expected finite, std >= 0; is there NaN in the data?"
                )
        if not self.action_low.shape == self.action_high.shape == self.action_mean.shape:
            raise ValueError(
                f"bounds {self.action_low.shape}, {self.action_high.shape}, expected ({len(self.action_mean)},); "
                "pass one row of the action space's low and high"
            )
        if not (self.action_low < self.action_high).all():
            raise ValueError(f"action_low {self.action_low} is not below action_high {self.action_high} everywhere")

    @classmethod
    def from_data(cls, actions: np.ndarray, states: np.ndarray, low: np.ndarray, high: np.ndarray) -> PolicyStatistics:
        """Computes the statistics of demonstrations.

        Args:
            actions: (n, D) commands in native units.
            states: (m, P) proprioceptive states.
            low: (D,) lower bound of a command (one row of the action space).
            high: (D,) upper bound.

        Raises:
            ValueError: not two-dimensional, empty, or as for the class.
        """
        actions, states = np.asarray(actions, dtype=np.float64), np.asarray(states, dtype=np.float64)
        for name, rows in (("actions", actions), ("states", states)):
            if rows.ndim != 2 or len(rows) == 0:
                raise ValueError(f"{name} have shape {rows.shape}, expected (n >= 1, dimensions); flatten the episodes")
        return cls(actions.mean(0), actions.std(0), low, high, states.mean(0), states.std(0))


class Normalizer(nn.Module):
    """Holds the statistics as float32 buffers, so that they travel with the weights and the device.

    Args:
        statistics: what to hold.
    """

    def __init__(self, statistics: PolicyStatistics) -> None:
        super().__init__()
        for field in fields(statistics):
            self.register_buffer(field.name, torch.from_numpy(getattr(statistics, field.name).copy()))

    def statistics(self) -> PolicyStatistics:
        """Returns the statistics held, as numpy."""
        names = [field.name for field in fields(PolicyStatistics)]
        return PolicyStatistics(**{name: getattr(self, name).cpu().numpy() for name in names})

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Native (..., D) to normalised (..., D)."""
        return _standardise(actions, self.action_mean, self.action_std)

    def denormalize_actions(self, chunk: Tensor) -> Tensor:
        """Normalised (..., D) to native float32 (..., D), clipped to the action bounds."""
        scale = torch.where(self.action_std > CONSTANT, self.action_std, 0.0)
        native = (self.action_mean + scale * chunk).to(torch.float32)
        return torch.clamp(native, self.action_low.float(), self.action_high.float())

    def normalize_state(self, state: Tensor) -> Tensor:
        """Native (..., P) to normalised (..., P)."""
        return _standardise(state, self.state_mean, self.state_std)


def _standardise(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    moving = std > CONSTANT
    return torch.where(moving, (values - mean) / torch.where(moving, std, 1.0), 0.0)
