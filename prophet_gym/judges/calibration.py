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

__all__ = [
    "auc",
    "auc_interval",
    "calibration_report",
    "confusion",
    "evaluate_judge",
    "evaluate_verdicts",
    "format_calibration",
    "judge_rollouts",
    "ratio",
    "show_rate",
    "wilson_interval",
]

Z_95 = 1.959964


def evaluate_judge(
    judge: Judge, rollouts: Sequence[LabelledRollout], *, batch_size: int = 64, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Judges labelled rollouts and reports how the verdicts compare with the truth.

    Args:
        judge: the judge to measure.
        rollouts: with the truth about them, a simulator's or a person's.
        batch_size: rollouts per ``judge_batch`` call.
        bootstrap: resamplings behind the AUC interval.
        seed: of the resampling.

    Returns:
        :func:`calibration_report` over all rollouts, with "behaviours" and "sources": the same figures per group.

    Raises:
        ValueError: if there are no rollouts.
    """
    verdicts = judge_rollouts(judge, rollouts, batch_size=batch_size)
    return evaluate_verdicts(verdicts, rollouts, bootstrap=bootstrap, seed=seed)


def judge_rollouts(judge: Judge, rollouts: Sequence[LabelledRollout], *, batch_size: int = 64) -> list[Verdict]:
    """Returns the judge's verdict on each rollout, ``batch_size`` of them per ``judge_batch`` call.

    Raises:
        ValueError: if there are no rollouts.
    """
    if not rollouts:
        raise ValueError("A judge is measured on at least one labelled rollout, got none.")
    verdicts: list[Verdict] = []
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        verdicts += judge.judge_batch([r.frames for r in batch], [r.instruction for r in batch])
    return verdicts


def evaluate_verdicts(
    verdicts: Sequence[Verdict], rollouts: Sequence[LabelledRollout], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The report of :func:`evaluate_judge` from verdicts that are there already, one per rollout."""
    labels = np.array([rollout.label for rollout in rollouts])
    report = calibration_report(verdicts, labels, bootstrap=bootstrap, seed=seed)
    for key, group_of in (("behaviours", lambda r: r.behaviour), ("sources", lambda r: r.source)):
        groups = np.array([group_of(rollout) for rollout in rollouts])
        report[key] = {}
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group).tolist()
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
        counts = confusion(said, labels[scored])
        row = {name: ratio(*counts[name])["value"] for name in ("precision", "recall", "fpr")}
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


def format_calibration(report: dict[str, Any]) -> str:
    """Returns a report of :func:`evaluate_judge` as a table for the terminal."""
    names = ("precision", "recall", "fpr", "auc")
    lines = [f"{'':16}{'n':>6}{'success':>9}{'abstain':>9}  " + "".join(f"{name:<19}" for name in names)]
    rows = [("all", report)]
    for key in ("sources", "behaviours"):
        groups = report.get(key, {})
        rows += [(f"  {name or 'unknown'}", group) for name, group in groups.items()] if len(groups) > 1 else []
    for name, group in rows:
        rates = "".join(f"{show_rate(group[rate]):<19}" for rate in names)
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
    counts = confusion(said, labels[valid])
    return {
        "n": len(verdicts),
        "successes": int(labels.sum()),
        "abstained": int((~valid).sum()),
        **{name: ratio(*counts[name]) for name in ("precision", "recall", "fpr")},
        "auc": auc_interval(scores[scored], labels[scored], bootstrap, seed),
    }


def confusion(said: np.ndarray, labels: np.ndarray) -> dict[str, tuple[int, int]]:
    """Numerators and denominators of Eq. 33."""
    hits, false_alarms = int((said & labels).sum()), int((said & ~labels).sum())
    return {
        "precision": (hits, hits + false_alarms),
        "recall": (hits, int(labels.sum())),
        "fpr": (false_alarms, int((~labels).sum())),
    }


def ratio(hits: int, count: int) -> dict[str, float | None]:
    """Returns a proportion with its 95 % Wilson interval; the value is None for ``count`` 0."""
    low, high = wilson_interval(hits, count)
    return {"value": hits / count if count else None, "low": low, "high": high}


def auc_interval(scores: np.ndarray, labels: np.ndarray, bootstrap: int, seed: int) -> dict[str, float | None]:
    """Returns the AUC with a 95 % bootstrap interval over rollouts; the value is None with one class only."""
    value = auc(scores, labels)
    if math.isnan(value):
        return {"value": None, "low": 0.0, "high": 1.0}
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(scores), size=(bootstrap, len(scores)))
    values = np.array([auc(scores[pick], labels[pick]) for pick in picks])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def show_rate(rate: dict[str, float | None]) -> str:
    """Returns a rate with its interval in words; "-" where it is undefined."""
    return "-" if rate["value"] is None else f"{rate['value']:.3f} [{rate['low']:.2f}, {rate['high']:.2f}]"
