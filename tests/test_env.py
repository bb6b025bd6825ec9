"""One imagined world: rollouts, judging, bad input, saved states and forks."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prophet_gym import ACTION_SPECS, ProphetEnv, ProphetWorldModel, Snapshot, SnapshotSet, Verdict

HORIZON, CHUNK = 16, 8


@pytest.fixture(scope="module")
def world_model(tiny_checkpoint: Path) -> ProphetWorldModel:
    return ProphetWorldModel.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def snapshots(tiny_checkpoint: Path) -> SnapshotSet:
    return SnapshotSet.load(tiny_checkpoint / "snapshots")


@pytest.fixture
def env(world_model: ProphetWorldModel, snapshots: SnapshotSet) -> ProphetEnv:
    return make(world_model, snapshots)


def make(world_model: ProphetWorldModel, snapshots: SnapshotSet | None, **options: Any) -> ProphetEnv:
    defaults = {"horizon": HORIZON, "chunk_length": CHUNK, "judge": lambda frames, instruction: True}
    return ProphetEnv(world_model, snapshots=snapshots, **{**defaults, **options})


def chunk(env: ProphetEnv, seed: int = 0, length: int = CHUNK) -> np.ndarray:
    low, high = env.action_space.low[0], env.action_space.high[0]
    return np.random.default_rng(seed).uniform(low, high, (length, 7)).astype(np.float32).clip(low, high)


def test_state_is_the_commanded_pose(env: ProphetEnv, snapshots: SnapshotSet) -> None:
    observation, _ = env.reset(options={"snapshot": snapshots[0]})
    np.testing.assert_array_equal(observation["image"], snapshots[0].image)
    np.testing.assert_allclose(observation["state"][:3], snapshots[0].eef_pose[0, :3, 3], rtol=1e-6)
    assert observation["state"][6] == 1.0 and observation["state"][7] == 0.0
    action = np.zeros((2, 7), np.float32)
    action[:, 0], action[:, 6] = 0.01, 0.25
    observation, *_ = env.step(action)
    expected = snapshots[0].eef_pose[0, :3, 3] + [0.02, 0, 0]
    np.testing.assert_allclose(observation["state"][:3], expected, atol=1e-6)
    assert observation["state"][6] == 0.25


def test_tiny_checkpoint_follows_history_actions_and_noise(
    world_model: ProphetWorldModel, snapshots: SnapshotSet, env: ProphetEnv
) -> None:
    """What the tests with a tolerance of one grey level rest on: mixing up slots moves pixels by more than ten."""
    actions = np.stack([chunk(env, seed) for seed in range(3)])
    canonical = world_model.action_spec.to_canonical(actions)
    fresh = world_model.begin(snapshots[:3], [1, 2, 3])
    _, later = world_model.predict(fresh, canonical)
    for state in (fresh, later):
        frames, _ = world_model.predict(state, canonical)
        assert np.isin(frames, (0, 255)).mean() < 0.1
        for changed, commands in (
            (replace(state, history=state.history.roll(1, dims=0)), canonical),
            (state, canonical[:, ::-1]),
            (state, np.roll(canonical, 1, axis=0)),
            (replace(state, seeds=state.seeds.roll(1)), canonical),
        ):
            other, _ = world_model.predict(changed, commands)
            assert np.abs(other.astype(int) - frames).max(axis=(1, 2, 3, 4)).min() > 10


def test_frames_follow_the_actions(env: ProphetEnv) -> None:
    env.reset(seed=0)
    one = env.step(chunk(env, 1))[4]["frames"]
    env.reset(seed=0)
    other = env.step(chunk(env, 2))[4]["frames"]
    assert np.abs(one.astype(int) - other).max() > 10


def test_judge_is_asked_once_with_the_whole_rollout(world_model: ProphetWorldModel, snapshots: SnapshotSet) -> None:
    asked = []

    def judge(frames: np.ndarray, instruction: str) -> Verdict:
        asked.append((frames, instruction))
        return Verdict(True, 0.9)

    env = make(world_model, snapshots, judge=judge)
    start, info = env.reset(seed=3)
    returned = [start["image"][None]]
    for step in range(HORIZON // CHUNK):
        assert not asked
        _, reward, terminated, truncated, info = env.step(chunk(env, step))
        returned.append(info["frames"])
    ((frames, instruction),) = asked
    np.testing.assert_array_equal(frames, np.concatenate(returned))
    assert instruction == info["instruction"]
    assert (reward, terminated, truncated) == (1.0, True, True)
    assert info["is_success"] and info["verdict"] == Verdict(True, 0.9)


def test_judge_every_chunk_ends_at_success(world_model: ProphetWorldModel, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots, judge=lambda frames, _: len(frames) > 9, judge_every_chunk=True, horizon=40)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(chunk(env))
    assert (reward, terminated, truncated) == (0.0, False, False) and info["verdict"].success is False
    _, reward, terminated, truncated, info = env.step(chunk(env))
    assert (reward, terminated, truncated) == (1.0, True, False) and info["is_success"]


def failing(frames: np.ndarray, instruction: str) -> bool:
    raise TimeoutError("no answer")


@pytest.mark.parametrize(
    "judge, reason",
    [
        (failing, "TimeoutError: no answer"),
        (lambda frames, _: Verdict.abstain("too dark"), "too dark"),
        (lambda frames, _: "yes", "answered 'yes'"),
        (None, "no judge"),
    ],
)
def test_judge_that_cannot_tell_is_no_failure(
    world_model: ProphetWorldModel,
    snapshots: SnapshotSet,
    judge: Any,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "prophet_gym")
    env = make(world_model, snapshots, judge=judge, horizon=CHUNK)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(chunk(env))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["judge_valid"] is False and info["is_success"] is False
    assert reason in info["verdict"].reason
    assert judge is None or reason == "too dark" or "abstains" in caplog.text


@pytest.mark.parametrize("length", range(1, 21))
def test_every_chunk_length(env: ProphetEnv, length: int) -> None:
    env.reset(seed=0)
    observation, *_, info = env.step(chunk(env, length=length))
    assert info["frames"].shape == (length, 48, 48, 3)
    np.testing.assert_array_equal(info["frames"][-1], observation["image"])


def bad_actions(good: np.ndarray) -> dict[str, tuple[np.ndarray, str]]:
    nan, outside = good.copy(), good.copy()
    nan[1, 2], outside[0, 0] = np.nan, 1.0
    return {
        "one command": (good[0], r"shape \(7,\); expected \(C, 7\) with 1 <= C <= 20"),
        "eight numbers": (np.zeros((8, 8)), r"shape \(8, 8\); expected \(C, 7\)"),
        "NaN": (nan, r"action\[1, 2\] is nan; expected finite"),
        "out of bounds": (outside, r"action\[0, 0\] is 1; expected -0.04 to 0.04"),
        "too long": (np.tile(good, (3, 1)), "24 commands; expected at most 20"),
        "words": (np.array([["up"] * 7]), "dtype"),
    }


@pytest.mark.parametrize("case", ["one command", "eight numbers", "NaN", "out of bounds", "too long", "words"])
def test_bad_action_names_what_came_and_changes_nothing(env: ProphetEnv, case: str) -> None:
    env.reset(seed=0)
    expected = env.step(chunk(env))[4]["frames"]
    env.reset(seed=0)
    action, message = bad_actions(chunk(env))[case]
    with pytest.raises(ValueError, match=message):
        env.step(action)
    np.testing.assert_array_equal(env.step(chunk(env))[4]["frames"], expected)


def test_out_of_turn_calls(env: ProphetEnv) -> None:
    for call in (lambda: env.step(chunk(env)), env.get_state, lambda: env.fork(2)):
        with pytest.raises(ValueError, match="not started: call reset"):
            call()
    env.reset(seed=0)
    for _ in range(HORIZON // CHUNK):
        env.step(chunk(env))
    with pytest.raises(ValueError, match="after the rollout ended: call reset"):
        env.step(chunk(env))


def test_bad_reset_and_arguments(world_model: ProphetWorldModel, snapshots: SnapshotSet, env: ProphetEnv) -> None:
    large = Snapshot(np.zeros((64, 64, 3), np.uint8), "go", np.eye(4)[None], np.ones(1))
    blind = Snapshot(snapshots[0].image, "go", np.eye(4)[None], np.ones(1))
    for options, message in (
        ({"snapshots": snapshots[0]}, "Unknown reset option 'snapshots'.*Did you mean 'snapshot'"),
        ({"snapshot": snapshots[0].image}, "expected a prophet_gym.Snapshot, got ndarray"),
        ({"snapshot": large}, "64x64 pixels.*48x48"),
        ({"snapshot": blind}, "no camera"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    with pytest.raises(ValueError, match="no snapshots to start from"):
        make(world_model, None).reset()
    for options, message in (
        ({"chunk_length": 21}, "chunk_length=21: expected an integer from 1 to 20"),
        ({"horizon": 0}, "horizon=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"judge": "good"}, "must be callable"),
    ):
        with pytest.raises(ValueError, match=message):
            make(world_model, snapshots, **options)


def test_a_failed_reset_leaves_the_rollout(env: ProphetEnv, snapshots: SnapshotSet) -> None:
    env.reset(seed=0)
    expected = env.step(chunk(env))[4]["frames"]
    env.reset(seed=0)
    with pytest.raises(ValueError, match="got ndarray"):
        env.reset(seed=5, options={"snapshot": snapshots[0].image})
    np.testing.assert_array_equal(env.step(chunk(env))[4]["frames"], expected)


def test_snapshot_option_leaves_the_noise(env: ProphetEnv, snapshots: SnapshotSet) -> None:
    _, info = env.reset(seed=5)
    drawn = next(s for s in snapshots if s.instruction == info["instruction"])
    expected = env.step(chunk(env))[4]["frames"]
    env.reset(seed=5, options={"snapshot": drawn})
    np.testing.assert_array_equal(env.step(chunk(env))[4]["frames"], expected)


def test_render(world_model: ProphetWorldModel, snapshots: SnapshotSet, env: ProphetEnv) -> None:
    env.reset(seed=0)
    assert env.render() is None
    env = make(world_model, snapshots, render_mode="rgb_array")
    env.reset(seed=0)
    observation, *_ = env.step(chunk(env))
    np.testing.assert_array_equal(env.render(), observation["image"])
    assert env.metadata["render_fps"] == ACTION_SPECS["tabletop"].control_hz


def test_state_restores_the_bytes_in_another_process(env: ProphetEnv, tiny_checkpoint: Path, tmp_path: Path) -> None:
    env.reset(seed=1)
    env.step(chunk(env, 1, length=3))  # leaves a group of history frames half full
    torch.save(env.get_state(), tmp_path / "state.pt")
    np.save(tmp_path / "action.npy", chunk(env, 2))
    expected = env.step(chunk(env, 2))
    following, _ = env.reset()
    script = f"""
import numpy as np, torch
import gymnasium as gym
env = gym.make("prophet_gym:Prophet-Tabletop-v0", checkpoint={str(tiny_checkpoint)!r}, horizon={HORIZON})
env.unwrapped.set_state(torch.load("state.pt", weights_only=True))
step = env.unwrapped.step(np.load("action.npy"))
np.savez("result.npz", frames=step[4]["frames"], state=step[0]["state"], next=env.reset()[0]["image"])
"""
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{script}"]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    restored = np.load(tmp_path / "result.npz")
    np.testing.assert_array_equal(restored["frames"], expected[4]["frames"])
    np.testing.assert_array_equal(restored["state"], expected[0]["state"])
    np.testing.assert_array_equal(restored["next"], following["image"])


def test_state_keeps_judge_buffer_and_counters(world_model: ProphetWorldModel, snapshots: SnapshotSet) -> None:
    lengths: list[int] = []
    env = make(world_model, snapshots, judge=lambda frames, _: bool(lengths.append(len(frames))))
    env.reset(seed=0)
    env.step(chunk(env))
    state = env.get_state()
    env.step(chunk(env))
    state_after = env.get_state()
    env.reset(seed=9)
    env.set_state(state)
    *_, info = env.step(chunk(env))
    assert lengths == [1 + HORIZON, 1 + HORIZON] and info["env_step"] == 2
    env.set_state(state_after)
    assert env.get_state()["slots"][0]["verdict"]["success"] is False
    with pytest.raises(ValueError, match="rollout ended"):
        env.step(chunk(env))


def test_foreign_states_are_refused(env: ProphetEnv, world_model: ProphetWorldModel) -> None:
    """Before the first reset as after it, and the rollout goes on as if nothing had been tried."""
    env.reset(seed=0)
    good, two_slots = env.get_state(), env.fork(2).get_state()
    tensors, slot = good["world_model"], good["slots"][0]
    history = tensors["history"]

    def other(**changed: Any) -> dict[str, Any]:
        return {**good, "world_model": {**tensors, **changed}}

    def malformed(**changed: Any) -> dict[str, Any]:
        return {**good, "slots": [{**slot, **changed}]}

    lacking = {key: value for key, value in slot.items() if key != "verdict"}
    cases = (
        ("state", "got 'str'"),
        ({"version": 0}, "got 0"),
        ({"version": 1}, "dict 'world_model' and a list 'slots'.*NoneType"),
        (two_slots, "2 slots, but 1"),
        ({**good, "world_model": two_slots["world_model"]}, r"frames is torch.uint8 \(2, 48, 48, 3\), expected"),
        ({**good, "world_model": {"frames": tensors["frames"]}}, "its fields are .'frames'., expected"),
        (other(frames=torch.zeros(1, 64, 64, 3, dtype=torch.uint8)), r"\(1, 64, 64, 3\), expected .*48, 48, 3"),
        (other(history=history[:, :3]), r"history is torch.float32 \(1, 3, 2, 6, 6\), expected .*1, 4, 2, 6, 6"),
        (other(history=history[:, :, 1:]), r"history is .*1, 4, 1, 6, 6.*, expected"),
        (other(history=history.bfloat16()), "history is torch.bfloat16 .*, expected torch.float32 .* and dtype"),
        (other(poses=tensors["poses"].repeat(1, 2, 1, 1)), r"poses is torch.float64 \(1, 2, 4, 4\), expected"),
        (other(seeds=[0]), "seeds is list, expected torch.int64"),
        ({**good, "slots": ["slot"]}, "Slot 0 of the state is malformed: it is str"),
        ({**good, "slots": [lacking]}, "Slot 0 .*expected a dict with the keys .*'verdict'"),
        (malformed(env_step="1"), "env_step is '1'; expected int"),
        (malformed(frames=slot["frames"].repeat(2, 1, 1, 1)), r"frames is torch.uint8 \(2, 48, 48, 3\); expected"),
        (malformed(frames=slot["frames"].float()), "frames is torch.float32"),
        (malformed(rng='{"bit_generator": "MT19937"}'), "rng or verdict is not what was saved"),
        (malformed(verdict={"success": True}), "rng or verdict is not what was saved.*KeyError"),
    )
    unstarted = make(world_model, None)
    expected = env.step(chunk(env))[4]["frames"]
    env.set_state(good)
    for state, message in cases:
        for world in (env, unstarted):
            with pytest.raises(ValueError, match=message):
                world.set_state(state)
        assert env.get_state()["slots"][0]["rng"] == slot["rng"]
    with pytest.raises(ValueError, match="not started"):
        unstarted.get_state()
    unstarted.set_state(good)
    for world in (env, unstarted):
        np.testing.assert_array_equal(world.step(chunk(env))[4]["frames"], expected)


def test_fork_shares_noise_unless_seeded(env: ProphetEnv) -> None:
    env.reset(seed=0)
    env.step(chunk(env, 1))
    actions = np.stack([chunk(env, 2)] * 3)
    alike, seeded = env.fork(3), env.fork(3, seeds=[1, 2, 1])
    frames = alike.step(actions)[4]["frames"]
    np.testing.assert_allclose(frames[1:].astype(int), np.stack([frames[0]] * 2), atol=1)
    frames = seeded.step(actions)[4]["frames"].astype(int)
    np.testing.assert_allclose(frames[2], frames[0], atol=1)
    assert np.abs(frames[1] - frames[0]).max() > 10
    lone = env.step(actions[0])[4]["frames"]  # neither fork touched the origin
    np.testing.assert_allclose(alike.slots[0].frames[-1].astype(int), lone, atol=1)
    for n, seeds, message in ((0, None, "n=0"), (2, [1], "expected one entry for each of the 2 slots, got 1")):
        with pytest.raises(ValueError, match=message):
            env.fork(n, seeds=seeds)
