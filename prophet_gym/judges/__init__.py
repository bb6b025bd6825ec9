"""Judges: reward from frames and an instruction (paper 3.4)."""

from prophet_gym.judges.backends import Answer, Backend, Question, Sampling, ServerBackend
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
from prophet_gym.judges.in_process import TransformersBackend, VLLMBackend
from prophet_gym.judges.opening import open_judge
from prophet_gym.judges.oracle import OracleJudge
from prophet_gym.judges.prompting import PROMPTS
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
    "calibration_report",
    "check_rollout",
    "check_rollouts",
    "evaluate_judge",
    "format_calibration",
    "labelled_rollouts",
    "open_judge",
    "pick_threshold",
    "wilson_interval",
]
