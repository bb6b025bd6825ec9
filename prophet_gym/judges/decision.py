"""From a score to a verdict: one rule for the judges that decide by a threshold, and for whoever calibrates them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["DecisionRule"]

ROUNDING = 1e-9
"""Scores are shares of votes: 3 of 5 lie 0.1 from one half, whatever the last bit of 0.6 says."""


@dataclass(frozen=True)
class DecisionRule:
    """Success at or above a threshold, abstention close to it.

    Attributes:
        threshold: scores at or above it are success.
        margin: scores closer to the threshold than this are not decided.
        tie_abstains: a score that is the threshold is not decided either, as with equally many votes for both.

    Raises:
        ValueError: a number outside [0, 1].
    """

    threshold: float = 0.5
    margin: float = 0.0
    tie_abstains: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0 or not 0.0 <= self.margin <= 1.0:
            raise ValueError(f"threshold={self.threshold}, margin={self.margin}: expected both in [0, 1].")

    def decided(self, scores: ArrayLike) -> np.ndarray:
        """Returns bool of the shape of ``scores``: False where the judge abstains; a NaN score is never decided."""
        values = np.asarray(scores, float)
        distance = np.abs(values - self.threshold)
        close = distance < self.margin - ROUNDING
        tie = (distance <= ROUNDING) & self.tie_abstains
        return ~close & ~tie & ~np.isnan(values)

    def success(self, scores: ArrayLike) -> np.ndarray:
        """Returns bool of the shape of ``scores``: at or above the threshold; meaningless where not decided."""
        return np.asarray(scores, float) >= self.threshold
