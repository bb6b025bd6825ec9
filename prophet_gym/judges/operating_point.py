"""Where a judge should draw the line: the threshold, and for voting judges the votes, against labelled rollouts.

What makes a judge fit for reinforcement learning (paper 4.4): it recognises nearly all successes (recall), and most of
what it calls a success is one (precision). A moderate false-positive rate does no harm as long as precision holds. Both
objectives here put that into numbers: F-beta with beta above 1, or the highest recall at a precision to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from prophet_gym.judges.base import Judge, Verdict
from prophet_gym.judges.calibration import auc_interval, confusion, judge_rollouts, ratio
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.reliability import expected_calibration_error, reliability_bins
from prophet_gym.judges.rollouts import LabelledRollout
from prophet_gym.judges.vlm import VLMJudge

__all__ = ["Objective", "calibrate_judge", "choose_threshold", "pick_threshold", "point_figures"]

GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class Objective:
    """What the threshold is chosen for.

    Attributes:
        kind: "fbeta", or "precision": the highest recall at a precision of at least ``target``.
        beta: how many times recall matters as much as precision (kind "fbeta").
        target: the precision to keep (kind "precision").
        lower_bound: the lower end of precision's 95 % Wilson interval has to reach ``target``, not precision itself.

    Raises:
        ValueError: a field out of range.
    """

    kind: Literal["fbeta", "precision"] = "fbeta"
    beta: float = 1.5
    target: float = 0.9
    lower_bound: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("fbeta", "precision"):
            raise ValueError(f'kind={self.kind!r}: expected "fbeta" or "precision".')
        if self.beta <= 0 or not 0.0 < self.target < 1.0:
            raise ValueError(f"beta={self.beta}, target={self.target}: expected above 0, and between 0 and 1.")


def pick_threshold(scores: np.ndarray, labels: np.ndarray, *, beta: float = 1.5) -> float:
    """Returns the threshold with the highest F-beta, in the middle of the gap between neighbouring scores.

    Args:
        scores: (n,) float in [0, 1].
        labels: (n,) bool, with at least one success.
        beta: how many times recall matters as much as precision (paper 4.4 asks for high recall).

    Raises:
        ValueError: if there is no success to recall or a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError(f"pick_threshold needs scores without NaN, got {int(np.isnan(scores).sum())} NaN scores.")
    return choose_threshold(scores, labels, Objective(beta=beta))


def choose_threshold(
    scores: np.ndarray, labels: np.ndarray, objective: Objective, rule: DecisionRule | None = None
) -> float:
    """Returns the best threshold for an objective, in the middle of a gap between neighbouring scores.

    Args:
        scores: (n,) float in [0, 1]; NaN where the judge abstains whatever the threshold.
        labels: (n,) bool, with at least one success among the scored.
        objective: what is best; of equals the higher threshold is taken.
        rule: margin and ties of the judge; its threshold is ignored.

    Raises:
        ValueError: if there is no success to recall, or no threshold reaches the precision that is asked for.
    """
    rule, labels = rule or DecisionRule(), np.asarray(labels, dtype=bool)
    scored = ~np.isnan(scores)
    scores, labels = scores[scored], labels[scored]
    if not labels.any():
        raise ValueError(
            f"A threshold needs at least one success to recall, got {int(labels.sum())} successes among {len(labels)} "
            "rollouts with a score. Record successful episodes too."
        )
    values = np.unique(scores)
    candidates = (np.concatenate([[0.0], values[:-1]]) + values) / 2
    if rule.tie_abstains:
        candidates = candidates[candidates > 0]  # nothing lies below 0, and what equals the threshold abstains
    if not len(candidates):
        raise ValueError(
            f"All {len(scores)} rollouts have the score 0: the judge recognised none of {int(labels.sum())} successes, "
            "and no threshold changes that. Look at its answers and its prompt."
        )
    best: tuple[float, ...] = (-1.0,)
    threshold, closest = 0.5, 0.0
    for candidate in candidates.tolist():
        figures = point_figures(scores, labels, replace(rule, threshold=candidate), beta=objective.beta)
        precision = figures["precision"]["low" if objective.lower_bound else "value"] or 0.0
        if objective.kind == "precision":
            closest = max(closest, precision)
            rank = (figures["recall"]["value"] or 0.0, precision) if precision >= objective.target else (-1.0,)
        else:
            rank = (figures["f_beta"] or 0.0,)
        if rank >= best and rank[0] >= 0:
            best, threshold = rank, candidate
    if best[0] < 0:
        which = "lower bound of the precision" if objective.lower_bound else "precision"
        raise ValueError(
            f"No threshold has a {which} of {objective.target}; the highest is {closest:.3f}, on {len(labels)} "
            "rollouts with a score. Ask for less, measure on more rollouts, or train a better judge."
        )
    return threshold


def point_figures(scores: np.ndarray, labels: np.ndarray, rule: DecisionRule, *, beta: float = 1.5) -> dict[str, Any]:
    """What a rule makes of scores.

    Args:
        scores: (n,) float; NaN where the judge abstains anyway.
        labels: (n,) bool.
        rule: from scores to verdicts.
        beta: of F-beta.

    Returns:
        n, abstained, precision, recall, fpr (Eq. 33, over what was decided, each with its Wilson interval) and f_beta.
    """
    decided = rule.decided(scores)
    said, truth = rule.success(scores)[decided], np.asarray(labels, dtype=bool)[decided]
    counts = confusion(said, truth)
    weight = int(said.sum()) + beta**2 * int(truth.sum())
    return {
        "n": len(scores),
        "abstained": int((~decided).sum()),
        **{name: ratio(*counts[name]) for name in ("precision", "recall", "fpr")},
        "f_beta": (1 + beta**2) * counts["recall"][0] / weight if weight else None,
    }


def calibrate_judge(
    judge: Judge,
    rollouts: Sequence[LabelledRollout],
    objective: Objective | None = None,
    *,
    select: Literal["all", "real", "imagined"] = "all",
    batch_size: int = 64,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures a judge on labelled rollouts and chooses its threshold there.

    Args:
        judge: a :class:`ClassifierJudge` or :class:`VLMJudge`; asked once about every rollout, not changed.
        rollouts: real, imagined or both.
        objective: what the threshold is chosen for.
        select: the rollouts that choose it; figures are given for every source.
        batch_size: rollouts per ``judge_batch`` call.
        bootstrap: resamplings behind the AUC intervals.
        seed: of the resampling.

    Returns:
        A JSON-ready dict: "threshold" (the chosen one), "now" and "chosen" (:func:`point_figures` at the judge's own
        and at the chosen threshold, on ``select``), "thresholds" (the same over a grid), "sources" (n, successes, auc,
        ece, reliability, now, chosen for each), "votes" and "margins" (rows for voting judges, else empty).

    Raises:
        ValueError: a judge without a threshold, no such rollouts, or what :func:`choose_threshold` refuses.
    """
    rule = getattr(judge, "rule", None)
    if not isinstance(rule, DecisionRule):
        raise ValueError(f"{type(judge).__name__} has no threshold to choose; expected a ClassifierJudge or VLMJudge.")
    objective = objective or Objective()
    sources = sorted({rollout.source for rollout in rollouts})
    if select != "all" and select not in sources:
        raise ValueError(f"select={select!r}: there are rollouts of {sources} only.")
    verdicts = judge_rollouts(judge, rollouts, batch_size=batch_size)
    labels = np.array([rollout.label for rollout in rollouts])
    source = np.array([rollout.source for rollout in rollouts])
    needed = judge.needed_votes if isinstance(judge, VLMJudge) else 0
    scores = np.array([v.score if v.valid or len(v.votes) >= needed else np.nan for v in verdicts])
    members = np.ones(len(rollouts), bool) if select == "all" else source == select
    if np.isnan(scores[members]).all():
        reason = next(v.reason for v, member in zip(verdicts, members, strict=True) if member)
        raise ValueError(f"The judge abstained on all {int(members.sum())} rollouts, on the first because: {reason}.")
    best = replace(rule, threshold=choose_threshold(scores[members], labels[members], objective, rule))

    def figures(which: np.ndarray, how: DecisionRule) -> dict[str, Any]:
        return point_figures(scores[which], labels[which], how, beta=objective.beta)

    report: dict[str, Any] = {
        "objective": vars(objective),
        "select": select,
        "threshold": best.threshold,
        "now": {"threshold": rule.threshold, **figures(members, rule)},
        "chosen": {"threshold": best.threshold, **figures(members, best)},
        "thresholds": [
            {"threshold": value, **figures(members, replace(rule, threshold=value))}
            for value in sorted({*(each for each in GRID if abs(each - best.threshold) > 1e-6), best.threshold})
        ],
        "sources": {},
        "votes": [],
        "margins": [],
        "seed": seed,
    }
    for name in sources:
        which = source == name
        scored = which & ~np.isnan(scores)
        report["sources"][name] = {
            "n": int(which.sum()),
            "successes": int(labels[which].sum()),
            "auc": auc_interval(scores[scored], labels[scored], bootstrap, seed),
            "ece": expected_calibration_error(scores[scored], labels[scored]),
            "reliability": reliability_bins(scores[scored], labels[scored]),
            "now": figures(which, rule),
            "chosen": figures(which, best),
        }
    if isinstance(judge, VLMJudge) and judge.config.method == "votes":
        chosen = [verdict for verdict, member in zip(verdicts, members, strict=True) if member]
        report["votes"] = _over_votes(chosen, labels[members], best, judge.config.votes, needed, objective.beta)
        report["margins"] = _over_margins(scores[members], labels[members], best, objective.beta)
    return report


def _over_votes(
    verdicts: Sequence[Verdict], labels: np.ndarray, rule: DecisionRule, votes: int, needed: int, beta: float
) -> list[dict[str, Any]]:
    """Figures had only the first 1, 2, ... of the recorded readable votes been drawn."""
    rows = []
    for count in range(1, votes + 1):
        least = min(needed, count)
        shares = [np.mean(v.votes[:count]) if len(v.votes) >= least else np.nan for v in verdicts]
        rows.append({"votes": count, **point_figures(np.array(shares), labels, rule, beta=beta)})
    return rows


def _over_margins(scores: np.ndarray, labels: np.ndarray, rule: DecisionRule, beta: float) -> list[dict[str, Any]]:
    """Figures for every ``min_margin`` that makes a difference, rounded down so that it still admits what it names."""
    margins = 2 * np.abs(scores[~np.isnan(scores)] - rule.threshold)
    steps = np.unique(np.concatenate([[0.0], np.floor(margins * 1e4 + 1e-6) / 1e4]))
    return [
        {"min_margin": float(step), **point_figures(scores, labels, replace(rule, margin=float(step) / 2), beta=beta)}
        for step in steps
        if step <= 1
    ]
