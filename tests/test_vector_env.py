"""The batched engine: independence of slots, autoreset modes, one model and one judge call a step, partial states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from prophet_gym import Judge, ProphetEnv, ProphetVectorEnv, ProphetWorldModel, SnapshotSet, Verdict

HORIZON, CHUNK = 16, 8


class Counting(ProphetWorldModel):
    """The real model; remembers the batch sizes it was asked for."""

    batches: list[int]

    def predict(self, state: Any, actions: Any, num_inference_steps: int | None = None) -> Any:
        self.batches.append(state.batch_size)
        return super().predict(state, actions, num_inference_steps)


@pytest.fixture(scope="module")
def world_model(tiny_checkpoint: Path) -> Counting:
    model = Counting.from_pretrained(tiny_checkpoint)
    model.batches = []
    return model


@pytest.fixture(scope="module")
def snapshots(tiny_checkpoint: Path) -> SnapshotSet:
    return SnapshotSet.load(tiny_checkpoint / "snapshots")


def brighter(frames: np.ndarray, instruction: str) -> bool:
    """Says yes to some rollouts; unlike a parity, one grey level of rounding in a batch does not turn it."""
    return bool(frames[-1].mean() > frames[0].mean())


def make(world_model: ProphetWorldModel, snapshots: SnapshotSet, num_envs: int = 3, **options: Any) -> ProphetVectorEnv:
    defaults = {"horizon": HORIZON, "chunk_length": CHUNK, "judge": brighter}
    return ProphetVectorEnv(world_model, num_envs, snapshots=snapshots, **{**defaults, **options})


def chunks(env: ProphetVectorEnv, seed: int = 0, length: int = CHUNK) -> np.ndarray:
    low, high = env.single_action_space.low[0], env.single_action_space.high[0]
    drawn = np.random.default_rng(seed).uniform(low, high, (env.num_envs, length, 7))
    return drawn.astype(np.float32).clip(low, high)


def close(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(left.astype(int), right.astype(int), atol=1)


def test_slot_equals_the_lone_env(world_model: Counting, snapshots: SnapshotSet) -> None:
    batch = make(world_model, snapshots, autoreset_mode="SameStep")
    lone = ProphetEnv(world_model, snapshots=snapshots, horizon=HORIZON, chunk_length=CHUNK, judge=brighter)
    start, start_info = batch.reset(seed=[4, 5, 6])
    actions = [chunks(batch, step) for step in range(HORIZON // CHUNK + 1)]
    results = [batch.step(action) for action in actions]
    for i, seed in enumerate([4, 5, 6]):
        own, own_info = lone.reset(seed=seed)
        np.testing.assert_array_equal(start["image"][i], own["image"])
        assert own_info["instruction"] == start_info["instruction"][i]
        for step, action in enumerate(actions):
            own, _, terminated, truncated, own_info = lone.step(action[i])
            observation, _, _, _, info = results[step]
            if terminated or truncated:
                assert info["final_info"]["is_success"][i] == own_info["is_success"]
                close(info["final_obs"][i]["image"], own["image"])
                own, following = lone.reset()
                assert info["instruction"][i] == following["instruction"]
            else:
                close(info["frames"][i], own_info["frames"])
            close(observation["image"][i], own["image"])
            np.testing.assert_allclose(observation["state"][i], own["state"], atol=1e-6)


def test_seeds(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots)
    first = env.reset(seed=7)[1]["instruction"]
    assert (env.reset(seed=[7, 8, 9])[1]["instruction"] == first).all()
    with pytest.raises(ValueError, match="seed: expected one entry for each of the 3 slots, got 2 entries"):
        env.reset(seed=[1, 2])


def test_reset_from_snapshots(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots)
    observation, info = env.reset(seed=0, options={"snapshots": [snapshots[2], snapshots[2], snapshots[0]]})
    expected = [snapshots[i].image for i in (2, 2, 0)]
    np.testing.assert_array_equal(observation["image"], expected)
    assert info["instruction"][2] == snapshots[0].instruction and info["_instruction"].all()
    for options, message in (
        ({"snapshots": [snapshots[0]]}, "expected one entry for each of the 3 slots, got 1 entries"),
        ({"snapshots": snapshots[0]}, "got Snapshot"),
        ({"snapshots": [None, None, 3]}, "Slot 2: expected a prophet_gym.Snapshot, got int"),
        ({"snapshot": snapshots[0]}, "Did you mean 'snapshots'"),
        ({"reset_mask": [1, 0, 0]}, "bool array of shape \\(3,\\)"),
        ({"reset_mask": np.zeros(3, bool)}, "at least one True"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)


def test_next_step_autoreset(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots, autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    env.step(chunks(env))
    *_, truncated, info = env.step(chunks(env))
    assert truncated.all() and info["_frames"].all()
    world_model.batches.clear()
    ignored = np.full((3, CHUNK, 7), np.nan)
    observation, reward, terminated, truncated, info = env.step(ignored)
    assert not (reward.any() or terminated.any() or truncated.any())
    assert world_model.batches == [] and "frames" not in info and (info["env_step"] == 0).all()
    for i in range(3):
        np.testing.assert_array_equal(observation["image"][i], env.slots[i].frames[0][0])


def test_same_step_autoreset(world_model: Counting, snapshots: SnapshotSet) -> None:
    always = make(world_model, snapshots, autoreset_mode="SameStep", judge=lambda frames, _: True)
    always.reset(seed=0)
    always.step(chunks(always))
    observation, reward, terminated, truncated, info = always.step(chunks(always))
    assert terminated.all() and truncated.all() and (reward == 1).all()
    assert info["final_info"]["is_success"].all() and not info["is_success"].any()
    assert (info["final_info"]["env_step"] == 2).all() and (info["env_step"] == 0).all()
    for i in range(3):
        last = info["final_obs"][i]["image"]
        np.testing.assert_array_equal(last, info["final_info"]["frames"][i, -1])
        assert (last != observation["image"][i]).any()
    assert "frames" not in info


def test_disabled_autoreset_holds_finished_slots_for_free(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(
        world_model,
        snapshots,
        autoreset_mode="Disabled",
        judge_every_chunk=True,
        judge=lambda frames, instruction: instruction == snapshots[1].instruction,
        horizon=24,
    )
    env.reset(seed=0, options={"snapshots": [snapshots[0], snapshots[1], snapshots[2]]})
    observation, reward, terminated, *_ = env.step(chunks(env))
    assert terminated.tolist() == [False, True, False] and reward.tolist() == [0, 1, 0]
    held = observation["image"][1]
    world_model.batches.clear()
    actions = chunks(env, 1)
    actions[1] = np.nan  # nobody looks at the action of a held slot
    observation, reward, terminated, truncated, info = env.step(actions)
    assert world_model.batches == [2]
    np.testing.assert_array_equal(observation["image"][1], held)
    assert reward.tolist() == [0, 0, 0] and terminated[1]
    assert info["_frames"].tolist() == info["_is_success"].tolist() == [True, False, True]
    assert not info["frames"][1].any()
    _, info = env.reset(seed=3, options={"reset_mask": np.array([False, True, False])})
    assert info["_env_step"].tolist() == [False, True, False] and info["env_step"].tolist() == [2, 0, 2]
    *_, truncated, info = env.step(chunks(env, 2))
    assert truncated.tolist() == [True, False, True] and info["env_step"].tolist() == [3, 1, 3]
    for step in range(2):
        *_, truncated, info = env.step(chunks(env, step))
    assert truncated.all()
    with pytest.raises(ValueError, match="after the rollout ended: call reset"):
        env.step(chunks(env))


def test_one_model_call_and_one_judge_call_per_step(world_model: Counting, snapshots: SnapshotSet) -> None:
    class Batched:
        calls: list[int] = []

        def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
            raise AssertionError("one by one")

        def judge_batch(self, frames: Any, instructions: Any) -> list[Verdict]:
            self.calls.append(len(frames))
            return [Verdict(True, 1.0) for _ in frames]

    env = make(world_model, snapshots, num_envs=4, judge=Batched(), autoreset_mode="Disabled")
    env.reset(seed=0)
    world_model.batches.clear()
    env.step(chunks(env))
    env.step(chunks(env))
    assert world_model.batches == [4, 4] and Batched.calls == [4]


def test_a_judge_failing_on_one_rollout_spares_the_others(
    world_model: Counting, snapshots: SnapshotSet, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(frames: np.ndarray, instruction: str) -> bool:
        if instruction == snapshots[1].instruction:
            raise RuntimeError("cannot read")
        return True

    env = make(world_model, snapshots, judge=judge, horizon=CHUNK)
    env.reset(options={"snapshots": [snapshots[0], snapshots[1], snapshots[2]]})
    _, reward, *_, info = env.step(chunks(env))
    assert reward.tolist() == [1, 0, 1] and info["judge_valid"].tolist() == [True, False, True]
    assert "RuntimeError: cannot read" in info["verdict"][1].reason
    env.reset(options={"snapshots": [snapshots[1]] * 3})
    assert not env.step(chunks(env))[4]["judge_valid"].any()
    assert caplog.text.count("RuntimeError: cannot read") == 1  # identical failures are logged once


def test_a_batch_that_fails_is_said_once(
    world_model: Counting, snapshots: SnapshotSet, caplog: pytest.LogCaptureFixture
) -> None:
    class OneAtATime(Judge):
        def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
            if len(frames) > 1:
                raise MemoryError(f"no room for {id(frames)}")
            return [Verdict(True, 1.0)]

    env = make(world_model, snapshots, judge=OneAtATime(), horizon=CHUNK)
    for seed in range(2):
        env.reset(seed=seed)
        assert env.step(chunks(env))[4]["judge_valid"].all()
    assert caplog.text.count("judge_batch fails on 3 rollouts, not on each alone: no room") == 1


def test_bad_actions(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots)
    with pytest.raises(ValueError, match="not started"):
        env.step(chunks(env))
    with pytest.raises(ValueError, match="not started"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(8, 7\); expected \(3, C, 7\)"):
        env.step(chunks(env)[0])
    with pytest.raises(ValueError, match=r"action\[2, 0, 0\] is 9"):
        env.step(np.where(np.arange(3)[:, None, None] == 2, np.float32(9), chunks(env)))
    with pytest.raises(ValueError, match="autoreset_mode='NextStop'.*Did you mean 'NextStep'"):
        make(world_model, snapshots, autoreset_mode="NextStop")
    with pytest.raises(ValueError, match="num_envs=0"):
        make(world_model, snapshots, num_envs=0)


def test_autoreset_needs_snapshots(world_model: Counting, snapshots: SnapshotSet) -> None:
    """Said when the environment is made, not when the first slot ends."""
    for mode in ("NextStep", "SameStep"):
        with pytest.raises(ValueError, match=f"autoreset_mode='{mode}' without snapshots.*'Disabled'"):
            ProphetVectorEnv(world_model, 2, horizon=CHUNK, autoreset_mode=mode)
    env = ProphetVectorEnv(world_model, 2, horizon=CHUNK, chunk_length=CHUNK, autoreset_mode="Disabled", judge=brighter)
    with pytest.raises(ValueError, match="no snapshots to start from"):
        env.reset(seed=0)
    env.reset(seed=0, options={"snapshots": snapshots[:2]})
    *_, truncated, _ = env.step(chunks(env))
    assert truncated.all()
    with pytest.raises(ValueError, match="autoreset_mode='NextStep' without snapshots"):
        env.fork(2, autoreset_mode="NextStep")
    _, info = env.reset(options={"reset_mask": np.array([True, False]), "snapshots": [snapshots[3], None]})
    assert info["instruction"][0] == snapshots[3].instruction


def test_finished_slots_reach_neither_model_nor_judge(world_model: Counting, snapshots: SnapshotSet) -> None:
    """Slot i ends after i + 1 chunks: the model runs on 4, 3, 2, 1 slots, then a reset runs on its own again."""

    class Staggered:
        calls: list[int] = []

        def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
            raise AssertionError("one by one")

        def judge_batch(self, frames: Any, instructions: Any) -> list[Verdict]:
            self.calls.append(len(frames))
            limits = {snapshot.instruction: 1 + (i + 1) * CHUNK for i, snapshot in enumerate(snapshots)}
            done = [len(rollout) >= limits[goal] for rollout, goal in zip(frames, instructions, strict=True)]
            return [Verdict(success, float(success)) for success in done]

    env = make(
        world_model, snapshots, 4, autoreset_mode="Disabled", judge=Staggered(), judge_every_chunk=True, horizon=80
    )
    env.reset(seed=0, options={"snapshots": list(snapshots)})
    world_model.batches.clear()
    for step in range(4):
        _, reward, terminated, *_ = env.step(chunks(env, step))
        assert terminated.tolist() == [i <= step for i in range(4)] and reward.sum() == reward[step] == 1
    assert world_model.batches == Staggered.calls == [4, 3, 2, 1]
    lone = ProphetEnv(world_model, snapshots=snapshots, horizon=80, chunk_length=CHUNK, judge=lambda *_: False)
    for i, slot in enumerate(env.slots):  # each went on from its own rollout while the batch shrank
        lone.reset(seed=i, options={"snapshot": snapshots[i]})
        expected = [lone.step(chunks(env, step)[i])[4]["frames"] for step in range(i + 1)]
        close(slot.rollout()[1:], np.concatenate(expected))
    world_model.batches.clear()
    with pytest.raises(ValueError, match="after the rollout ended"):
        env.step(chunks(env))
    env.reset(options={"reset_mask": np.array([False, False, True, False])})
    env.step(chunks(env))
    assert world_model.batches == [1] and Staggered.calls == [4, 3, 2, 1, 1]


def test_a_refused_state_changes_no_slot(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots, horizon=80)
    env.reset(seed=0)
    env.step(chunks(env))
    saved = env.get_state()
    expected = env.step(chunks(env, 1))
    env.set_state(saved)
    other = env.fork(1)
    other.step(chunks(env, 2))
    foreign = other.get_state()
    foreign["slots"][2] = {**foreign["slots"][2], "num_commands": "16"}
    mask = np.array([True, False, True])
    for state, chosen, message in (
        (foreign, None, "Slot 2 of the state is malformed: num_commands is '16'; expected int"),
        (saved, mask, "3 slots, but 2"),
        ({**saved, "slots": saved["slots"][:2]}, mask, r"frames is torch.uint8 \(3, 48, 48, 3\), expected .*\(2, 48"),
    ):
        with pytest.raises(ValueError, match=message):
            env.set_state(state, chosen)
    with pytest.raises(ValueError, match="not started"):
        make(world_model, snapshots).set_state(other.get_state(mask), mask)
    np.testing.assert_array_equal(env.step(chunks(env, 1))[4]["frames"], expected[4]["frames"])


def test_partial_state(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots, horizon=80)
    env.reset(seed=0)
    env.step(chunks(env))
    mask = np.array([False, True, False])
    saved, everything = env.get_state(mask), env.get_state()
    expected = env.step(chunks(env, 1))
    env.step(chunks(env, 2))
    env.set_state(saved, mask)
    _, _, _, _, info = env.step(chunks(env, 1))
    close(info["frames"][1], expected[4]["frames"][1])
    assert info["env_step"].tolist() == [4, 2, 4]
    observation = env.set_state(everything)
    again = env.step(chunks(env, 1))
    np.testing.assert_array_equal(again[4]["frames"], expected[4]["frames"])
    assert (observation["image"] != again[0]["image"]).any()


def test_fork_repeats_slots_in_order(world_model: Counting, snapshots: SnapshotSet) -> None:
    env = make(world_model, snapshots, num_envs=2, autoreset_mode="Disabled", render_mode="rgb_array")
    env.reset(options={"snapshots": [snapshots[0], snapshots[1]]})
    members = env.fork(3)
    assert members.num_envs == 6 and members.autoreset_mode is AutoresetMode.DISABLED
    images = members.render()
    assert images is not None
    for i in range(6):
        np.testing.assert_array_equal(images[i], snapshots[i // 3].image)
    frames = members.step(np.repeat(chunks(env), 3, axis=0))[4]["frames"]
    assert env.slots[0].env_step == 0 and len(env.slots[0].frames) == 1
    close(frames, np.repeat(env.step(chunks(env))[4]["frames"], 3, axis=0))
    assert env.fork(1, autoreset_mode="NextStep").autoreset_mode is AutoresetMode.NEXT_STEP


def test_mixed_ages_share_a_batch(world_model: Counting, snapshots: SnapshotSet) -> None:
    """Slots with other chunk boundaries behind them run side by side and still equal lone environments."""
    env = make(world_model, snapshots, horizon=80, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(chunks(env, 0, length=3))
    env.reset(seed=10, options={"reset_mask": np.array([True, False, False])})
    env.step(chunks(env, 1, length=6))
    _, _, _, _, info = env.step(chunks(env, 2))
    lone = ProphetEnv(world_model, snapshots=snapshots, horizon=80, chunk_length=CHUNK, judge=brighter)
    for i, seed in enumerate([10, 1, 2]):
        lone.reset(seed=seed)
        if i > 0:
            lone.step(chunks(env, 0, length=3)[i])
        lone.step(chunks(env, 1, length=6)[i])
        close(lone.step(chunks(env, 2)[i])[4]["frames"], info["frames"][i])
