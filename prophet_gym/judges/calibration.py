"""How far a judge can be trusted: its verdicts against simulator truth (paper 4.4, Eq. 33).

Precision, recall and false-positive rate with Wilson intervals, AUC with a bootstrap interval, abstention, over
thresholds and per behaviour. Abstentions are counted apart and enter none of the rates, as learners mask them. For
reinforcement learning recall matters most (paper 4.4): unrecognised successes starve the policy of signal, while a
moderate false-positive rate is tolerated as long as precision holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prophet_gym.judges.base import Judge, Verdict
from prophet_gym.judges.rollouts import LabelledRollout

__all__ = ["auc", "calibration_report", "evaluate_judge", "format_calibration", "pick_threshold", "wilson_interval"]

Z_95 = 1.959964


def evaluate_judge(
    judge: Judge, rollouts: Sequence[LabelledRollout], *, batch_size: int = 64, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Judges labelled rollouts and reports how the verdicts compare with the truth.

    Args:
        judge: the judge to measure.
        rollouts: with simulator labels.
        batch_size: rollouts per ``judge_batch`` call.
        bootstrap: resamplings behind the AUC interval.
        seed: of the resampling.

    Returns:
        :func:`calibration_report` over all rollouts, with "behaviours" and "sources": the same figures per group.

    Raises:
        ValueError: if there are no rollouts.
    """
    if not rollouts:
        raise ValueError("evaluate_judge expects at least one labelled rollout, got none.")
    verdicts: list[Verdict] = []
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        verdicts += judge.judge_batch([r.frames for r in batch], [r.instruction for r in batch])
    labels = np.array([rollout.label for rollout in rollouts])
    report = calibration_report(verdicts, labels, bootstrap=bootstrap, seed=seed)
    for key, group_of in (("behaviours", lambda r: r.behaviour), ("sources", lambda r: r.source)):
        groups = np.array([group_of(rollout) for rollout in rollouts])
        report[key] = {}
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            report[key][str(group)] = _rates([verdicts[i] for i in members], labels[members], bootstrap, seed)
    return report


def calibration_report(
    verdicts: Sequence[Verdict], labels: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compares verdicts with truth.

    Args:
        verdicts: one per rollout.
        labels: (n,) bool, simulator success.
        bootstrap: resamplings behind the AUC interval.
        seed: of the resampling.

    Returns:
        A JSON-ready dict: n, successes, abstained, precision, recall, fpr, auc (each ``{"value", "low", "high"}``, None
        where undefined) and "thresholds", rows of threshold, precision, recall, fpr over the scores.
    """
    labels = np.asarray(labels, dtype=bool)
    scores = np.array([verdict.score for verdict in verdicts])
    scored = ~np.isnan(scores)
    report = _rates(verdicts, labels, bootstrap, seed)
    report["thresholds"] = []
    for threshold in np.linspace(0.1, 0.9, 9):
        said = scores[scored] >= threshold
        counts = _confusion(said, labels[scored])
        row = {name: _ratio(*counts[name])["value"] for name in ("precision", "recall", "fpr")}
        report["thresholds"].append({"threshold": round(float(threshold), 3), **row})
    return report


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of the proportion ``hits / count``; (0, 1) for ``count`` 0."""
    if count == 0:
        return 0.0, 1.0
    rate, z2 = hits / count, Z_95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a success scores above a failure, ties counting one half; NaN with one class only.

    Args:
        scores: (n,) float.
        labels: (n,) bool.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((mean_ranks[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def pick_threshold(scores: np.ndarray, labels: np.ndarray, *, beta: float = 1.5) -> float:
    """Returns the threshold with the highest F-beta, in the middle of the gap between neighbouring scores.

    Args:
        scores: (n,) float in [0, 1].
        labels: (n,) bool, with at least one success.
        beta: how many times recall matters as much as precision (paper 4.4 asks for high recall).

    Raises:
        ValueError: if there is no success to recall or a score is NaN.
    """
    labels = np.asarray(labels, dtype=bool)
    if not labels.any() or np.isnan(scores).any():
        raise ValueError(
            f"pick_threshold needs at least one success and no NaN, got {int(labels.sum())} successes among "
            f"{len(labels)} rollouts and {int(np.isnan(scores).sum())} NaN scores. Record successful episodes too."
        )
    values = np.unique(scores)
    best_f, best_threshold = -1.0, 0.5
    for below, value in zip(np.concatenate([[0.0], values[:-1]]), values, strict=True):
        said = scores >= value
        hits = int((said & labels).sum())
        f = (1 + beta**2) * hits / (int(said.sum()) + beta**2 * int(labels.sum()))
        if f >= best_f:
            best_f, best_threshold = f, float(below + value) / 2
    return best_threshold


def format_calibration(report: dict[str, Any]) -> str:
    """Returns a report of :func:`evaluate_judge` as a table for the terminal."""
    names = ("precision", "recall", "fpr", "auc")
    lines = [f"{'':16}{'n':>6}{'success':>9}{'abstain':>9}  " + "".join(f"{name:<19}" for name in names)]
    rows = [("all", report)]
    for key in ("sources", "behaviours"):
        groups = report.get(key, {})
        rows += [(f"  {name or 'unknown'}", group) for name, group in groups.items()] if len(groups) > 1 else []
    for name, group in rows:
        rates = "".join(f"{_show(group[rate]):<19}" for rate in names)
        lines.append(f"{name:16}{group['n']:>6}{group['successes']:>9}{group['abstained']:>9}  {rates}".rstrip())
    lines += ["95 % intervals: Wilson; AUC by bootstrap over rollouts", ""]
    lines.append(f"{'threshold':>10}{'precision':>11}{'recall':>9}{'fpr':>7}")
    for row in report["thresholds"]:
        cells = [f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("precision", "recall", "fpr")]
        lines.append(f"{row['threshold']:>10.2f}{cells[0]:>11}{cells[1]:>9}{cells[2]:>7}")
    return "\n".join(lines)


def _rates(verdicts: Sequence[Verdict], labels: np.ndarray, bootstrap: int, seed: int) -> dict[str, Any]:
    valid = np.array([verdict.valid for verdict in verdicts])
    said = np.array([bool(verdict.success) for verdict in verdicts])[valid]
    scores = np.array([verdict.score for verdict in verdicts])
    scored = ~np.isnan(scores)
    counts = _confusion(said, labels[valid])
    return {
        "n": len(verdicts),
        "successes": int(labels.sum()),
        "abstained": int((~valid).sum()),
        **{name: _ratio(*counts[name]) for name in ("precision", "recall", "fpr")},
        "auc": _auc_interval(scores[scored], labels[scored], bootstrap, seed),
    }


def _confusion(said: np.ndarray, labels: np.ndarray) -> dict[str, tuple[int, int]]:
    """Numerators and denominators of Eq. 33."""
    hits, false_alarms = int((said & labels).sum()), int((said & ~labels).sum())
    return {
        "precision": (hits, hits + false_alarms),
        "recall": (hits, int(labels.sum())),
        "fpr": (false_alarms, int((~labels).sum())),
    }


def _ratio(hits: int, count: int) -> dict[str, float | None]:
    low, high = wilson_interval(hits, count)
    return {"value": hits / count if count else None, "low": low, "high": high}


def _auc_interval(scores: np.ndarray, labels: np.ndarray, bootstrap: int, seed: int) -> dict[str, float | None]:
    value = auc(scores, labels)
    if math.isnan(value):
        return {"value": None, "low": 0.0, "high": 1.0}
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(scores), size=(bootstrap, len(scores)))
    values = np.array([auc(scores[pick], labels[pick]) for pick in picks])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def _show(rate: dict[str, float | None]) -> str:
    return "-" if rate["value"] is None else f"{rate['value']:.3f} [{rate['low']:.2f}, {rate['high']:.2f}]"
