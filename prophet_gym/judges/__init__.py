"""Judges: reward from frames and an instruction (paper 3.4)."""

from prophet_gym.judges.base import FunctionJudge, Judge, Verdict, as_judge, check_rollout, check_rollouts
from prophet_gym.judges.calibration import (
    auc,
    calibration_report,
    evaluate_judge,
    format_calibration,
    pick_threshold,
    wilson_interval,
)
from prophet_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from prophet_gym.judges.oracle import OracleJudge
from prophet_gym.judges.rollouts import LabelledRollout, labelled_rollouts

__all__ = [
    "ClassifierConfig",
    "ClassifierJudge",
    "FunctionJudge",
    "Judge",
    "LabelledRollout",
    "OracleJudge",
    "Verdict",
    "as_judge",
    "auc",
    "calibration_report",
    "check_rollout",
    "check_rollouts",
    "evaluate_judge",
    "format_calibration",
    "labelled_rollouts",
    "pick_threshold",
    "wilson_interval",
]
