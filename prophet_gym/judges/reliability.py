"""Does a score mean what it says? Predicted score against observed success, in bins, with a drawing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prophet_gym.errors import MissingExtraError
from prophet_gym.judges.calibration import ratio

__all__ = ["draw_calibration", "draw_curves", "draw_reliability", "expected_calibration_error", "reliability_bins"]

BINS = 10


def reliability_bins(scores: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Sorts rollouts into bins of equal width by their score; empty bins are left out.

    Args:
        scores: (n,) float in [0, 1], no NaN.
        labels: (n,) bool.
        bins: how many between 0 and 1.

    Returns:
        For each bin "low", "high", "n", "score" (their mean) and "success" (observed, with its Wilson interval).
    """
    place = np.clip((scores * bins + 1e-9).astype(int), 0, bins - 1)
    return [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "n": int((place == index).sum()),
            "score": float(scores[place == index].mean()),
            "success": ratio(int(labels[place == index].sum()), int((place == index).sum())),
        }
        for index in np.unique(place).tolist()
    ]


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float | None:
    """Mean distance between score and observed success over the bins, weighted by their rollouts; None without any.

    Few rollouts make it too high: bins of a perfectly calibrated judge also scatter.
    """
    rows = reliability_bins(scores, np.asarray(labels, dtype=bool), bins)
    if not rows:
        return None
    return sum(row["n"] * abs(row["score"] - row["success"]["value"]) for row in rows) / len(scores)


def draw_calibration(report: dict[str, Any]) -> str:
    """Returns a report of :func:`prophet_gym.judges.calibrate_judge` as SVG.

    Left the reliability diagram of every source, right precision, recall and false-positive rate over the threshold,
    with 95 % bands and the chosen one marked; for voting judges also over the number of votes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('the diagram needs matplotlib: pip install "prophet-gym[viz]"') from error
    panels = 3 if report["votes"] else 2
    figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    draw_reliability(axes[0], report["sources"])
    draw_curves(axes[1], report["thresholds"], "threshold")
    axes[1].axvline(report["threshold"], color="0.3", linewidth=1, label=f"chosen, {report['threshold']:.3f}")
    axes[1].axvline(report["now"]["threshold"], color="0.3", linewidth=1, linestyle=":", label="now")
    if report["votes"]:
        draw_curves(axes[2], report["votes"], "votes")
        axes[2].set_xticks([row["votes"] for row in report["votes"]])
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def draw_reliability(axes: Any, sources: Mapping[str, dict[str, Any]]) -> None:
    """Draws observed success over the score, in bins, with 95 % intervals; ``sources`` as in a calibration's report."""
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    for name, source in sources.items():
        rows = source["reliability"]
        rates = np.array([row["success"]["value"] for row in rows])
        errors = [
            rates - np.array([row["success"]["low"] for row in rows]),
            np.array([row["success"]["high"] for row in rows]) - rates,
        ]
        label = f"{name}, n = {source['n']}" + ("" if source["ece"] is None else f", ECE {source['ece']:.3f}")
        axes.errorbar([row["score"] for row in rows], rates, np.maximum(errors, 0), fmt="o-", capsize=3, label=label)
    axes.set(xlabel="score, mean of the bin", ylabel="observed success", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def draw_curves(axes: Any, rows: Sequence[dict[str, Any]], over: str) -> None:
    """Draws precision, recall and false-positive rate of such rows over one of their fields, with 95 % bands."""
    for index, name in enumerate(("precision", "recall", "fpr")):
        known = [row for row in rows if row[name]["value"] is not None]
        x, colour = [row[over] for row in known], f"C{index}"
        axes.plot(x, [row[name]["value"] for row in known], color=colour, label=name)
        low, high = ([row[name][end] for row in known] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=over, ylim=(-0.02, 1.02))
