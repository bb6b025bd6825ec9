"""One command at a time: buffers, saturation, success that ends nothing, conventions that meet."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from prophet_gym import ACTION_SPECS, ProphetVectorEnv, ProphetWorldModel, SnapshotSet
from prophet_gym.actions import integrate_poses
from prophet_gym.compat.commands import convert_commands, poses_from_state
from prophet_gym.compat.simpler import ACTION_SPEC as SIMPLER
from prophet_gym.compat.single_step import SingleStepVectorEnv
from prophet_gym.registration import make_chunk_engine
from prophet_gym.rotations import axis_angle_to_matrix

TABLETOP = ACTION_SPECS["tabletop"]


@pytest.fixture(scope="module")
def world_model(tiny_checkpoint: Path) -> ProphetWorldModel:
    return ProphetWorldModel.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def snapshots(tiny_checkpoint: Path) -> SnapshotSet:
    return SnapshotSet.load(tiny_checkpoint / "snapshots")


def commands(count: int, num_envs: int = 1, seed: int = 0) -> np.ndarray:
    """(count, num_envs, 7) Tabletop commands."""
    low, high = np.asarray(TABLETOP.low, np.float32), np.asarray(TABLETOP.high, np.float32)
    draw = np.random.default_rng(seed).uniform(low, high, (count, num_envs, 7)).astype(np.float32)
    return draw.clip(low, high)


@pytest.fixture
def make(world_model: ProphetWorldModel, snapshots: SnapshotSet) -> Any:
    def make(num_envs: int = 1, action_buffer: str = "chunk", **options: Any) -> SingleStepVectorEnv:
        defaults = {"horizon": 12, "chunk_length": 4, "judge": lambda f, i: False, "judge_every_chunk": True}
        defaults |= {"autoreset_mode": AutoresetMode.DISABLED}
        engine = ProphetVectorEnv(world_model, num_envs, snapshots=snapshots, **{**defaults, **options})
        return SingleStepVectorEnv(engine, action_buffer=action_buffer)

    return make


def test_chunk_buffer_is_the_native_chunk(make: Any) -> None:
    env = make(2)
    native = make(2).engine
    first, _ = env.reset(seed=3)
    native.reset(seed=3)
    sequence = commands(8, 2)
    for start in (0, 4):
        expected, *_, known = native.step(sequence[start : start + 4].swapaxes(0, 1))
        for offset in range(3):
            seen, *_, info = env.step(sequence[start + offset])
            np.testing.assert_array_equal(seen["image"], first["image"])
            np.testing.assert_array_equal(seen["state"], first["state"])
            assert info["stale"].all() and "frames" not in info and info["instruction"][0]
            seen["image"].fill(0)  # a caller may write into what it was given
        first, *_, info = env.step(sequence[start + 3])
        assert not info["stale"].any() and (info["elapsed_steps"] == start + 4).all()
        np.testing.assert_allclose(info["frames"].astype(int), known["frames"], atol=1)
        np.testing.assert_array_equal(first["image"], info["frames"][:, -1])
        np.testing.assert_allclose(first["state"], expected["state"], atol=1e-6)


def test_immediate_predicts_every_command(make: Any) -> None:
    env = make(action_buffer="immediate")
    native = make(chunk_length=1).engine
    env.reset(seed=0)
    native.reset(seed=0)
    for command in commands(3):
        seen, *_, info = env.step(command)
        expected, *_ = native.step(command[:, None])
        assert not info["stale"].any() and info["frames"].shape[1] == 1
        np.testing.assert_allclose(seen["image"].astype(int), expected["image"], atol=1)


def test_the_horizon_cuts_the_last_chunk_short(make: Any) -> None:
    env = make(horizon=6)
    env.reset(seed=0)
    for step, command in enumerate(commands(6), 1):
        *_, truncated, info = env.step(command)
        assert bool(truncated[0]) == (step == 6) and bool(info["stale"][0]) == (step not in (4, 6))
    assert info["frames"].shape[1] == 2
    with pytest.raises(ValueError, match="after the horizon of 6 commands. Call reset"):
        env.step(command)
    env.reset(seed=0)
    env.step(command)


@pytest.mark.parametrize("action_buffer", ["immediate", "chunk"])
def test_success_ends_nothing_and_may_be_lost(make: Any, action_buffer: str) -> None:
    env = make(2, action_buffer, chunk_length=2, horizon=8, judge=lambda frames, _: len(frames) in (5, 6))
    env.reset(seed=0)
    seen = [env.step(command) for command in commands(8, 2)]
    late = 1 if action_buffer == "chunk" else 0  # a stale step repeats the verdict on the last real frame
    expected = [4 <= step <= 5 for step in range(1, 9)]
    assert [bool(step[2].all()) for step in seen] == expected
    assert [step[1].tolist() for step in seen] == [[float(success)] * 2 for success in expected]
    assert [bool(step[3].any()) for step in seen] == [False] * 7 + [True]
    assert bool(seen[4][4]["stale"].all()) == bool(late)
    frames = [step[4]["frames"] for step in seen if "frames" in step[4]]
    assert sum(part.shape[1] for part in frames) == 8 and np.diff([part.mean() for part in frames]).all()


@pytest.mark.render
def test_success_ends_nothing_in_the_simulator() -> None:
    engine = make_chunk_engine("Tabletop-v0", horizon=4, chunk_length=2)
    env = SingleStepVectorEnv(engine, action_buffer="immediate")
    env.reset(seed=0)
    engine.envs[0].unwrapped.sim.is_success = lambda: engine.envs[0].unwrapped.sim.num_steps < 3
    hold = np.zeros((1, 7), np.float32)
    flags = [(bool(t[0]), bool(end[0])) for _, _, t, end, _ in (env.step(hold) for _ in range(4))]
    assert flags == [(True, False), (True, False), (False, False), (False, True)]
    with pytest.raises(ValueError, match="after the horizon"):
        env.step(hold)
    env.close()


def test_slots_that_end_restart_in_the_same_step(make: Any) -> None:
    env = make(2, chunk_length=2, horizon=4, autoreset_mode="SameStep")
    start, _ = env.reset(seed=0)
    for step, command in enumerate(commands(6, 2), 1):
        seen, reward, terminated, truncated, info = env.step(command)
        assert truncated.all() == (step == 4) and ("final_info" in info) == (step == 4)
        if step == 4:
            assert info["final_info"]["is_success"].tolist() == [False, False] and not info["elapsed_steps"].any()
    assert info["env_step"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="horizon=5 is no multiple of chunk_length=2"):
        make(2, chunk_length=2, horizon=5, autoreset_mode="SameStep")
    with pytest.raises(ValueError, match="would swallow a chunk"):
        make(autoreset_mode="NextStep")


def test_commands_beyond_the_bounds_are_cut_and_reported(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    env = make(2, "immediate")
    env.reset(seed=0)
    far = commands(1, 2)[0]
    near = far.copy()
    far[1, 0], near[1, 0] = 0.5, TABLETOP.high[0]
    with caplog.at_level(logging.WARNING, logger="prophet_gym.compat.single_step"):
        seen, *_, info = env.step(far)
        env.step(far)
    assert info["clipped"].tolist() == [False, True] and len(caplog.records) == 1
    env.reset(seed=0)
    expected, *_, info = env.step(near)
    assert not info["clipped"].any()
    np.testing.assert_array_equal(seen["image"], expected["image"])


def test_bad_input_is_refused_and_changes_nothing(make: Any) -> None:
    env = make(2)
    with pytest.raises(ValueError, match="call reset"):
        env.step(np.zeros((2, 7)))
    env.reset(seed=0)
    for bad, message in (
        (np.zeros(7), r"shape \(7,\); expected \(2, 7\)"),
        (np.full((2, 7), np.nan), "joint angles"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(bad)
    *_, info = env.step(np.zeros((2, 7)))
    assert info["elapsed_steps"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="start together"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="Did you mean 'chunk'"):
        make(action_buffer="chunks")


def test_two_arms_are_refused(make: Any) -> None:
    engine = make().engine
    with pytest.raises(ValueError, match="expected 1"):
        SingleStepVectorEnv(engine, action_spec=ACTION_SPECS["agibot"])


@pytest.mark.parametrize("target", ["tabletop", "bridge", "libero", "droid", "local"])
def test_converted_commands_make_the_same_motion(target: str) -> None:
    rng = np.random.default_rng(1)
    spec = ACTION_SPECS.get(target) or replace(ACTION_SPECS["bridge"], delta="local")
    poses = np.tile(np.eye(4), (5, 1, 1, 1))
    poses[:, 0, :3, 3] = rng.uniform(-0.05, 0.05, (5, 3)) + [0, 0, 0.1]
    poses[:, 0, :3, :3] = axis_angle_to_matrix(rng.uniform(-0.6, 0.6, (5, 3)))
    asked = rng.uniform(-0.03, 0.03, (5, 7))
    asked[:, 3:6] *= 5
    asked[:, 6] = rng.uniform(-1, 1, 5)
    native, clipped = convert_commands(asked, SIMPLER, spec, poses)
    assert not clipped.any() and native.dtype == np.float32
    reached = integrate_poses(poses, spec.to_canonical(native)[:, None], spec)[:, 0, 0]
    np.testing.assert_allclose(reached[:, :3, 3], poses[:, 0, :3, 3] + asked[:, :3], atol=1e-6)
    turned = axis_angle_to_matrix(asked[:, 3:6]) @ poses[:, 0, :3, :3]
    np.testing.assert_allclose(reached[:, :3, :3], turned, atol=1e-6)
    np.testing.assert_allclose(spec.to_canonical(native)[:, 0, 6], asked[:, 6] / 2 + 0.5, atol=1e-6)


def test_local_commands_turn_with_the_hand_inside_a_buffer(make: Any, snapshots: SnapshotSet) -> None:
    local = replace(TABLETOP, delta="local", workspace=None)
    env = SingleStepVectorEnv(make().engine, action_spec=local, action_buffer="chunk")
    env.reset(options={"snapshots": [snapshots[0]]})
    sequence = np.tile([0.01, 0.0, 0.0, 0.0, 0.0, 0.25, 1.0], (4, 1))
    for command in sequence:
        seen, *_, info = env.step(command[None])
    assert not info["stale"].any()
    start = np.asarray(snapshots[0].eef_pose, np.float64)
    along_first = start.reshape(4, 4)[:3, 0] * 0.01 * 4 + start.reshape(4, 4)[:3, 3]
    expected = integrate_poses(start.reshape(1, 1, 4, 4), local.to_canonical(sequence[None]), local)[0, -1, 0]
    assert np.linalg.norm(expected[:3, 3] - along_first) > 0.01  # the hand's own x has turned
    np.testing.assert_allclose(poses_from_state(seen["state"])[0, 0], expected, atol=1e-5)


def test_poses_are_read_from_the_state(make: Any, snapshots: SnapshotSet) -> None:
    env = make()
    observation, _ = env.reset(options={"snapshots": [snapshots[2]]})
    np.testing.assert_allclose(poses_from_state(observation["state"])[0], snapshots[2].eef_pose, atol=1e-6)
    (camera,) = env.cameras()
    np.testing.assert_array_equal(camera.K, snapshots[2].camera.K)
    np.testing.assert_array_equal(camera.E, snapshots[2].camera.E)
