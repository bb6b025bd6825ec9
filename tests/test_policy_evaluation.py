"""Evaluation of policies: intervals that cover, pairs that belong together, the same starts in both worlds, files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro

from prophet_gym import SnapshotSet
from prophet_gym.data.video import read_video
from prophet_gym.registration import ASSETS
from prophet_gym.words import build_vocabulary
from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig
from prophrl_agents.batch import Start
from prophrl_agents.evaluate import Evaluation, agreement, compare, evaluate_policy, evaluate_starts
from prophrl_agents.evaluation_report import (
    GREEN,
    GREY,
    RED,
    EvalConfig,
    run_eval,
    simulator_starts,
    write_grid,
    write_json,
)

LOW, HIGH = np.array([-0.04] * 3 + [-0.25] * 3 + [0.0]), np.array([0.04] * 3 + [0.25] * 3 + [1.0])


def make_policy(seed: int = 0) -> SmallFlowPolicy:
    snapshots = SnapshotSet.load(ASSETS / "tabletop" / "snapshots")
    words = build_vocabulary([snapshot.instruction for snapshot in snapshots])
    torch.manual_seed(seed)
    config = SmallFlowPolicyConfig(words, trunk_width=8, feature_dim=32, head_width=32, head_blocks=2)
    statistics = PolicyStatistics((LOW + HIGH) / 2, (HIGH - LOW) / 8, LOW, HIGH, np.zeros(8), np.ones(8))
    policy = SmallFlowPolicy(config, statistics)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return policy


def evaluation(success: Any, valid: Any = None, repeats: int = 1, **changes: Any) -> Evaluation:
    """Outcomes (repeats * starts,), one noise seed after the other."""
    success = np.asarray(success, bool)
    n = len(success)
    columns = {
        "valid": np.ones(n, bool) if valid is None else np.asarray(valid, bool),
        "scores": success.astype(float),
        "rewards": success.astype(float),
        "seeds": np.tile(np.arange(n // repeats), repeats),
        "noise_seeds": np.repeat(np.arange(repeats), n // repeats),
        "start_ids": tuple(str(i % (n // repeats)) for i in range(n)),
        "instructions": ("push the red block",) * n,
    }
    return Evaluation(success=success, **{**columns, **changes})


def outcomes(gained: int, lost: int, both: int, neither: int) -> tuple[Evaluation, Evaluation]:
    before = [False] * gained + [True] * lost + [True] * both + [False] * neither
    after = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return evaluation(before), evaluation(after)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (45, 100, 0.3561, 0.5476)]
)
def test_the_interval_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    one = evaluation([True] * hits + [False] * (count - hits))
    assert one.success_rate == hits / count
    assert one.interval == pytest.approx((low, high), abs=5e-5)


def test_abstentions_count_in_no_rate() -> None:
    one = evaluation([True, False, False, False], valid=[True, True, False, False], instructions=("a", "a", "a", "b"))
    assert one.success_rate == 0.5
    assert one.interval == evaluation([True, False]).interval
    by_instruction = one.by_instruction()
    assert by_instruction["a"]["rollouts"] == 3 and by_instruction["a"]["abstained"] == 1
    assert math.isnan(by_instruction["b"]["success_rate"])
    assert (by_instruction["b"]["low"], by_instruction["b"]["high"]) == (0, 1)


def test_repeating_a_start_says_less_than_another_start() -> None:
    """95 % intervals of the mean over starts cover it, though rollouts of a start are alike."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(1000):
        chances = rng.beta(0.3, 0.3, 60)  # mean 0.5
        success = (rng.random((4, 60)) < chances).ravel()
        low, high = evaluation(success, repeats=4).interval
        covered += low <= 0.5 <= high
        low, high = evaluation(success).interval  # as if all 240 starts were different
        naive += low <= 0.5 <= high
    assert 920 <= covered <= 980
    assert naive < 850


def test_a_scene_under_another_seed_is_the_same_scene() -> None:
    """Snapshots, or the 50 states of a LIBERO task, come back under seeds that differ."""
    success = [True, True, False, False] * 10
    ids = tuple(f"{i}-{'abcd'[i % 4]}" for i in range(40))
    repeated, other = evaluation(success, start_ids=ids), evaluation([True] * 40, start_ids=ids)
    low, high = repeated.interval
    assert high - low > 2 * np.diff(evaluation(success).interval)[0]
    change = compare(repeated, other)
    assert (change.starts, change.gained, change.lost) == (4, 2, 0) and change.p_value == 0.5


def test_repeats_without_variance_count_as_their_starts() -> None:
    assert evaluation([True] * 30, repeats=3).interval == evaluation([True] * 10).interval


def test_the_paired_interval_is_agrestis_and_mins() -> None:
    result = compare(*outcomes(gained=20, lost=10, both=30, neither=40))
    assert (result.before, result.after, result.starts, result.dropped) == (0.4, 0.5, 100, 0)
    assert result.difference == pytest.approx(10)
    assert (result.low, result.high) == pytest.approx((-0.7244, 20.3323), abs=1e-3)  # worked out by hand
    assert (result.gained, result.lost) == (20, 10)
    assert result.p_value == pytest.approx(0.0987, abs=1e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"), [(10, 2, 0.03857), (2, 10, 0.03857), (0, 0, 1), (3, 3, 1), (6, 0, 0.03125)]
)
def test_mcnemar_is_exact(gained: int, lost: int, p_value: float) -> None:
    assert compare(*outcomes(gained, lost, 5, 5)).p_value == pytest.approx(p_value, abs=1e-5)


def test_no_change_is_no_certainty() -> None:
    result = compare(*outcomes(0, 0, 10, 10))
    assert result.difference == 0 and result.low < -5 and result.high > 5


@pytest.mark.parametrize(("starts", "repeats"), [(40, 1), (200, 1), (40, 4)])
def test_the_paired_interval_covers(starts: int, repeats: int) -> None:
    """Starts differ in difficulty and in how much the second policy gains on them."""
    rng = np.random.default_rng(1)
    covered, trials = 0, 1000
    for _ in range(trials):
        easy = rng.beta(0.5, 0.5, starts)
        helped = rng.random(starts) < 0.3
        chances = np.where(helped, 1.0, easy)  # on average 0.5 -> 0.3 + 0.7 * 0.5: 15 points
        before = evaluation((rng.random((repeats, starts)) < easy).ravel(), repeats=repeats)
        after = evaluation((rng.random((repeats, starts)) < chances).ravel(), repeats=repeats)
        result = compare(before, after)
        covered += result.low <= 15 <= result.high
    assert 0.93 <= covered / trials <= 0.985


def test_a_pair_needs_both_verdicts() -> None:
    before, after = outcomes(gained=2, lost=1, both=1, neither=0)
    before.valid[0] = after.valid[3] = False
    result = compare(before, after)
    assert (result.gained, result.lost, result.starts, result.dropped) == (1, 1, 2, 2)
    after.valid[:] = False
    with pytest.raises(ValueError, match="none of the 4 rollouts was judged in both.*abstained on 1 and 4"):
        compare(before, after)


@pytest.mark.parametrize(
    "changes", [{"start_ids": tuple("1203")}, {"noise_seeds": np.ones(4, int)}, {"start_ids": tuple("abcd")}]
)
def test_only_equal_starts_and_noise_are_compared(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected the same starts and noise seeds in the same order"):
        compare(evaluation([True] * 4), evaluation([True] * 4, **changes))
    with pytest.raises(ValueError, match="4 and 8 rollouts with 4 starts in common"):
        compare(evaluation([True] * 4), evaluation([True] * 8, repeats=2))


def test_agreement_of_world_and_simulator() -> None:
    world = evaluation([True, True, False, False, True], valid=[True, True, True, True, False])
    simulator = evaluation([True, False, True, False, True])
    report = agreement(world, simulator)
    assert report["agree"]["value"] == 0.5
    assert report["precision"]["value"] == report["recall"]["value"] == report["fpr"]["value"] == 0.5
    assert report["abstained"] == 1 and report["n"] == 5


def test_sets_of_starts_are_disjoint() -> None:
    first, second = evaluate_starts(100, 0), evaluate_starts(100, 1)
    assert len({start.seed for start in first + second}) == 200
    assert [start.seed for start in evaluate_starts(50, 0)] == [start.seed for start in first[:50]]
    for n, seed in ((0, 0), (10**6, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"n is {n} and seed {seed}"):
            evaluate_starts(n, seed)


@pytest.mark.render
def test_evaluation_in_the_simulator(tmp_path: Path) -> None:
    env = gym.make_vec(
        "Tabletop-v0",
        num_envs=2,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
        chunk_length=8,
        horizon=8,
    )
    policy, starts = make_policy(), simulator_starts("Tabletop-v0", evaluate_starts(3, 0))
    assert [start.snapshot.simulator_state is not None for start in starts] == [True] * 3  # type: ignore[union-attr]
    one = evaluate_policy(policy, env, starts, noise_seed=5, num_noise_seeds=2, keep_frames=3)
    assert one.seeds.tolist() == [start.seed for start in starts] * 2 and one.noise_seeds.tolist() == [5] * 3 + [6] * 3
    assert len(one.frames) == 3 and one.start_ids[:3] == one.start_ids[3:] and one.valid.all()
    for video, start in zip(one.frames, starts, strict=True):
        assert video.shape == (9, 64, 64, 3)
        np.testing.assert_array_equal(video[0], start.snapshot.image)  # type: ignore[union-attr]
    second = evaluate_policy(policy, env, starts, noise_seed=6, keep_frames=1)
    assert len(second.frames) == 2  # as many as there are slots
    assert (second.frames[0] != one.frames[0]).any()  # the noise is another
    again = evaluate_policy(policy, env, starts, noise_seed=5, keep_frames=1)
    assert again.success.tolist() == one.success[:3].tolist()
    np.testing.assert_array_equal(again.frames[0], one.frames[0])
    assert compare(again, evaluate_policy(make_policy(1), env, starts, noise_seed=5)).starts == 3
    with pytest.raises(ValueError, match="0 starts in common"):
        compare(again, evaluate_policy(policy, env, [Start(start.seed) for start in starts], noise_seed=5))
    with pytest.raises(ValueError, match="1 of 4 starts repeat another one.*num_noise_seeds"):
        evaluate_policy(policy, env, [*starts, starts[0]])
    env.close()
    write_json(one.to_dict(), tmp_path / "one.json")
    stored = json.loads((tmp_path / "one.json").read_text())
    assert stored == json.loads(json.dumps(one.to_dict()))
    assert len(stored["rows"]) == 6 and stored["rows"][4]["noise_seed"] == 6


@pytest.mark.render
def test_the_command_evaluates_two_policies_in_both_worlds(tmp_path: Path) -> None:
    for seed, name in enumerate(("new", "old")):
        make_policy(seed).save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / "new"), "--against", str(tmp_path / "old"), "--n", "3", "--num-envs", "2"]
    config = tyro.cli(EvalConfig, args=[*arguments, "--out", str(tmp_path / "out")])
    table = run_eval(config)
    for line in ("policy   Prophet-Tabletop-v0", "against  Tabletop-v0", "points", "agree", "s per rollout"):
        assert line in table
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    evaluations = report["evaluations"]
    rows = [one["rows"] for places in evaluations.values() for one in places.values()]
    assert len(rows) == 4 and len({tuple(row["start"] for row in one) for one in rows}) == 1
    assert report["comparisons"]["simulator"]["starts"] == 3 and report["agreement"]["policy"]["n"] == 3
    assert report["config"]["simulator"] == "Tabletop-v0"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "against_simulator.mp4",
        "against_world.mp4",
        "evaluation.json",
        "policy_simulator.mp4",
        "policy_world.mp4",
    ]


def test_a_world_without_a_simulator_starts_from_its_own_snapshots(tmp_path: Path) -> None:
    make_policy().save_pretrained(tmp_path / "policy")
    config = tyro.cli(
        EvalConfig, args=[str(tmp_path / "policy"), "--simulator", "None", "--n", "2", "--out", str(tmp_path)]
    )
    table = run_eval(config)
    assert "Prophet-Tabletop-v0" in table and " Tabletop-v0" not in table and "agree" not in table
    for name in ("checkpoint", "judge"):
        with pytest.raises(ValueError, match="nowhere"):
            run_eval(dataclasses.replace(config, **{name: "nowhere"}))
        with pytest.raises(ValueError, match="of the world model, but env is None"):
            dataclasses.replace(config, env=None, simulator="Tabletop-v0", **{name: "nowhere"})
    with pytest.raises(ValueError, match="env and simulator are both None"):
        EvalConfig(tmp_path, env=None, simulator=None)
    with pytest.raises(ValueError, match="neither a folder nor a packaged name"):
        run_eval(EvalConfig(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="noise_seed is -1, expected at least 0"):
        EvalConfig(tmp_path, noise_seed=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulator": "Nope-v0"}, "no environment 'Nope-v0'"),
        ({"env": "Nope-v0"}, "no environment 'Nope-v0'"),
        ({"env": "CartPole-v1", "simulator": None}, "actions of the environment are Discrete.*expected chunks"),
        ({"simulator": "CartPole-v1"}, "has no snapshot"),
        ({"simulator": "CartPole-v1", "horizon": 5}, "'CartPole-v1' does not take the settings {'horizon': 5}"),
        ({"task": "3"}, "Tabletop-v0 has no task"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_evaluations_that_cannot_be_made_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = EvalConfig(Path("tabletop-sft"), n=1, num_envs=1, out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run_eval(dataclasses.replace(config, **changes))


def test_a_policy_with_long_chunks_is_named_with_the_world(tmp_path: Path) -> None:
    policy = make_policy()
    config = dataclasses.replace(policy.config, chunk_length=25)
    SmallFlowPolicy(config, policy.normalizer.statistics()).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="policy's chunks have 25 commands, too many for 'Prophet-Tabletop-v0'"):
        run_eval(EvalConfig(tmp_path / "policy", simulator=None, n=1, out=tmp_path / "out"))


def test_the_grid_frames_outcomes_in_colours(tmp_path: Path) -> None:
    videos = [np.full((length, 64, 64, 3), 90, np.uint8) for length in (3, 5, 5)]
    videos[0][-1] = 200
    success, valid = np.array([True, False, False]), np.array([True, True, False])
    write_grid(videos, tmp_path / "grid.mp4", success=success, valid=valid, columns=2)
    video = read_video(tmp_path / "grid.mp4").astype(int)
    cell = 128 + 2 * 6 + 4
    assert video.shape == (5, 2 * cell + 4, 2 * cell + 4, 3)
    for (row, column), colour in zip(((0, 0), (0, 1), (1, 0)), (GREEN, RED, GREY), strict=True):
        edge = video[:, row * cell + 70, column * cell + 6]
        assert np.abs(edge - np.array(colour)).max() < 40
        inside = video[4, row * cell + 70, column * cell + 70]
        assert np.abs(inside - (200 if colour is GREEN else 90)).max() < 20  # a short video stays at its last frame
    assert (video[:, -40, -40] > 240).all()
    with pytest.raises(ValueError, match="0 videos"):
        write_grid([], tmp_path / "none.mp4", success=success[:0])
    with pytest.raises(ValueError, match="3 videos.*2 outcomes"):
        write_grid(videos, tmp_path / "none.mp4", success=success[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["grid.mp4"]


def test_json_is_strict(tmp_path: Path) -> None:
    unjudged = evaluation([False], valid=[False], scores=np.array([np.nan]))
    write_json(unjudged.to_dict(), tmp_path / "one.json")
    stored = json.loads((tmp_path / "one.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert stored["success_rate"] is None and stored["rows"][0]["score"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
