"""How often a policy succeeds, from which starts, and whether another policy is better on the same ones.

An evaluation is a pure function of the weights, the starts and the noise seeds, so two policies meet the same initial
states and the same policy noise, and their comparison is paired. Scenes are the unit of every interval: rollouts that
repeat a start with other noise, or a snapshot under another seed, say less than rollouts from new scenes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from prophet_gym.judges.base import Verdict
from prophet_gym.judges.calibration import Z_95, calibration_report, wilson_interval
from prophrl_agents.batch import Start
from prophrl_agents.policies.base import FlowPolicy, SampleMode
from prophrl_agents.rollout import collect_groups

__all__ = [
    "Comparison",
    "Evaluation",
    "agreement",
    "clustered_interval",
    "compare",
    "evaluate_policy",
    "evaluate_starts",
]

FIRST_SEED, SEEDS_PER_SET = 1_000_000_000, 100_000
"""Evaluation seeds begin here, above those of recorded episodes and of training; each set has its own range."""
SELECTION_SET = 999
"""The set that runs choose by: what is chosen is reported on others."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """n rollouts: every start once per noise seed, starts in order, one noise seed after the other.

    Attributes:
        success: (n,) bool, as the judge or the simulator said; False where it abstained.
        valid: (n,) bool, False where the judge failed or abstained: such a rollout counts in no rate.
        scores: (n,) float64 score of the verdict, NaN without one.
        rewards: (n,) float64 sum of rewards.
        seeds: (n,) int64 reset seeds.
        noise_seeds: (n,) int64 seeds of the policy's noise.
        start_ids: n strings, equal for equal starts; see :attr:`scenes`.
        instructions: n strings.
        frames: videos (T + 1, H, W, 3) uint8 of the first rollouts, as many as were kept.
        seconds: where the time went.
    """

    success: np.ndarray
    valid: np.ndarray
    scores: np.ndarray
    rewards: np.ndarray
    seeds: np.ndarray
    noise_seeds: np.ndarray
    start_ids: tuple[str, ...]
    instructions: tuple[str, ...]
    frames: tuple[np.ndarray, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rollouts n."""
        return len(self.success)

    @property
    def scenes(self) -> np.ndarray:
        """(n,) int64, equal where rollouts began in the same scene: one snapshot, or without snapshots one seed."""
        return _units(self.start_ids)

    @property
    def success_rate(self) -> float:
        """Successes among the valid rollouts, in [0, 1]; NaN if there is none."""
        count = int(self.valid.sum())
        return int((self.success & self.valid).sum()) / count if count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate, for starts like these; of (0, 1) if no rollout is valid."""
        return self._interval(np.ones(len(self), bool))

    def by_instruction(self) -> dict[str, dict[str, float]]:
        """Returns the figures of each instruction: rollouts, abstained, success_rate, low, high."""
        names = np.array(self.instructions, dtype=object)
        return {name: self._figures(names == name) for name in sorted(set(self.instructions))}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the frames, ready for :func:`prophet_gym.strict_json.to_json`."""
        rows = zip(
            self.seeds.tolist(),
            self.noise_seeds.tolist(),
            self.start_ids,
            self.instructions,
            self.success.tolist(),
            self.valid.tolist(),
            self.scores.tolist(),
            self.rewards.tolist(),
            strict=True,
        )
        names = ("seed", "noise_seed", "start", "instruction", "success", "valid", "score", "reward")
        return {
            **self._figures(np.ones(len(self), bool)),
            "instructions": self.by_instruction(),
            "seconds": dict(self.seconds),
            "rows": [dict(zip(names, row, strict=True)) for row in rows],
        }

    def _figures(self, chosen: np.ndarray) -> dict[str, float]:
        valid = chosen & self.valid
        count = int(valid.sum())
        low, high = self._interval(chosen)
        rate = int(self.success[valid].sum()) / count if count else math.nan
        rollouts = int(chosen.sum())
        return {"rollouts": rollouts, "abstained": rollouts - count, "success_rate": rate, "low": low, "high": high}

    def _interval(self, chosen: np.ndarray) -> tuple[float, float]:
        rows = np.flatnonzero(chosen & self.valid)
        return clustered_interval(self.success[rows], self.scenes[rows])


def clustered_interval(success: np.ndarray, scenes: np.ndarray) -> tuple[float, float]:
    """95 % interval of a rate over rollouts of which those from one scene are alike.

    Wilson's, of as many independent rollouts as these are worth: p (1 - p) / (variance of p over scenes), between one
    per scene and all of them (Kish's design effect).

    Args:
        success: (n,) bool.
        scenes: (n,) numbers, equal for rollouts from one scene.
    """
    hits, count = int(success.sum()), len(success)
    _, unit = np.unique(scenes, return_inverse=True)
    units = 1 + int(unit.max(initial=-1))
    if units == count:
        return wilson_interval(hits, count)
    rate = hits / count
    residuals = np.bincount(unit, success - rate)
    variance = float((residuals**2).sum()) * units / max(units - 1, 1) / count**2
    worth = rate * (1 - rate) / variance if variance > 0 else units
    effective = round(min(max(worth, units), count))
    return wilson_interval(round(rate * effective), effective)


@dataclass(frozen=True)
class Comparison:
    """What changed from one policy to another, on starts that both were judged on.

    Attributes:
        before: success rate of the first policy, in [0, 1].
        after: success rate of the second policy.
        difference: after minus before, in percentage points.
        low: lower end of its paired 95 % interval.
        high: upper end.
        gained: scenes from which the second policy succeeds more often.
        lost: scenes from which it succeeds less often.
        p_value: exact McNemar test that a scene is as likely to be gained as lost, two-sided.
        starts: scenes that entered; those of several starts or noise seeds count once.
        dropped: rollouts left out because a judge abstained on one of the two.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float
    starts: int
    dropped: int

    def to_dict(self) -> dict[str, float]:
        """Returns the fields."""
        return asdict(self)


def evaluate_starts(n: int, seed: int) -> list[Start]:
    """Returns n starts whose seeds no training range reaches; sets of different ``seed`` share none.

    Where an environment has few scenes (a packaged set of snapshots, the 50 initial states of a LIBERO task), other
    seeds lead to scenes that training has seen.

    Raises:
        ValueError: n outside 1 to 100,000, or a negative seed.
    """
    if not 1 <= n <= SEEDS_PER_SET or seed < 0:
        raise ValueError(f"n is {n} and seed {seed}; expected n from 1 to {SEEDS_PER_SET} and a seed of at least 0")
    first = FIRST_SEED + seed * SEEDS_PER_SET
    return [Start(first + i) for i in range(n)]


def evaluate_policy(
    policy: FlowPolicy,
    env: VectorEnv,
    starts: Sequence[Start],
    *,
    noise_seed: int = 0,
    num_noise_seeds: int = 1,
    mode: SampleMode = "ode",
    keep_frames: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Plays every start once per noise seed and keeps what the judge or the simulator said.

    Args:
        policy: whose success is measured.
        env: any environment that :func:`prophrl_agents.rollout.collect_groups` takes.
        starts: initial states, each of them once.
        noise_seed: of the policy's noise.
        num_noise_seeds: repetitions with noise seeds ``noise_seed``, ``noise_seed + 1``, ...
        mode: "ode", as deployed, or "sde", as in learning.
        keep_frames: starts, from the first on, of which videos are kept, with the first noise seed; rounded up to the
            environment's slots, since the others run without rendering what no one sees.
        progress: show a bar with the remaining time.

    Raises:
        ValueError: the same start twice, a noise seed below 0, ``num_noise_seeds`` below 1, or what ``collect_groups``
            refuses.
    """
    ids = [_start_id(start) for start in starts]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"{len(ids) - len(set(ids))} of {len(ids)} starts repeat another one; expected each start once: with equal "
            "noise they give equal rollouts. Give num_noise_seeds to repeat starts"
        )
    if num_noise_seeds < 1:
        raise ValueError(f"num_noise_seeds is {num_noise_seeds}, expected at least 1")
    if noise_seed < 0:
        raise ValueError(f"noise_seed is {noise_seed}, expected at least 0")
    noise_seeds = range(noise_seed, noise_seed + num_noise_seeds)
    filmed = min(-(-keep_frames // env.num_envs) * env.num_envs, len(starts))
    batches = [
        collect_groups(env, policy, part, 1, noise_seed=noise, mode=mode, keep_frames=film, progress=progress)
        for noise in noise_seeds
        for part, film in _filmed_first(starts, filmed if noise == noise_seed else 0)
    ]
    columns = {
        name: np.concatenate([getattr(batch, name).numpy() for batch in batches])
        for name in ("success", "valid", "scores", "rewards")
    }
    return Evaluation(
        success=columns["success"],
        valid=columns["valid"],
        scores=columns["scores"].astype(np.float64),
        rewards=columns["rewards"].astype(np.float64),
        seeds=np.tile(np.array([start.seed for start in starts], np.int64), num_noise_seeds),
        noise_seeds=np.repeat(np.array(noise_seeds, np.int64), len(starts)),
        start_ids=tuple(ids * num_noise_seeds),
        instructions=sum((batch.instructions for batch in batches), ()),
        frames=batches[0].frames,
        seconds={stage: sum(batch.seconds[stage] for batch in batches) for stage in batches[0].seconds},
    )


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Compares two policies on the same starts and noise seeds, in one environment.

    The interval is Wald's on the paired differences after half a count is added to each of the four outcomes (Agresti
    and Min, 2005): close to 95 % coverage at small n too, and not of width 0 when no scene changed. Outcomes of one
    scene, under several seeds of start or noise, are averaged first, so that scenes are the unit.

    Raises:
        ValueError: other starts or noise seeds, or no start that was judged for both.
    """
    both = _judged_twice(before, after)
    _, unit = np.unique(before.scenes[both], return_inverse=True)
    old, new = (np.bincount(unit, one.success[both]) / np.bincount(unit) for one in (before, after))
    changes, n = new - old, len(old)
    centre = float(changes.sum()) / (n + 2)
    half = Z_95 * math.sqrt((float((changes**2).sum() + 1) / (n + 2) - centre**2) / (n + 2))
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    return Comparison(
        before=float(old.mean()),
        after=float(new.mean()),
        difference=100 * float(changes.mean()),
        low=100 * max(centre - half, -1.0),
        high=100 * min(centre + half, 1.0),
        gained=gained,
        lost=lost,
        p_value=_sign_test(gained, lost),
        starts=n,
        dropped=len(before) - len(both),
    )


def agreement(world: Evaluation, simulator: Evaluation, *, bootstrap: int = 1000) -> dict[str, Any]:
    """Compares what a world model's judge said with the simulator's truth, from the same starts and noise.

    The policy acts anew in each, so a disagreement may be the judge's or the imagination's doing.

    Args:
        world: evaluation in the world model.
        simulator: evaluation of the same policy in the simulator.
        bootstrap: resamplings behind the AUC interval.

    Returns:
        :func:`prophet_gym.judges.calibration.calibration_report`, whose intervals take rollouts as independent, and
        "agree": the share of equal outcomes as ``{"value", "low", "high"}``, with scenes as the unit.

    Raises:
        ValueError: other starts or noise seeds, or none that was judged in both.
    """
    both = _judged_twice(world, simulator)
    rows = np.flatnonzero(simulator.valid)
    scores = np.where(np.isnan(world.scores), world.success, world.scores)
    verdicts = [
        Verdict(bool(world.success[row]), float(scores[row])) if world.valid[row] else Verdict.abstain("not judged")
        for row in rows
    ]
    report = calibration_report(verdicts, simulator.success[rows], bootstrap=bootstrap)
    equal = world.success[both] == simulator.success[both]
    low, high = clustered_interval(equal, world.scenes[both])
    return {"agree": {"value": float(equal.mean()), "low": low, "high": high}, **report}


def _filmed_first(starts: Sequence[Start], count: int) -> list[tuple[Sequence[Start], bool]]:
    parts = [(starts[:count], True), (starts[count:], False)]
    return [(part, film) for part, film in parts if len(part)]


def _units(start_ids: Sequence[str]) -> np.ndarray:
    """Returns a number for each start, equal for equal scenes: what :func:`_start_id` has after the seed."""
    return np.unique([name.rpartition("-")[2] for name in start_ids], return_inverse=True)[1].reshape(-1)


def _judged_twice(first: Evaluation, second: Evaluation) -> np.ndarray:
    """Returns the rows that are valid in both, after requiring that they belong together."""
    if first.start_ids != second.start_ids or not np.array_equal(first.noise_seeds, second.noise_seeds):
        same = len(set(first.start_ids) & set(second.start_ids))
        raise ValueError(
            f"evaluations of {len(first)} and {len(second)} rollouts with {same} starts in common, noise seeds "
            f"{sorted(set(first.noise_seeds.tolist()))} and {sorted(set(second.noise_seeds.tolist()))}; expected the "
            "same starts and noise seeds in the same order: evaluate both with the same arguments"
        )
    both = np.flatnonzero(first.valid & second.valid)
    if not len(both):
        raise ValueError(
            f"none of the {len(first)} rollouts was judged in both evaluations; the judge abstained on "
            f"{(~first.valid).sum()} and {(~second.valid).sum()}. Look at the judge's warnings first"
        )
    return both


def _sign_test(gained: int, lost: int) -> float:
    """Two-sided exact binomial test of equal chances; for single rollouts per start this is McNemar's."""
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def _start_id(start: Start) -> str:
    """Returns a string that two starts share exactly if their seeds and the contents of their snapshots are equal."""
    snapshot = start.snapshot
    if snapshot is None:
        return str(start.seed)
    state = np.zeros(0) if snapshot.simulator_state is None else snapshot.simulator_state
    digest = hashlib.sha256(snapshot.instruction.encode())
    for array in (snapshot.image, snapshot.eef_pose, snapshot.gripper, state):
        digest.update(repr(array.shape).encode() + array.tobytes())
    return f"{start.seed}-{digest.hexdigest()[:16]}"
