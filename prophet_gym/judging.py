"""How an environment asks its judge: once for all rollouts, and without trusting it to stay alive."""

from __future__ import annotations

import logging

import numpy as np

from .judges.base import Judge, Verdict

__all__ = ["ask_judge"]

logger = logging.getLogger(__name__)


def ask_judge(
    judge: Judge | None, rollouts: list[np.ndarray], instructions: list[str], told: set[str]
) -> list[Verdict]:
    """Asks ``judge`` about all rollouts at once; one that fails abstains, with a warning, and spares the others.

    Args:
        judge: None abstains on everything.
        rollouts: frames (T, H, W, 3) uint8 of each rollout, snapshot first.
        instructions: their goals.
        told: failures that were logged before; they are not logged again, new ones are added.
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
            verdicts = [ask_judge(judge, [frames], [instruction], told)[0] for frames, instruction in pairs]
            if all(verdict.valid for verdict in verdicts) and "judge_batch" not in told:
                logger.warning("judge_batch fails on %d rollouts, not on each alone: %s", len(rollouts), error)
                told.add("judge_batch")
            return verdicts
        reason, kind = f"{type(error).__name__}: {error}", type(error).__name__
        if kind not in told:
            logger.warning("The judge failed on %r and abstains: %s. It is said once.", instructions[0], reason)
            told.add(kind)
        return [Verdict.abstain(reason)]
