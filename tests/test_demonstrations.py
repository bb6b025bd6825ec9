"""Demonstrations are what environments report, chunk by chunk; what cannot be imitated is refused by name."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from squares import SPEC
from squares import square_episode as episode

import prophet_gym
from prophrl_agents.demonstrations import read_demonstrations

gym.register_envs(prophet_gym)


@pytest.fixture(scope="module")
def recorded():
    """One expert episode of the real simulator."""
    from prophet_gym.data.record import record_episode
    from prophet_gym.sims.tabletop import TabletopSim

    sim = TabletopSim()
    yield record_episode(sim, 3)
    sim.close()


@pytest.mark.render
def test_demonstrations_are_what_the_simulator_reports(recorded):
    demonstrations = read_demonstrations([recorded])
    env = gym.make("Tabletop-v0", chunk_length=1, horizon=100)
    observation, info = env.reset(options={"snapshot": recorded.snapshot()})
    compared, done = 0, False
    while not done and compared < len(demonstrations):
        seen, chunk, mask = demonstrations.batch(np.array([compared]), 1)
        assert seen["instruction"] == [info["instruction"]] and mask.all()
        grey_levels = seen["image"][0].int() - torch.from_numpy(observation["image"]).int()
        assert grey_levels.abs().max() <= 2, "two renderings of one state"
        assert seen["state"].dtype == torch.float32
        np.testing.assert_allclose(seen["state"][0], observation["state"], rtol=0, atol=1e-6)
        observation, _, done, _, info = env.step(chunk[0].numpy())
        compared += 1
    env.close()
    assert done and compared > 10, "the expert succeeds, and until then everything agreed"
    assert not np.allclose(demonstrations.states[0], demonstrations.states[compared - 1], atol=0.01)


@pytest.mark.render
def test_states_are_those_of_the_world_model(recorded, tiny_checkpoint):
    demonstrations = read_demonstrations([recorded])
    snapshot = recorded.snapshot()
    snapshot = dataclasses.replace(
        snapshot, image=snapshot.image[:48, :48].copy(), camera=snapshot.camera.resized(48, 48)
    )
    env = gym.make_vec(
        "Prophet-Tabletop-v0", num_envs=1, vectorization_mode="vector_entry_point", checkpoint=tiny_checkpoint,
        judge=lambda frames, instruction: True,
    )  # fmt: skip
    observation, _ = env.reset(seed=[0], options={"snapshots": [snapshot]})
    for t in (0, 8, 16):
        np.testing.assert_allclose(demonstrations.states[t], observation["state"][0], rtol=0, atol=1e-5)
        observation = env.step(recorded.actions[None, t : t + 8])[0]
    env.close()


def test_measured_poses_give_the_commanded_state():
    """Environments integrate commands; a robot that lags behind them must not teach another convention."""
    first = episode(1)
    lagging = first.eef_pose.copy()
    lagging[1:, 0, :3, 3] = 0.123
    states = read_demonstrations([dataclasses.replace(first, eef_pose=lagging)]).states
    edge = SPEC.workspace[1][0]  # the controller stops there
    np.testing.assert_allclose(states[1:, 0], np.cumsum(first.actions[:-1, 0]).clip(max=edge), atol=1e-6)
    assert states[0, 2] == np.float32(0.1)
    assert states[:, 6].tolist() == [1.0, *first.actions[:-1, 6]]


def test_chunks_stop_at_the_end_of_their_episode():
    one, two = episode(1, 9), episode(2, 5)
    demonstrations = read_demonstrations([one, two])
    assert len(demonstrations) == 14 and demonstrations.episodes.tolist() == [0] * 9 + [1] * 5
    assert demonstrations.steps.tolist() == [*range(9), *range(5)]
    seen, chunks, mask = demonstrations.batch(np.array([0, 7, 8, 9, 13]), 4)
    assert mask.sum(dim=1).tolist() == [4, 2, 1, 4, 1] and mask.dtype == torch.bool
    assert seen["instruction"] == ["move right"] * 3 + ["move left"] * 2
    assert torch.equal(chunks[0], torch.from_numpy(one.actions[:4]))
    assert torch.equal(chunks[1, :2], torch.from_numpy(one.actions[7:]))
    assert torch.equal(chunks[4, 0], torch.from_numpy(two.actions[4]))
    assert (chunks[~mask] == 0).all()
    for row, (source, t) in enumerate([(one, 0), (one, 7), (one, 8), (two, 0), (two, 4)]):
        assert np.array_equal(seen["image"][row].numpy(), source.frames[t])


def test_statistics_come_from_the_training_frames_and_the_action_bounds():
    demonstrations = read_demonstrations([episode(index) for index in range(4)])
    train, held_out = demonstrations.split(1, seed=3)
    statistics = demonstrations.statistics(train)
    np.testing.assert_allclose(statistics.action_mean, demonstrations.actions[train].mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.state_std, demonstrations.states[train].std(0), atol=1e-6)
    assert not np.allclose(statistics.action_mean, demonstrations.actions.mean(0), atol=1e-5)
    space = SPEC.action_space(8)
    assert np.array_equal(statistics.action_low, space.low[0]) and np.array_equal(statistics.action_high, space.high[0])


def test_split_is_by_episode_and_seeded():
    demonstrations = read_demonstrations([episode(index) for index in range(6)])
    train, held_out = demonstrations.split(2, seed=0)
    assert sorted([*train, *held_out]) == list(range(len(demonstrations)))
    parts = [set(demonstrations.episodes[frames]) for frames in (train, held_out)]
    assert len(parts[1]) == 2 and not parts[0] & parts[1]
    assert np.array_equal(demonstrations.split(2, seed=0)[1], held_out)
    assert any(not np.array_equal(demonstrations.split(2, seed=seed)[1], held_out) for seed in range(1, 5))
    with pytest.raises(ValueError, match="held_out=6 of 6 episodes; expected 0 to 5"):
        demonstrations.split(6, seed=0)


def test_filters():
    episodes = [episode(0), episode(1, success=False), episode(2), episode(3, success=None), episode(4)]
    for indices, options in [
        ((0, 2, 4), {}),
        ((0, 1, 2, 3, 4), dict(only_success=False)),
        ((2, 4), dict(behaviours=("expert",))),
        ((0, 3), dict(behaviours=("half_good",), only_success=False)),
        ((0, 2), dict(max_episodes=2)),
    ]:
        assert read_demonstrations(episodes, **options).names == tuple(f"episode_{index}" for index in indices)
    few = read_demonstrations(episodes, max_episodes=1)
    assert few.instructions == ("move left",) and few.vocabulary == ("left", "move", "right")
    assert few.behaviours == ("half_good",)


def test_recordings_of_the_wrong_kind_are_refused():
    good = episode(0)
    other = dataclasses.replace(SPEC, delta="local")
    fast = good.actions.copy()
    fast[3, 1] = 0.5
    cases = [
        ([], {}, "no episodes; expected at least one"),
        ([good, episode(1, eef_pose=None, gripper=None)], {}, "'episode_1' has no eef_pose"),
        ([good, episode(1, instruction=" ")], {}, "'episode_1' has no instruction"),
        (
            [good, episode(1, action_spec=other)],
            {},
            r"different action specs: \{'delta': \('local', 'servo'\)\}",
        ),
        ([episode(1, actions=fast)], {}, r"'episode_1': the environment would refuse.*action\[3, 1\] is 0.5"),
        (
            [good, episode(1, images=np.zeros((10, 24, 24, 3), np.uint8))],
            {},
            r"'episode_1' has image of shape \(24",
        ),
        ([episode(1, success=False)], {}, "none of 1 episodes is left: 0 are marked successful"),
        ([good], dict(behaviours=("half_god",)), "no episode has behaviour 'half_god'.*Did you mean 'half_good'"),
        ([good], dict(behaviours="expert"), r"behaviours='expert'; expected a sequence"),
        (
            [good, episode(2, success=False)],
            dict(behaviours=("expert",)),
            "none of 2 episodes is left: 1 are marked",
        ),
    ]
    for episodes, options, message in cases:
        with pytest.raises(ValueError, match=message):
            read_demonstrations(episodes, **options)
