"""Two judges on the same rollouts: how far they agree beyond chance, and who is right where they do not.

Cohen's kappa is the agreement above that of two judges who decide independently, each as often for success as before:
1 is full agreement, 0 what chance gives. A second judge is worth its cost where the two disagree and it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prophet_gym.judges.base import Verdict
from prophet_gym.judges.calibration import ratio, show_rate

__all__ = ["cohen_kappa", "compare_verdicts", "format_disagreement"]


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa of two series of decisions; NaN without any, or if both always say the same one thing.

    Args:
        first: (n,) bool.
        second: (n,) bool.
    """
    if len(first) == 0:
        return math.nan
    p, q = first.mean(), second.mean()
    chance = p * q + (1 - p) * (1 - q)
    return float(((first == second).mean() - chance) / (1 - chance)) if chance < 1 else math.nan


def compare_verdicts(
    first: Sequence[Verdict], second: Sequence[Verdict], labels: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compares two judges' verdicts on the same rollouts.

    Args:
        first: of one judge, one per rollout.
        second: of the other.
        labels: (n,) bool, the truth.
        bootstrap: resamplings of rollouts behind kappa's interval.
        seed: of the resampling.

    Returns:
        A JSON-ready dict: n, decided (by both; only those are compared), abstained (of each), kappa, agree (a share
        with its interval), table (2x2 counts, "first success" by "second success"), and how often each is right:
        "right_together" where they agree, "first_right" and "second_right" where they do not.

    Raises:
        ValueError: series of different lengths.
    """
    labels = np.asarray(labels, dtype=bool)
    if not len(first) == len(second) == len(labels):
        raise ValueError(
            f"Verdicts on the same rollouts are compared, got {len(first)}, {len(second)} and {len(labels)} labels."
        )
    valid = [np.array([v.valid for v in verdicts], bool) for verdicts in (first, second)]
    both = valid[0] & valid[1]
    one, other = (np.array([bool(v.success) for v in verdicts], bool)[both] for verdicts in (first, second))
    truth, same = labels[both], one == other
    split = int((~same).sum())
    return {
        "n": len(labels),
        "decided": int(both.sum()),
        "abstained": [int((~each).sum()) for each in valid],
        "kappa": _kappa_interval(one, other, bootstrap, seed),
        "agree": ratio(int(same.sum()), len(same)),
        "table": {
            "both_success": int((one & other).sum()),
            "first_only": int((one & ~other).sum()),
            "second_only": int((~one & other).sum()),
            "both_failure": int((~one & ~other).sum()),
        },
        "right_together": ratio(int((one == truth)[same].sum()), int(same.sum())),
        "first_right": ratio(int((one == truth)[~same].sum()), split),
        "second_right": ratio(int((other == truth)[~same].sum()), split),
    }


def format_disagreement(report: dict[str, Any], first: str = "first", second: str = "second") -> str:
    """Returns a report of :func:`compare_verdicts` as text for the terminal."""
    table, split = report["table"], report["table"]["first_only"] + report["table"]["second_only"]
    name = max(len(first), 12) + 10
    lines = [
        f"{report['decided']} of {report['n']} rollouts decided by both; {report['abstained'][0]} abstentions of "
        f"{first}, {report['abstained'][1]} of {second}",
        f"Cohen's kappa {show_rate(report['kappa'])}   agreement {show_rate(report['agree'])}",
        "",
        f"{'':{name}}{second + ': success':>20}{second + ': failure':>20}",
        f"{first + ': success':{name}}{table['both_success']:>20}{table['first_only']:>20}",
        f"{first + ': failure':{name}}{table['second_only']:>20}{table['both_failure']:>20}",
        "",
        f"where they agree, both are right: {show_rate(report['right_together'])}",
        f"where they disagree ({split}), right is {first}: {show_rate(report['first_right'])}, "
        f"{second}: {show_rate(report['second_right'])}",
    ]
    return "\n".join(lines)


def _kappa_interval(first: np.ndarray, second: np.ndarray, bootstrap: int, seed: int) -> dict[str, float | None]:
    value = cohen_kappa(first, second)
    if math.isnan(value):
        return {"value": None, "low": -1.0, "high": 1.0}
    picks = np.random.default_rng(seed).integers(len(first), size=(bootstrap, len(first)))
    values = np.array([cohen_kappa(first[pick], second[pick]) for pick in picks])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}
