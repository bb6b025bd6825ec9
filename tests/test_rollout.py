"""Rollouts of groups: one batch whatever the slots and the autoreset mode; masks end with the last command."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_policy import CHUNK, make_policy

from prophet_gym import ProphetVectorEnv, Snapshot
from prophet_gym.arguments import known_options
from prophet_gym.compat.flat import FlatVectorEnv
from prophet_gym.sims.expert import ExpertConfig, ScriptedExpert
from prophet_gym.sims.tabletop_env import TabletopEnv
from prophet_gym.sims.vector import make_sync_vector_env
from prophrl_agents import SmallFlowPolicy
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.rollout import collect_groups, member_generator

HORIZON = 16


class Counting(SmallFlowPolicy):
    """The real policy; remembers the batch sizes it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[int] = []

    def sample(self, obs: Any, generator: Any, mode: Any = "sde") -> Any:
        self.batches.append(len(obs["image"]))
        return super().sample(obs, generator, mode)


class Corridor(gym.Env):
    """A point that two-dimensional commands move for as many commands as the seed says; right of the start is good.

    With talks=False info is empty; shaky: resets do not follow the seed; blind: no image; doubtful: no valid judgement.
    """

    action_space = Box(-1.0, 1.0, (6, 2), np.float32)

    def __init__(self, talks=True, shaky=False, endless=False, blind=False, doubtful=False) -> None:
        self.talks, self.shaky, self.endless, self.doubtful = talks, shaky, endless, doubtful
        parts = {"image": Box(0, 255, (16, 16, 3), np.uint8), "state": Box(-np.inf, np.inf, (8,), np.float32)}
        self.observation_space = Dict({"state": parts["state"]} if blind else parts)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        known_options(options, ())
        self.left = 10**6 if self.endless else int(self.np_random.integers(3, 14))
        self.place = self.np_random.uniform(-1, 1, 2)
        if self.shaky:
            self.place += np.random.default_rng().uniform(0, 1, 2)
        self.start = self.place.copy()
        return self.observe(), {"instruction": "move right"} if self.talks else {}

    def step(self, action: np.ndarray) -> Any:
        executed = min(len(action), self.left)
        frames = []
        for command in action[:executed]:
            self.place = self.place + command
            frames.append(self.observe()["image"])
        self.left -= executed
        right, over = bool(self.place[0] > self.start[0]), self.left == 0
        info: dict[str, Any] = {}
        if self.talks:
            frames += [np.full((16, 16, 3), 255, np.uint8)] * (len(action) - executed)
            info = {"is_success": over and right, "num_executed": executed, "frames": np.stack(frames)}
            info["judge_valid"] = not self.doubtful
        return self.observe(), float(right), over and right, over and not right, info

    def observe(self) -> dict[str, np.ndarray]:
        level = int(100 + 20 * self.place[0]) % 256
        state = np.concatenate([self.place, np.zeros(6)]).astype(np.float32)
        return {"image": np.full((16, 16, 3), level, np.uint8), "state": state}


def corridors(num_envs: int = 4, mode: AutoresetMode = AutoresetMode.DISABLED, **options: Any) -> Any:
    return make_sync_vector_env(lambda: Corridor(**options), num_envs, mode)


def walker(cls: type[SmallFlowPolicy] = SmallFlowPolicy, **sizes: Any) -> Any:
    return make_policy(cls, **{"action_dim": 2, "image_size": 16, "chunk_length": 4, **sizes})


def assert_equal(left: RolloutBatch, right: RolloutBatch, skip: tuple[str, ...] = ("seconds", "starts")) -> None:
    for field in dataclasses.fields(RolloutBatch):
        if field.name in skip:
            continue
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name == "frames":
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one, other)
        elif isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if a.is_floating_point() else 0, equal_nan=True)
        else:
            assert a == b


@pytest.fixture(scope="module")
def policy() -> SmallFlowPolicy:
    return make_policy()


@pytest.fixture(scope="module")
def world() -> ProphetVectorEnv:
    return gym.make_vec(
        "Prophet-Tabletop-v0",
        num_envs=4,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
        horizon=HORIZON,
        chunk_length=CHUNK,
    ).unwrapped


@pytest.fixture(scope="module")
def starts(world: ProphetVectorEnv) -> list[Start]:
    return [Start(seed, world.snapshots[seed]) for seed in range(3)]


@pytest.fixture(scope="module")
def solved() -> Snapshot:
    """A moment of the simulator in which the instruction is fulfilled and the hand has left."""
    env = TabletopEnv()
    env.reset(seed=1)
    expert = ScriptedExpert(ExpertConfig())
    for _ in range(40):
        env.sim.step(expert.act(env.sim))
    assert env.sim.is_success()
    snapshot = env.sim.snapshot("solved")
    env.close()
    return snapshot


def worlds(world: ProphetVectorEnv, num_envs: int, **options: Any) -> ProphetVectorEnv:
    """As many slots of the same world model as needed."""
    defaults = {"judge": world.judge, "snapshots": world.snapshots, "autoreset_mode": "Disabled"}
    return ProphetVectorEnv(world.world_model, num_envs, horizon=HORIZON, chunk_length=CHUNK, **{**defaults, **options})


def test_groups_in_the_world_model(world: ProphetVectorEnv, policy: SmallFlowPolicy, starts: list[Start]) -> None:
    batch = collect_groups(world, policy, starts, 2, noise_seed=0, keep_frames=True)
    k = policy.num_flow_steps
    assert batch.path.shape == (6, 2, k + 1, CHUNK, 7) and batch.log_prob.shape == (6, 2, k, CHUNK, 7)
    assert batch.mask.all() and batch.valid.all() and batch.group_size == 2 and batch.starts == tuple(starts)
    assert batch.scores.isfinite().all() and not batch.scores.isnan().any() and (batch.std > 0).all()
    space = world.single_action_space
    assert (batch.actions >= torch.tensor(space.low[0])).all() and (batch.actions <= torch.tensor(space.high[0])).all()
    for b in range(6):
        snapshot = starts[b // 2].snapshot
        assert snapshot is not None and batch.instructions[b] == snapshot.instruction
        assert batch.frames[b].shape == (1 + HORIZON, 64, 64, 3)
        np.testing.assert_array_equal(batch.frames[b][0], snapshot.image)
        np.testing.assert_array_equal(batch.image[b, 0], snapshot.image)
        np.testing.assert_array_equal(batch.image[b, 1], batch.frames[b][CHUNK])
    assert (batch.actions[0] != batch.actions[1]).any()  # members draw noise of their own
    assert batch.seconds["total"] >= batch.seconds["policy"] + batch.seconds["env"] > 0


def test_a_member_does_not_depend_on_the_slots(
    world: ProphetVectorEnv, policy: SmallFlowPolicy, starts: list[Start]
) -> None:
    batches = [collect_groups(worlds(world, n), policy, starts, 2, noise_seed=0, keep_frames=True) for n in (2, 4, 8)]
    for other in batches[1:]:
        for name in ("actions", "path"):
            first, same = getattr(batches[0], name), getattr(other, name)
            torch.testing.assert_close(first[:, 0], same[:, 0], rtol=0, atol=1e-5)
            # What differs is one grey level of rounding in the world's frames, which the policy sees.
            torch.testing.assert_close(first[:, 1], same[:, 1], rtol=0, atol=0.02)
        for one, two in zip(batches[0].frames, other.frames, strict=True):
            assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
        torch.testing.assert_close(batches[0].scores, other.scores, rtol=0, atol=0.01)
    again = collect_groups(worlds(world, 2), policy, starts[::-1], 2, noise_seed=0)
    torch.testing.assert_close(again.actions[4:6, 0], batches[0].actions[:2, 0], rtol=0, atol=1e-5)
    other_noise = collect_groups(worlds(world, 2), policy, starts[:1], 2, noise_seed=1)
    assert (other_noise.actions[:, 0] - batches[0].actions[:2, 0]).abs().max() > 1e-3


def test_generators_of_members_differ() -> None:
    draws = {float(torch.randn(1, generator=member_generator(*key))) for key in itertools.product(range(3), repeat=3)}
    assert len(draws) == 27


def test_ratio_is_one_before_the_first_update(
    world: ProphetVectorEnv, policy: SmallFlowPolicy, starts: list[Start]
) -> None:
    batch = collect_groups(world, policy, starts[:2], 2, noise_seed=0)
    for s in range(2):  # the calls as they were made: four running slots
        rollouts, calls = torch.arange(4), torch.full((4,), s)
        log_prob = policy.log_prob(batch.observations(rollouts, calls), batch.path[rollouts, calls])
        assert torch.equal(log_prob, batch.log_prob[rollouts, calls])
    rollouts, calls = torch.tensor([3, 0, 1]), torch.tensor([1, 0, 1])
    log_prob = policy.log_prob(batch.observations(rollouts, calls), batch.path[rollouts, calls])
    ratio = (log_prob - batch.log_prob[rollouts, calls]).sum(dim=1).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-3)
    log_prob.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in policy.parameters())
    policy.zero_grad()
    (batch.path * torch.ones((), requires_grad=True)).sum().backward()  # nothing stored is an inference tensor


def test_a_judge_that_fails_leaves_an_invalid_rollout(
    world: ProphetVectorEnv, policy: SmallFlowPolicy, starts: list[Start]
) -> None:
    broken = starts[1].snapshot.instruction  # type: ignore[union-attr]

    def judge(frames: np.ndarray, instruction: str) -> bool:
        if instruction == broken:
            raise RuntimeError("no answer")
        return True

    assert starts[0].snapshot.instruction != broken  # type: ignore[union-attr]
    batch = collect_groups(worlds(world, 4, judge=judge), policy, starts[:2], 2, noise_seed=0)
    assert batch.valid.tolist() == [True, True, False, False] == batch.success.tolist()
    assert batch.rewards.tolist() == [1, 1, 0, 0]
    assert batch.scores[:2].tolist() == [1, 1] and batch.scores[2:].isnan().all()


@pytest.mark.render
def test_autoreset_modes_give_the_same_batch(solved: Snapshot) -> None:
    """One group succeeds after its first chunk, the other goes on to the horizon."""
    policy = make_policy(Counting)
    batches = {}
    for mode in ("Disabled", "NextStep", "SameStep"):
        env = gym.make_vec(
            "Tabletop-v0",
            num_envs=3,
            vectorization_mode="vector_entry_point",
            autoreset_mode=mode,
            chunk_length=CHUNK,
            horizon=HORIZON,
        )
        policy.batches.clear()
        batches[mode] = collect_groups(env, policy, [Start(0, solved), Start(1)], 2, noise_seed=0, keep_frames=True)
        assert policy.batches == [3, 1, 1, 1]  # ended rollouts and spare slots are not asked about
        env.close()
    batch = batches["Disabled"]
    assert batch.success.tolist() == [True, True, False, False] and batch.rewards.tolist() == [1, 1, 0, 0]
    assert batch.called.tolist() == [[True, False], [True, False], [True, True], [True, True]]
    assert [len(video) for video in batch.frames] == [1 + CHUNK] * 2 + [1 + HORIZON] * 2
    assert not batch.path[:2, 1].any() and not batch.image[:2, 1].any()
    assert batch.scores.tolist() == [1, 1, 0, 0]
    for mode in ("NextStep", "SameStep"):
        assert_equal(batch, batches[mode])


def test_any_vector_env_in_any_mode() -> None:
    """Episodes of 3 to 13 commands; Gymnasium's own environments too, whose ended slots must be reset."""
    policy, starts = walker(Counting), [Start(seed) for seed in range(5)]
    reference = None
    for make in (corridors, gymnasiums_own):
        for mode in (AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            batch = collect_groups(make(3, mode), policy, starts, 2, noise_seed=0, keep_frames=True)
            reference = batch if reference is None else reference
            assert_equal(reference, batch)
    assert sum(policy.batches) == 6 * int(reference.called.sum())  # type: ignore[union-attr]
    for num_envs in (1, 10):
        assert_equal(reference, collect_groups(corridors(num_envs), policy, starts, 2, noise_seed=0, keep_frames=True))


def test_the_mask_ends_with_the_last_executed_command() -> None:
    batch = collect_groups(
        corridors(4), walker(), [Start(seed) for seed in range(6)], 2, noise_seed=0, keep_frames=True
    )
    lengths = torch.tensor([corridor_length(b // 2) for b in range(12)])
    assert len(set((lengths % 4).tolist())) > 2  # episodes end at different places inside their chunks
    assert batch.path.shape[1] == -(-int(lengths.max()) // 4)
    expected = torch.arange(batch.mask[0].numel()) < lengths[:, None]
    assert torch.equal(batch.mask.flatten(1), expected)
    assert [len(video) for video in batch.frames] == (1 + lengths).tolist()
    assert all((video < 255).all() for video in batch.frames)  # frames after the end are left out
    moved = (batch.actions[..., 0] * batch.mask).sum(dim=(1, 2))
    assert torch.equal(batch.success, moved > 0) and batch.success.any() and not batch.success.all()
    assert not batch.actions[~batch.called].any() and not batch.log_prob[~batch.called].any()
    doubtful = collect_groups(corridors(4, doubtful=True), walker(), batch.starts, 2, noise_seed=0)
    assert not doubtful.valid.any() and not doubtful.success.any()


def test_without_info_terminated_with_a_reward_is_success() -> None:
    class Deaf(SmallFlowPolicy):
        def encode(self, obs: Any) -> torch.Tensor:
            assert set(obs["instruction"]) <= {"", "move right"}
            return super().encode({**obs, "instruction": ["move"] * len(obs["image"])})

    policy, starts = walker(Deaf), [Start(seed) for seed in range(6)]
    silent = collect_groups(corridors(4, talks=False), policy, starts, 2, noise_seed=0, keep_frames=True)
    told = collect_groups(corridors(4), policy, starts, 2, noise_seed=0)
    assert set(silent.instructions) == {""} and silent.scores.isnan().all() and silent.valid.all()
    assert torch.equal(silent.success, told.success) and torch.equal(silent.actions, told.actions)
    assert torch.equal(silent.mask.any(dim=2), told.mask.any(dim=2)) and torch.equal(
        silent.mask, silent.mask.all(2, True).expand_as(silent.mask)
    )
    assert [len(video) for video in silent.frames] == (1 + silent.called.sum(dim=1)).tolist()


def test_ode_mode_has_no_noise_after_the_first_draw() -> None:
    batch = collect_groups(corridors(4), walker(), [Start(3)], 4, noise_seed=0, mode="ode")
    assert not batch.std.any() and not batch.log_prob.any() and batch.path.any()
    single = collect_groups(corridors(1), walker(), [Start(3)], 1, noise_seed=0, mode="ode")
    torch.testing.assert_close(single.path[0], batch.path[0])


def test_finished_slots_of_a_simulator_are_held() -> None:
    env, seeds = corridors(3), [0, 1, 3]
    lengths = np.array([corridor_length(seed) for seed in seeds])
    assert len(set(lengths)) == 3
    observation, _ = env.reset(seed=seeds)
    actions = np.zeros((3, 1, 2), np.float32)
    for step in range(1, max(lengths) + 1):
        held, previous = lengths < step, observation
        actions[:] = np.where(held, np.nan, 0.1)[:, None, None]  # nobody looks at the action of a held slot
        observation, reward, terminated, truncated, info = env.step(actions)
        assert ((terminated | truncated) == (lengths <= step)).all()
        assert (reward == ~held).all() and (info["_frames"] == ~held).all()
        np.testing.assert_array_equal(observation["state"][held], previous["state"][held])
    with pytest.raises(ValueError, match="after every episode ended: call reset"):
        env.step(actions)
    env.reset(seed=seeds, options={"reset_mask": np.array([True, False, False])})
    *_, terminated, truncated, _ = env.step(np.full((3, 1, 2), 0.1, np.float32))
    assert (terminated | truncated).tolist() == [False, True, True]


def test_a_group_is_one_initial_state() -> None:
    with pytest.raises(ValueError, match="member 1 of group 0 .seed 7. starts elsewhere than member 0.*snapshot"):
        collect_groups(corridors(2, shaky=True), walker(), [Start(7)], 2, noise_seed=0)
    collect_groups(corridors(2, shaky=True), walker(), [Start(7)], 1, noise_seed=0)


def test_bad_input_is_named(world: ProphetVectorEnv, policy: SmallFlowPolicy, starts: list[Start]) -> None:
    def collect(env: Any = world, who: Any = policy, where: Any = starts[:1], size: int = 2, **options: Any) -> None:
        collect_groups(env, who, where, size, **{"noise_seed": 0, **options})

    cases = [
        ({"where": []}, "starts is empty"),
        ({"size": 0}, "group_size is 0.*at least 1"),
        ({"noise_seed": -1}, "noise_seed -1"),
        (
            {"who": make_policy(chunk_length=9)},
            "chunks have 9 commands, the environment takes at most 8.*chunk_length=9",
        ),
        (
            {"who": make_policy(image_size=48)},
            r"sees images of 48x48 .*shows 64x64 and 8; .*make it with image_size=48 \(world models: \(48, 48\)\)",
        ),
        ({"env": corridors(1), "who": walker(image_size=8)}, "8x8 pixels .*shows 16x16"),
        ({"who": walker()}, "commands have 2 numbers, the environment's 7"),
        (
            {"env": FlatVectorEnv(corridors(1)), "who": walker()},
            "expected chunks Box\\(CH, D\\).*interface='chunk'; wrap others",
        ),
        ({"env": Corridor()}, "is a Corridor, expected a gymnasium.vector.VectorEnv"),
        ({"env": gymnasiums_own(2, AutoresetMode.SAME_STEP, blind=True), "who": walker()}, "expected Dict\\(image"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            collect(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot start from the given snapshots .*Start\\(seed\\)"):
        collect(gymnasiums_own(2, AutoresetMode.DISABLED), walker(), starts[:1])
    with pytest.raises(ValueError, match="have not ended after max_env_steps=3.*TimeLimit"):
        collect(corridors(2, endless=True), walker(), [Start(0)], max_env_steps=3)


def gymnasiums_own(num_envs: int, mode: AutoresetMode, **options: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Corridor(**options)] * num_envs, autoreset_mode=mode)


def corridor_length(seed: int) -> int:
    return int(gym.utils.seeding.np_random(seed)[0].integers(3, 14))
