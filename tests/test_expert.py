"""The scripted behaviours and the recorder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import prophet_gym
from prophet_gym import SnapshotSet
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import (
    DEFAULT_MIX,
    choose_behaviour,
    episode_name,
    record,
    record_episode,
    record_snapshots,
)
from prophet_gym.sims.expert import BEHAVIOURS, ExpertConfig, ScriptedExpert, sample_config
from prophet_gym.sims.tabletop import TabletopSim


@pytest.fixture(scope="module")
def sim():
    simulator = TabletopSim()
    yield simulator
    simulator.close()


def play(sim, config, seed, steps=40):
    """Success at the end, the commands, and the first step with success (None if there is none)."""
    sim.reset(seed=seed)
    expert, actions, first = ScriptedExpert(config, seed), [], None
    for step in range(1, steps + 1):
        actions.append(expert.act(sim))
        sim.step(actions[-1])
        if first is None and sim.is_success():
            first = step
    return sim.is_success(), np.stack(actions), first


def test_clean_expert_succeeds_in_time(sim):
    results = [play(sim, ExpertConfig(), 5000 + seed) for seed in range(25)]
    assert sum(success for success, _, _ in results) >= 24
    assert max(first for success, _, first in results if success) <= 34


@pytest.mark.slow
def test_success_rates_of_expert_and_half_good(sim):
    rates = {}
    for behaviour in ("expert", "half_good"):
        configs = [sample_config(behaviour, np.random.default_rng(seed)) for seed in range(100)]
        rates[behaviour] = np.mean([play(sim, config, 6000 + seed)[0] for seed, config in enumerate(configs)])
    assert rates["expert"] >= 0.95
    assert 0.3 < rates["half_good"] < 0.6


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_behaviour_commands_within_bounds_and_repeats(sim, behaviour):
    config = sample_config(behaviour, np.random.default_rng(0))
    _, actions, _ = play(sim, config, 1)
    sim.action_spec.check(actions, 40)
    assert np.abs(actions[:, :3]).max() > 0.01
    _, again, _ = play(sim, config, 1)
    assert np.array_equal(actions, again)


def test_failures_fail(sim):
    for behaviour in ("never_close", "close_early", "hover"):
        for seed in range(3):
            config = sample_config(behaviour, np.random.default_rng(seed))
            assert not play(sim, config, 7000 + seed)[0]


def test_grasp_bias_grows_until_it_misses(sim):
    seed = next(s for s in range(100) if sim.reset(seed=s) is None and sim.task == "put")
    success = [play(sim, ExpertConfig(grasp_bias=(0.0, bias, 0.0)), seed)[0] for bias in (0.0, 0.01, 0.07)]
    assert success == [True, True, False]


def test_unknown_behaviour_and_speed_are_refused():
    with pytest.raises(ValueError, match="Unknown behaviour 'expret'"):
        ExpertConfig(behaviour="expret")
    with pytest.raises(ValueError, match="speed is 0.5"):
        ExpertConfig(speed=0.5)


def test_default_mix_is_what_it_says():
    assert sum(DEFAULT_MIX.values()) == pytest.approx(1.0)
    drawn = [choose_behaviour(seed, DEFAULT_MIX) for seed in range(2000)]
    for behaviour, share in DEFAULT_MIX.items():
        assert drawn.count(behaviour) / len(drawn) == pytest.approx(share, abs=0.04)


@pytest.mark.render
def test_recorded_episode_holds_what_was_played(sim):
    episode = record_episode(sim, 12, steps=6, behaviour="half_good")
    assert episode.frames.shape == (7, 64, 64, 3)
    assert episode.actions.shape == (6, 7)
    assert episode.metadata["behaviour"] == "half_good"
    assert {"block_px", "block_visible", "block_pos", "success"} <= set(episode.labels)
    sim.reset(state=episode.simulator_state)
    for t, action in enumerate(episode.actions):
        assert np.array_equal(sim.render(), episode.frames[t])
        assert np.array_equal(sim.commanded_pose, episode.eef_pose[t])
        assert np.array_equal(sim.block_pos, episode.labels["block_pos"][t])
        sim.step(action)
    assert np.array_equal(sim.render(), episode.frames[-1])


@pytest.mark.render
def test_snapshots_are_where_episodes_of_those_seeds_begin(sim, tmp_path):
    taken = record_snapshots(tmp_path / "starts", 2, seed=12)
    episode = record_episode(sim, 13, steps=1)
    assert np.array_equal(taken[1].image, episode.frames[0])
    assert np.array_equal(taken[1].simulator_state, episode.simulator_state)
    assert len(record_snapshots(tmp_path / "starts", 1, seed=12, overwrite=True)) == 1
    with pytest.raises(ValueError, match="count=0"):
        record_snapshots(tmp_path / "none", 0)


@pytest.mark.render
def test_packaged_snapshots_can_be_made_again(tmp_path):
    packaged = SnapshotSet.load(Path(prophet_gym.__file__).parent / "assets" / "tabletop" / "snapshots")
    again = record_snapshots(tmp_path / "starts", 3, seed=2_000_000)
    for made, kept in zip(again, packaged[:3], strict=True):
        assert made.name == kept.name and made.instruction == kept.instruction
        assert np.array_equal(made.simulator_state, kept.simulator_state)
        assert np.abs(made.image.astype(int) - kept.image).max() <= 2  # renderers round differently


@pytest.mark.render
def test_recording_resumes_without_a_trace(tmp_path):
    assert record(tmp_path / "a", 2, seed=5, workers=0, steps=3, progress=False) == 2
    assert record(tmp_path / "a", 3, seed=5, workers=0, steps=3, progress=False) == 1
    assert record(tmp_path / "a", 3, seed=5, workers=0, steps=3, progress=False) == 0
    record(tmp_path / "b", 3, seed=5, workers=0, steps=3, progress=False)
    left, right = EpisodeFolder(tmp_path / "a"), EpisodeFolder(tmp_path / "b")
    assert left.names == right.names == tuple(episode_name(seed) for seed in (5, 6, 7))
    for one, other in zip(left, right, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.actions, other.actions)
        assert one.metadata == other.metadata


@pytest.mark.slow
@pytest.mark.render
def test_workers_record_the_same_episodes(tmp_path):
    record(tmp_path / "here", 3, seed=9, workers=0, steps=3, progress=False)
    record(tmp_path / "there", 3, seed=9, workers=2, steps=3, progress=False)
    for one, other in zip(EpisodeFolder(tmp_path / "here"), EpisodeFolder(tmp_path / "there"), strict=True):
        assert np.array_equal(one.frames, other.frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "episodes=0"),
        ({"episodes": 1, "seed": -1}, "seed=-1"),
        ({"episodes": 1, "mix": {"expret": 1.0}}, "Give non-negative shares"),
        ({"episodes": 1, "mix": {"expert": 0.0}}, "positive sum"),
        ({"episodes": 1, "mix": {}}, "positive sum"),
    ],
)
def test_bad_recordings_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        record(tmp_path, **arguments)
