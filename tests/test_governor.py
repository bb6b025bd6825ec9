"""The governor: replays what was rewarded, measures the judge, and reacts by rule before the policy is lost."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from reach import Reach, make_reach, make_reach_policy
from small_policy import make_policy

from prophet_gym.judges.base import Verdict
from prophet_gym.judges.calibration import wilson_interval
from prophet_gym.sims.expert import ExpertConfig, ScriptedExpert
from prophet_gym.sims.tabletop import TabletopSim
from prophet_gym.sims.vector import make_sync_vector_env
from prophrl_agents import SmallFlowPolicy
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.config import SMOKE, TrainConfig, WorldConfig
from prophrl_agents.evaluate import evaluate_policy, evaluate_starts
from prophrl_agents.governor import Governor, GovernorRules, JudgeReference, SimulatorReference
from prophrl_agents.trainer import GRPOTrainer


def make_batch(success: Sequence[bool], valid: Sequence[bool] | None = None, **changes) -> RolloutBatch:
    """Rollouts of one policy call of two commands; only the verdicts matter."""
    b = len(success)
    values = dict(
        image=torch.zeros(b, 1, 8, 8, 3, dtype=torch.uint8),
        state=torch.zeros(b, 1, 8),
        instructions=("move",) * b,
        actions=torch.zeros(b, 1, 2, 7),
        path=torch.zeros(b, 1, 3, 2, 7),
        log_prob=torch.zeros(b, 1, 2, 2, 7),
        std=torch.ones(2),
        mask=torch.ones(b, 1, 2, dtype=torch.bool),
        rewards=torch.tensor(success).float(),
        success=torch.tensor(success),
        valid=torch.tensor([True] * b if valid is None else valid),
        scores=torch.zeros(b),
        starts=tuple(Start(i) for i in range(b // 2)),
        group_size=2,
    )
    return RolloutBatch(**{**values, **changes})


class Known:
    """A reference that was told the truth about every rollout."""

    def __init__(self, truth: Sequence[bool | None]) -> None:
        self.truth = truth

    def outcomes(self, batch: RolloutBatch, rollouts: Sequence[int]) -> list[bool | None]:
        return [self.truth[b] for b in rollouts]


def test_report_counts_what_judge_and_reference_both_said() -> None:
    judged = [True, True, True, False, False, False, True, False]
    truth = [True, False, True, True, False, False, None, False]
    valid = [True] * 7 + [False]
    report = Governor(Known(truth)).check(make_batch(judged, valid), 3)
    assert (report.update, report.count) == (3, 6)
    assert (report.judged_success, report.true_success, report.gap) == (0.5, 0.5, 0.0)
    assert report.precision[0] == report.recall[0] == pytest.approx(2 / 3)
    assert report.false_positive_rate[0] == pytest.approx(1 / 3)
    assert report.precision[1] < 2 / 3 < report.precision[2]
    assert report.action == "continue" and report.best


def test_warnings_name_the_number() -> None:
    low_precision = Governor(Known([True, False, False, False])).check(make_batch([True, True, True, False]), 0)
    assert low_precision.action == "warn" and "0.33" in low_precision.reason
    rules = GovernorRules(min_precision=0.1, max_gap=0.4)
    gap = Governor(Known([True, False, False, False]), rules).check(make_batch([True, True, True, False]), 0)
    assert gap.action == "warn" and "0.50" in gap.reason
    nothing = Governor(Known([None] * 4)).check(make_batch([True] * 4), 0)
    assert nothing.action == "warn" and nothing.precision is None and not nothing.best


@pytest.mark.parametrize("reaction", ["stop", "rollback", "warn"])
def test_reacts_when_true_success_stays_below_its_best(reaction: str) -> None:
    governor = Governor(Known([]), GovernorRules(min_precision=0.0, max_gap=1.0, reaction=reaction))
    actions = []
    for hits in (4, 8, 6, 8, 5, 4, 8):  # of ten; the drop must last for two checks
        governor.reference = Known([True] * hits + [False] * (10 - hits))
        actions.append(governor.check(make_batch([True] * 10), len(actions)).action)
    assert actions == ["continue"] * 5 + [reaction, "continue"]
    assert "0.45" in governor.reports[5].reason and "0.80" in governor.reports[5].reason
    assert [report.best for report in governor.reports] == [True, True, False, True, False, False, True]
    again = Governor(Known([]), governor.rules)
    again.load_state_dict(governor.state_dict())
    assert again.reports == governor.reports


def test_weights_that_a_rollback_threw_away_do_not_count_against_those_it_brought_back() -> None:
    governor = Governor(Known([]), GovernorRules(min_precision=0.0, max_gap=1.0, reaction="rollback"))
    actions = []
    for hits in (8, 2, 2, 7, 7, 2, 7):
        governor.reference = Known([True] * hits + [False] * (10 - hits))
        actions.append(governor.check(make_batch([True] * 10), len(actions)).action)
    assert actions == ["continue", "continue", "rollback", "continue", "continue", "rollback", "continue"]


def test_a_few_outcomes_are_no_best_and_no_fall() -> None:
    governor = Governor(Known([True] + [None] * 9), GovernorRules(patience=1, min_precision=0.0, max_gap=1.0))
    lucky = governor.check(make_batch([True] * 10), 0)
    assert lucky.true_success == 1.0 and not lucky.best and lucky.action == "warn"
    assert "only 1 of 10 rollouts could be compared" in lucky.reason
    governor.reference = Known([True] * 6 + [False] * 4)
    honest = governor.check(make_batch([True] * 10), 1)
    assert honest.best and honest.action == "continue"


def test_members_of_a_group_are_no_independent_rollouts() -> None:
    truth = np.repeat([True, False, True, False], 8).tolist()
    batch = make_batch([True] * 32, starts=tuple(Start(i) for i in range(4)), group_size=8)
    rate, low, high = Governor(Known(truth)).check(batch, 0).precision
    assert rate == 0.5 and (low, high) == wilson_interval(2, 4)


class Late(Reach):
    """Judges at its horizon alone, as simulators do whose success may be lost again."""

    def step(self, chunk: np.ndarray) -> tuple:
        *values, info = super().step(chunk)
        return *values, {**info, "verdict": Verdict(info["is_success"], 1.0) if values[3] or values[2] else None}


def replayed(env: gym.vector.VectorEnv, calls: int) -> list[bool | None]:
    """What a reference says of commands that stay, and of commands that reach the target on the left or the right."""
    actions = torch.zeros(3, calls, 2, 2)
    actions[1, ..., 0], actions[2, ..., 0] = -1, 1
    batch = make_batch(
        [True] * 3, actions=actions, path=torch.zeros(3, calls, 3, 2, 2), log_prob=torch.zeros(3, calls, 2, 2, 2),
        image=torch.zeros(3, calls, 8, 8, 3, dtype=torch.uint8), state=torch.zeros(3, calls, 4),
        mask=torch.ones(3, calls, 2, dtype=torch.bool), starts=(Start(1),) * 3, group_size=1,
    )  # fmt: skip
    return SimulatorReference(env, same_seeds=True).outcomes(batch, range(3))


def test_simulators_of_others_are_replayed_too() -> None:
    """Gymnasium's own vector environment refuses to step past an end; and success nobody asked about is no failure."""
    plain = gym.vector.SyncVectorEnv([Reach] * 3, autoreset_mode=AutoresetMode.DISABLED)
    said = replayed(plain, 2)
    assert said[0] is False and sorted(said[1:]) == [False, True]
    held = make_sync_vector_env(lambda: Late(calls=4), 3, AutoresetMode.DISABLED)
    assert replayed(held, 4) == said
    assert [outcome for outcome in replayed(held, 3) if outcome is not True] == [None, None]


@pytest.mark.render
def test_simulator_replays_the_same_commands_from_the_same_snapshots() -> None:
    """The expert succeeds, a hand that only rises does not: whatever the number of slots."""
    sim = TabletopSim()
    snapshots = []
    for seed in range(3):
        sim.reset(seed=seed)
        snapshots.append(sim.snapshot())
    solved = []
    actions = torch.zeros(6, 5, 8, 7)
    for b in range(6):
        sim.reset(state=snapshots[b // 2].simulator_state)
        expert = ScriptedExpert(ExpertConfig(), seed=b)
        commands = []
        for _ in range(40):
            command = expert.act(sim) if b % 2 == 0 else np.array([0, 0, 0.01, 0, 0, 0, 1.0])
            commands.append(command)
            sim.step(command)
        solved.append(sim.is_success())
        actions[b] = torch.from_numpy(np.array(commands, np.float32).reshape(5, 8, 7))
    assert solved == [True, False] * 3
    batch = make_batch(
        solved,
        image=torch.zeros(6, 5, 8, 8, 3, dtype=torch.uint8),
        state=torch.zeros(6, 5, 8),
        actions=actions,
        path=torch.zeros(6, 5, 3, 8, 7),
        log_prob=torch.zeros(6, 5, 2, 8, 7),
        mask=torch.ones(6, 5, 8, dtype=torch.bool),
        starts=tuple(Start(i, snapshot) for i, snapshot in enumerate(snapshots)),
    )
    for slots in (4, 6):
        env = gym.make_vec("Tabletop-v0", num_envs=slots, chunk_length=8, autoreset_mode="Disabled")
        assert SimulatorReference(env).outcomes(batch, range(6)) == solved
        assert SimulatorReference(env).outcomes(batch, [4, 1]) == [True, False]
        env.close()
    with pytest.raises(ValueError, match="no snapshot"):
        SimulatorReference(env).outcomes(make_batch(solved), range(6))


def test_second_judge_may_abstain_and_needs_frames() -> None:
    def brightness(frames: np.ndarray, instruction: str) -> Verdict:
        mean = frames.mean()
        return Verdict.abstain("grey") if 100 < mean < 150 else Verdict(bool(mean > 150), mean / 255)

    videos = tuple(np.full((3, 8, 8, 3), level, np.uint8) for level in (0, 120, 255, 200))
    batch = make_batch([False, True, True, False], frames=videos)
    assert JudgeReference(brightness).outcomes(batch, range(4)) == [False, None, True, True]
    report = Governor(JudgeReference(brightness)).check(batch, 0)
    assert report.count == 3 and report.recall[0] == 0.5
    with pytest.raises(ValueError, match="keep_frames=True"):
        JudgeReference(brightness).outcomes(make_batch([True, False]), range(2))


class Exploitable(Reach):
    """The judge takes a high position for success, whatever the target."""

    def step(self, chunk: np.ndarray) -> tuple:
        observation, _, terminated, truncated, info = super().step(chunk)
        judged = bool(info["is_success"] or self.position[1] > 0.35)
        return observation, float(judged), terminated, truncated, {**info, "is_success": judged}


def reinforce(run: Path, policy: SmallFlowPolicy, env: gym.vector.VectorEnv, updates: int, governor=None):
    """A run of the trainer on the point that has to reach a target."""
    config = TrainConfig(
        run=run, updates=updates, rollouts_per_update=128, group_size=8, mini_batch=64, epochs=2, learning_rate=2e-3,
        eval_every=0, videos_every=0, log_grad_every=0,
    )  # fmt: skip
    return GRPOTrainer(config, policy, env, env, governor).train()


def test_exploitable_judge_ruins_a_policy_and_the_governor_notices(tmp_path: Path) -> None:
    """Fig. 14: judged success goes up while true success goes down; with a rule, the best policy is kept."""
    policy = make_reach_policy()
    truth = make_reach(64)
    reinforce(tmp_path / "honest", policy, truth, 16)
    rewarded = make_sync_vector_env(Exploitable, 64, AutoresetMode.DISABLED)
    ruined, kept = copy.deepcopy(policy), copy.deepcopy(policy)
    watch = GovernorRules(every=3, rollouts=64, min_precision=0.0, max_gap=1.0, max_drop=0.15, reaction="warn")
    watcher = Governor(SimulatorReference(truth, same_seeds=True), watch)
    reinforce(tmp_path / "watched", ruined, rewarded, 19, watcher)
    first, last = watcher.reports[0], watcher.reports[-1]
    assert first.true_success > 0.5
    assert last.judged_success > first.judged_success + 0.05 and last.true_success < first.true_success - 0.3
    assert last.precision[0] < 0.5 and any(report.action == "warn" for report in watcher.reports)

    keeper = Governor(SimulatorReference(truth, same_seeds=True), replace(watch, reaction="stop"))
    result = reinforce(tmp_path / "governed", kept, rewarded, 19, keeper)
    assert result.updates < 19 and "true success" in result.stopped
    starts = evaluate_starts(128, 5)
    best = evaluate_policy(SmallFlowPolicy.from_pretrained(tmp_path / "governed" / "best"), truth, starts)
    assert best.success_rate > evaluate_policy(ruined, truth, starts).success_rate + 0.3


@pytest.mark.parametrize("bad", [{"every": 0}, {"min_precision": 1.5}, {"patience": 0}, {"reaction": "panic"}])
def test_bad_rules(bad: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        GovernorRules(**bad)


@pytest.mark.render
def test_run_in_the_world_model_is_governed_by_the_simulator(tmp_path: Path) -> None:
    """From the settings alone: groups start from the world's own snapshots, so that the simulator can replay them."""
    make_policy().save_pretrained(tmp_path / "policy")
    config = replace(
        SMOKE, policy=tmp_path / "policy", run=tmp_path / "run", updates=1, rollouts_per_update=8, eval_every=0,
        world=WorldConfig(num_envs=4, horizon=16), governor_env="Tabletop-v0",
        governor=GovernorRules(every=1, rollouts=6),
    )  # fmt: skip
    trainer = GRPOTrainer(config)
    trainer.train()
    report = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["governor"]
    assert report["count"] == 6 and report["update"] == 0
    assert all(start.snapshot.simulator_state is not None for starts in trainer.starts(0) for start in starts)
