"""How an environment asks its judge: once for all rollouts, and without trusting it to stay alive."""

from __future__ import annotations

import logging

import numpy as np

from .judges.base import Judge, Verdict

__all__ = ["ask_judge"]

logger = logging.getLogger(__name__)


def ask_judge(judge: Judge | None, rollouts: list[np.ndarray], instructions: list[str]) -> list[Verdict]:
    """Asks ``judge`` about all rollouts at once; one that fails abstains, with a warning, and spares the others.

    Args:
        judge: None abstains on everything.
        rollouts: frames (T, H, W, 3) uint8 of each rollout, snapshot first.
        instructions: their goals.
    """
    if judge is None:
        return [Verdict.abstain("the environment has no judge")] * len(rollouts)
    try:
        verdicts = list(judge.judge_batch(rollouts, instructions))
        if len(verdicts) != len(rollouts) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
            raise ValueError(f"judge_batch answered {verdicts!r} to {len(rollouts)} rollouts; expected a Verdict each.")
        return verdicts
    except Exception as error:  # whatever a judge does, it must not end a rollout or label it a failure
        if len(rollouts) > 1:
            pairs = zip(rollouts, instructions, strict=True)
            return [ask_judge(judge, [frames], [instruction])[0] for frames, instruction in pairs]
        logger.warning("The judge failed on %r and abstains: %s: %s", instructions[0], type(error).__name__, error)
        return [Verdict.abstain(f"{type(error).__name__}: {error}")]
