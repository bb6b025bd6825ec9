"""Judges: reward from frames and an instruction (paper 3.4)."""

from prophet_gym.judges.backends import Answer, Backend, Question, Sampling, ServerBackend
from prophet_gym.judges.base import FunctionJudge, Judge, Verdict, as_judge, check_rollout, check_rollouts
from prophet_gym.judges.calibration import (
    auc,
    calibration_report,
    evaluate_judge,
    evaluate_verdicts,
    format_calibration,
    judge_rollouts,
    wilson_interval,
)
from prophet_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from prophet_gym.judges.disagreement import cohen_kappa, compare_verdicts, format_disagreement
from prophet_gym.judges.human_labels import known_labels, read_labels, write_labels
from prophet_gym.judges.in_process import TransformersBackend, VLLMBackend
from prophet_gym.judges.opening import open_judge
from prophet_gym.judges.operating_point import Objective, calibrate_judge, choose_threshold, pick_threshold
from prophet_gym.judges.operating_report import format_operating_point
from prophet_gym.judges.oracle import OracleJudge
from prophet_gym.judges.prompting import PROMPTS
from prophet_gym.judges.reliability import draw_calibration, expected_calibration_error
from prophet_gym.judges.rollouts import LabelledRollout, labelled_rollouts
from prophet_gym.judges.vlm import VLMConfig, VLMJudge

__all__ = [
    "Answer",
    "Backend",
    "ClassifierConfig",
    "ClassifierJudge",
    "FunctionJudge",
    "Judge",
    "LabelledRollout",
    "Objective",
    "OracleJudge",
    "PROMPTS",
    "Question",
    "Sampling",
    "ServerBackend",
    "TransformersBackend",
    "VLLMBackend",
    "VLMConfig",
    "VLMJudge",
    "Verdict",
    "as_judge",
    "auc",
    "calibrate_judge",
    "calibration_report",
    "check_rollout",
    "check_rollouts",
    "choose_threshold",
    "cohen_kappa",
    "compare_verdicts",
    "draw_calibration",
    "evaluate_judge",
    "evaluate_verdicts",
    "expected_calibration_error",
    "format_calibration",
    "format_disagreement",
    "format_operating_point",
    "judge_rollouts",
    "known_labels",
    "labelled_rollouts",
    "open_judge",
    "pick_threshold",
    "read_labels",
    "wilson_interval",
    "write_labels",
]
