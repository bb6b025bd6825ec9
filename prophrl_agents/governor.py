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
from prophet_gym.sims.vector import without_frames
from prophet_gym.snapshot import Snapshot
from prophrl_agents.batch import RolloutBatch
from prophrl_agents.evaluate import clustered_interval
from prophrl_agents.rollout import info_entry, last_info, must_reset_ended

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
    """Rollouts of an update that are checked, evenly spread over its groups; 128 tell a rate to about 9 points."""
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
    """One check. Rates are None where nothing was judged that they could be of; intervals are 95 %, groups the unit.

    Attributes:
        update: updates done.
        count: rollouts compared; those without a verdict from either side are left out.
        judged_success: share that the judge called successful (the proxy).
        true_success: share that the reference called successful.
        gap: judged minus true success.
        precision: share of judged successes that are true, with its interval.
        recall: share of true successes that the judge saw, with its interval.
        false_positive_rate: share of true failures that the judge called successes, with its interval.
        best: whether true success is the highest so far, of checks that compared at least half of ``asked``.
        action: what the rules ask for.
        reason: why, empty for "continue".
        asked: rollouts that were to be compared.
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
    asked: int = 0

    @property
    def telling(self) -> bool:
        """Whether enough was compared to act upon."""
        return self.count > 0 and 2 * self.count >= self.asked

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
        judged by the simulator where the commands end, None if it judges at its horizon alone and that is later.

        Raises:
            ValueError: a rollout did not start from a snapshot, so that the simulator cannot start there.
        """
        results: list[bool | None] = []
        with without_frames(self.env):
            for first in range(0, len(rollouts), self.env.num_envs):
                results += self._replay(batch, list(rollouts[first : first + self.env.num_envs]))
        return results

    def require(self, snapshots: Sequence[Snapshot]) -> None:
        """Requires that rollouts from these snapshots can be played again.

        Raises:
            ValueError: one carries no simulator state.
        """
        bare = [snapshot.name for snapshot in snapshots if snapshot.simulator_state is None]
        if bare:
            raise ValueError(
                f"the governor plays rollouts again in a simulator, but {len(bare)} of {len(snapshots)} snapshots have "
                f"no simulator_state, {bare[0]!r} for one; give snapshots taken in that simulator, or no governor_env"
            )

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
        outcome: list[bool | None] = [None] * len(rollouts)
        over = [False] * len(rollouts)
        called = batch.called[index].numpy()
        for s in range(int(called.sum(axis=1).max())):
            _, reward, terminated, truncated, info = self.env.step(batch.actions[index, s].numpy())
            ended = np.asarray(terminated) | np.asarray(truncated)
            for i in range(len(rollouts)):
                if over[i] or not called[i, s]:
                    continue
                last = last_info(info, i)
                success, asked = info_entry(last, "is_success", i), info_entry(last, "verdict", i) is not None
                if "verdict" not in last or asked:
                    outcome[i] = bool(terminated[i] and reward[i] > 0 if success is None else success)
                over[i] = bool(ended[i])
            if all(over):
                break
            if must_reset_ended(self.env) and ended.any():
                options = {"reset_mask": ended} | ({"snapshots": [start.snapshot for start in starts]} if given else {})
                self.env.reset(seed=seeds, options=options)
        return outcome


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
        known = np.array([b for b, said in zip(chosen, truth, strict=True) if said is not None], int)
        judged = batch.success.numpy()[known]
        true = np.array([said for said in truth if said is not None], bool)
        report = self._report(update, judged, true, known // batch.group_size, min(self.rules.rollouts, len(batch)))
        self.reports.append(report)
        return report

    def _report(
        self, update: int, judged: np.ndarray, true: np.ndarray, groups: np.ndarray, asked: int
    ) -> GovernorReport:
        count = len(true)
        proxy, truth = (float(x.mean()) if count else 0.0 for x in (judged, true))
        best = max((report.true_success for report in self.reports if report.telling), default=0.0)
        report = GovernorReport(
            update=update,
            count=count,
            judged_success=proxy,
            true_success=truth,
            gap=proxy - truth,
            precision=_rate(true, groups, judged),
            recall=_rate(judged, groups, true),
            false_positive_rate=_rate(judged, groups, ~true),
            best=False,
            action="continue",
            reason="",
            asked=asked,
        )
        report = replace(report, best=report.telling and truth >= best)
        action, reason = self._decide(report)
        return replace(report, action=action, reason=reason)

    def _decide(self, report: GovernorReport) -> tuple[Action, str]:
        rules = self.rules
        if not report.telling:
            return "warn", (
                f"only {report.count} of {report.asked} rollouts could be compared: judge or reference abstained on "
                "the others"
            )
        checks = [one for one in [*self.reports, report] if one.telling]
        best = max(range(len(checks)), key=lambda i: (checks[i].true_success, i))
        thrown = max((i for i, one in enumerate(checks) if one.action == "rollback"), default=-1)
        recent = checks[max(best, thrown) + 1 :][-rules.patience :]  # of weights that descend from the best ones
        if len(recent) == rules.patience:
            rate = sum(one.true_success * one.count for one in recent) / sum(one.count for one in recent)
            if rate < checks[best].true_success - rules.max_drop:
                return rules.reaction, (
                    f"true success {rate:.2f} of the last {rules.patience} checks is more than {rules.max_drop:.2f} "
                    f"below its best {checks[best].true_success:.2f}, while the judge says {report.judged_success:.2f}"
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


def _rate(hits: np.ndarray, groups: np.ndarray, among: np.ndarray) -> tuple[float, float, float] | None:
    """Returns (rate, low, high) of the hits among some, with groups as the unit; None where nothing is counted."""
    if not among.any():
        return None
    low, high = clustered_interval(hits[among], groups[among])
    return float(hits[among].mean()), low, high
