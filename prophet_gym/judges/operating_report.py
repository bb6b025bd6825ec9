"""A calibration in words and on disk: tables, advice (paper 4.4), files beside the judge, the new threshold in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prophet_gym.atomic import atomic_text
from prophet_gym.judges.calibration import show_rate
from prophet_gym.strict_json import to_json

__all__ = ["advice", "apply_threshold", "calibration_files", "format_operating_point"]

HIGH_RECALL, CLEAN = 0.9, 0.8
"""In the paper's Fig. 14 a recall near 0.98 with a precision above 0.85 taught the policy, and a recall of 0.7 to 0.8
at a precision near 0.8 did not."""
RATES = ("precision", "recall", "fpr")


def advice(report: dict[str, Any]) -> list[str]:
    """What the figures at the chosen threshold mean for training, one sentence each."""
    lines = [
        "For reinforcement learning prefer high recall; a moderate FPR is tolerated while precision holds (paper 4.4)."
    ]
    for name, source in report["sources"].items():
        chosen = source["chosen"]
        recall, precision = chosen["recall"]["value"], chosen["precision"]["value"]
        if recall is not None and recall < HIGH_RECALL:
            lines.append(
                f"Recall on {name} rollouts is {recall:.2f}: successes that go unseen teach nothing; a judge at 0.7 to "
                "0.8 held the policy where it was."
            )
        if precision is not None and precision < CLEAN:
            lines.append(
                f"Precision on {name} rollouts is {precision:.2f}: rewards dominated by failures pull the policy away "
                "from the task."
            )
        if chosen["abstained"] > 0.1 * chosen["n"]:
            lines.append(f"{chosen['abstained']} of {chosen['n']} {name} rollouts are not decided and teach nothing.")
    lines.append(
        "Chosen and measured on the same rollouts, so a little too good; measure again on others, and on the policy's "
        "own rollouts as it changes: a late drop of precision is what ruins a run."
    )
    return lines


def format_operating_point(report: dict[str, Any]) -> str:
    """Returns a report of :func:`prophet_gym.judges.calibrate_judge` as tables for the terminal."""
    aim, beta = report["objective"], report["objective"]["beta"]
    goal = f"the highest F-{beta:g}"
    if aim["kind"] == "precision":
        bound = " (lower bound)" if aim["lower_bound"] else ""
        goal = f"the highest recall at a precision of at least {aim['target']:g}{bound}"
    chosen_on = "all rollouts" if report["select"] == "all" else f"{report['select']} rollouts"
    lines = [f"threshold {report['threshold']:.4f}: {goal} on {chosen_on}", ""]
    head = "".join(f"{name:<19}" for name in RATES)
    lines.append(f"{'':26}{'n':>6}{'success':>9}{'abstain':>9}  {head}{'AUC':<19}{'ECE':<6}")
    for name, source in report["sources"].items():
        for when in ("now", "chosen"):
            point = source[when]
            rates = "".join(f"{show_rate(point[rate]):<19}" for rate in RATES)
            tail = ""
            if when == "now":
                error = "-" if source["ece"] is None else f"{source['ece']:.3f}"
                tail = f"{show_rate(source['auc']):<19}{error}"
            label = f"{name}, {report[when]['threshold']:.3f} ({when})"
            lines.append(
                f"{label:26}{source['n']:>6}{source['successes']:>9}{point['abstained']:>9}  {rates}{tail}".rstrip()
            )
    lines += _table(report["thresholds"], "threshold", "{:.3f}", mark=report["threshold"])
    for over, rows, form in (("votes", report["votes"], "{:d}"), ("min_margin", report["margins"], "{:.2f}")):
        lines += _table(rows, over, form) if rows else []
    return "\n".join([*lines, "", "95 % intervals: Wilson; AUC by bootstrap over rollouts", *advice(report)])


def _table(rows: list[dict[str, Any]], over: str, form: str, mark: float | None = None) -> list[str]:
    lines = ["", f"{over:>12}{'abstain':>9}  " + "".join(f"{name:<19}" for name in RATES) + "F-beta"]
    for row in rows:
        rates = "".join(f"{show_rate(row[rate]):<19}" for rate in RATES)
        score = "-" if row["f_beta"] is None else f"{row['f_beta']:.3f}"
        arrow = "  <- chosen" if row[over] == mark else ""
        lines.append(f"{form.format(row[over]):>12}{row['abstained']:>9}  {rates}{score}{arrow}")
    return lines


def calibration_files(judge: str | Path, out: str | Path | None = None) -> tuple[Path, Path]:
    """Where a calibration and its diagram go.

    Args:
        judge: folder of a classifier or JSON file of a vision-language judge.
        out: folder to write to instead of beside the judge.

    Returns:
        ``calibration.json`` and ``calibration.svg`` in a classifier's folder; beside the file NAME.json of a
        vision-language judge, where others may live, ``NAME.calibration.json`` and ``NAME.calibration.svg``.

    Raises:
        ValueError: the folder cannot be written to.
    """
    judge = Path(judge)
    lonely = judge.suffix != ".json"
    folder = Path(out) if out is not None else judge if lonely else judge.parent
    if out is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; give another folder for the calibration with --out.")
    stem = "calibration" if lonely else f"{judge.stem}.calibration"
    return folder / f"{stem}.json", folder / f"{stem}.svg"


def apply_threshold(judge: str | Path, threshold: float) -> Path:
    """Writes a threshold into a judge's own JSON file, in one step; everything else in it stays.

    Args:
        judge: folder of a classifier or JSON file of a vision-language judge.
        threshold: the new one.

    Returns:
        The file that changed.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(judge) if Path(judge).suffix == ".json" else Path(judge) / "judge.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the JSON file of a judge ({error}).") from error
    atomic_text(path, to_json({**values, "threshold": threshold}))
    return path
