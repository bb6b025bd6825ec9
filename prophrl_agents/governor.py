"""The governor: does what the judge rewards happen in truth (Fig. 14: judged success rises, true success falls)?

Every few updates it takes rollouts the learner was rewarded for and asks a reference about the same actions: a
simulator that replays them from the same snapshots, or a second judge that sees the same frames. It never gives a
reward; it compares, logs and, by rule, warns, stops the run or sends the policy back to the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from prophet_gym.judges.base import as_judge
from prophet_gym.judges.calibration import wilson_interval
from prophet_gym.sims.vector import without_frames
from prophrl_agents.batch import RolloutBatch

__all__ = ["Governor", "GovernorReport", "GovernorRules", "JudgeReference", "Reference", "SimulatorReference"]

Action = Literal["continue", "warn", "stop", "rollback"]


@dataclass(frozen=True)
class GovernorRules:
    """When the governor looks, and what it does about what it sees.

    Raises:
        ValueError: a number out of range or an unknown reaction.
    """

    every: int = 5
    """Updates between two checks."""
    rollouts: int = 128
    """Rollouts of an update that are checked, evenly spread over its groups; 128 tell a rate to 4 points."""
    min_precision: float = 0.5
    """Warn when fewer of the judged successes than this are true."""
    max_gap: float = 0.3
    """Warn when judged success exceeds true success by more than this."""
    max_drop: float = 0.15
    """React when true success is below its best by more than this; the best of several checks is luck by 6 points..."""
    patience: int = 2
    """...over the last so many checks, taken together and all of them after the best."""
    reaction: Literal["warn", "stop", "rollback"] = "rollback"
    """What to do then: go on with a warning, stop, or go on from the best checkpoint."""

    def __post_init__(self) -> None:
        """Checks every rule."""
        for name in ("every", "rollouts", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("min_precision", "max_gap", "max_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        if self.reaction not in ("warn", "stop", "rollback"):
            raise ValueError(f"reaction is {self.reaction!r}, expected 'warn', 'stop' or 'rollback'")


@dataclass(frozen=True)
class GovernorReport:
    """One check. Rates are None where nothing was judged that they could be of; intervals are Wilson's, 95 %.

    Attributes:
        update: updates done.
        count: rollouts compared; those without a verdict from either side are left out.
        judged_success: share that the judge called successful (the proxy).
        true_success: share that the reference called successful.
        gap: judged minus true success.
        precision: share of judged successes that are true, with its interval.
        recall: share of true successes that the judge saw, with its interval.
        false_positive_rate: share of true failures that the judge called successes, with its interval.
        best: whether true success is the highest so far.
        action: what the rules ask for.
        reason: why, empty for "continue".
    """

    update: int
    count: int
    judged_success: float
    true_success: float
    gap: float
    precision: tuple[float, float, float] | None
    recall: tuple[float, float, float] | None
    false_positive_rate: tuple[float, float, float] | None
    best: bool
    action: Action
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Reference(Protocol):
    """Whoever knows better than the judge."""

    def outcomes(self, batch: RolloutBatch, rollouts: Sequence[int]) -> list[bool | None]:
        """Returns, for each rollout index, whether it truly succeeded; None where that cannot be said."""
        ...


class SimulatorReference:
    """Replays the executed commands in a simulator, from the same snapshots.

    Args:
        env: the simulator, with actions Box(CH, D); its snapshots carry a simulator state.
        same_seeds: rollouts without a snapshot are replayed from their reset seed. Right only where they were made in
            the same simulator, under another judge: a world model makes other scenes of its seeds.
    """

    def __init__(self, env: VectorEnv, *, same_seeds: bool = False) -> None:
        self.env, self.same_seeds = env, same_seeds

    def outcomes(self, batch: RolloutBatch, rollouts: Sequence[int]) -> list[bool | None]:
        """See :class:`Reference`.

        An episode that the simulator ends early keeps its outcome; one that goes on after the world model's ended is
        judged by the simulator where the commands end.

        Raises:
            ValueError: a rollout did not start from a snapshot, so that the simulator cannot start there.
        """
        results: list[bool | None] = []
        with without_frames(self.env):
            for first in range(0, len(rollouts), self.env.num_envs):
                results += self._replay(batch, list(rollouts[first : first + self.env.num_envs]))
        return results

    def _replay(self, batch: RolloutBatch, rollouts: list[int]) -> list[bool | None]:
        starts = [batch.starts[b // batch.group_size] for b in rollouts]
        snapshots = [start.snapshot for start in starts]
        if None in snapshots and not self.same_seeds:
            raise ValueError(
                "a rollout has no snapshot, so the simulator cannot start where it did; collect from "
                "Start(seed, snapshot) with snapshots that carry a simulator_state; or set same_seeds=True if the "
                "rollouts were made in this very simulator"
            )
        spare = self.env.num_envs - len(rollouts)
        starts += starts[-1:] * spare
        seeds: Any = [start.seed for start in starts]
        given = any(snapshot is not None for snapshot in snapshots)
        self.env.reset(seed=seeds, options={"snapshots": [start.snapshot for start in starts]} if given else None)
        index = rollouts + rollouts[-1:] * spare
        outcome, over = [False] * len(rollouts), [False] * len(rollouts)
        called = batch.called[index].numpy()
        for s in range(int(called.sum(axis=1).max())):
            _, _, terminated, truncated, info = self.env.step(batch.actions[index, s].numpy())
            final, ended_now = info.get("final_info", {}), info.get("_final_info", np.zeros(len(index), bool))
            for i in range(len(rollouts)):
                if over[i] or not called[i, s]:
                    continue
                source = final if ended_now[i] else info
                outcome[i] = bool(source["is_success"][i])
                over[i] = bool(terminated[i] or truncated[i])
            if all(over):
                break
        return list(outcome)


class JudgeReference:
    """Asks a second judge about the same frames; for robots without a simulator.

    Args:
        judge: any judge that the first one was not made from.
    """

    def __init__(self, judge: Any) -> None:
        self.judge = as_judge(judge)

    def outcomes(self, batch: RolloutBatch, rollouts: Sequence[int]) -> list[bool | None]:
        """See :class:`Reference`; None where the second judge abstains.

        Raises:
            ValueError: the batch has no frames.
        """
        if not batch.frames:
            raise ValueError("the batch has no frames for a second judge; collect it with keep_frames=True")
        frames = [batch.frames[b] for b in rollouts]
        verdicts = self.judge.judge_batch(frames, [batch.instructions[b] for b in rollouts])
        return [verdict.success if verdict.valid else None for verdict in verdicts]


class Governor:
    """Compares judge and reference every few updates and applies the rules; remembers what it saw.

    Args:
        reference: who knows better.
        rules: when to look and how to react.
    """

    def __init__(self, reference: Reference, rules: GovernorRules | None = None) -> None:
        self.reference, self.rules = reference, GovernorRules() if rules is None else rules
        self.reports: list[GovernorReport] = []

    @property
    def needs_frames(self) -> bool:
        """Whether rollouts have to be collected with their frames."""
        return isinstance(self.reference, JudgeReference)

    def due(self, update: int) -> bool:
        """Whether the rollouts of this update are to be checked."""
        return update % self.rules.every == 0

    def check(self, batch: RolloutBatch, update: int) -> GovernorReport:
        """Compares some rollouts of an update with the reference, and says what to do.

        Args:
            batch: the rollouts that the learner was rewarded for.
            update: updates done.

        Raises:
            ValueError: the reference cannot say anything about these rollouts.
        """
        valid = batch.valid.nonzero().flatten().tolist()
        take = min(self.rules.rollouts, len(valid))
        chosen = [valid[i] for i in np.linspace(0, len(valid) - 1, take).round().astype(int)] if take else []
        truth = self.reference.outcomes(batch, chosen) if chosen else []
        known = [(bool(batch.success[b]), said) for b, said in zip(chosen, truth, strict=True) if said is not None]
        judged = np.array([pair[0] for pair in known], bool)
        true = np.array([pair[1] for pair in known], bool)
        report = self._report(update, judged, true)
        self.reports.append(report)
        return report

    def _report(self, update: int, judged: np.ndarray, true: np.ndarray) -> GovernorReport:
        count = len(true)
        proxy, truth = (float(x.mean()) if count else 0.0 for x in (judged, true))
        before = [(report.true_success, report.count) for report in self.reports if report.count]
        report = GovernorReport(
            update=update,
            count=count,
            judged_success=proxy,
            true_success=truth,
            gap=proxy - truth,
            precision=_rate(judged & true, judged),
            recall=_rate(judged & true, true),
            false_positive_rate=_rate(judged & ~true, ~true),
            best=bool(count) and truth >= max((rate for rate, _ in before), default=0.0),
            action="continue",
            reason="",
        )
        action, reason = self._decide(report, before)
        return replace(report, action=action, reason=reason)

    def _decide(self, report: GovernorReport, before: list[tuple[float, int]]) -> tuple[Action, str]:
        rules = self.rules
        if not report.count:
            return "warn", "no rollout could be compared: judge or reference abstained on all of them"
        checks = [*before, (report.true_success, report.count)]
        best = max(range(len(checks)), key=lambda i: (checks[i][0], i))
        recent = checks[best + 1 :][-rules.patience :]
        if len(recent) == rules.patience:
            rate = sum(rate * count for rate, count in recent) / sum(count for _, count in recent)
            if rate < checks[best][0] - rules.max_drop:
                return rules.reaction, (
                    f"true success {rate:.2f} of the last {rules.patience} checks is more than {rules.max_drop:.2f} "
                    f"below its best {checks[best][0]:.2f}, while the judge says {report.judged_success:.2f}"
                )
        if report.precision is not None and report.precision[0] < rules.min_precision:
            return "warn", f"only {report.precision[0]:.2f} of the judged successes are true"
        if report.gap > rules.max_gap:
            return "warn", f"judged success exceeds true success by {report.gap:.2f}"
        return "continue", ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the reports, as plain values."""
        return {"reports": [report.to_dict() for report in self.reports]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        rates = ("precision", "recall", "false_positive_rate")
        self.reports = []
        for report in state["reports"]:
            values: dict[str, Any] = {k: tuple(v) if k in rates and v is not None else v for k, v in report.items()}
            self.reports.append(GovernorReport(**values))


def _rate(hits: np.ndarray, among: np.ndarray) -> tuple[float, float, float] | None:
    """Returns (rate, low, high), or None where nothing is counted."""
    count = int(among.sum())
    if not count:
        return None
    low, high = wilson_interval(int(hits.sum()), count)
    return float(hits.sum()) / count, low, high
