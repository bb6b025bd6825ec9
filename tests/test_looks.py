"""Looks of Tabletop: the same physics behind another camera and other colours, and no mixing of the two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import prophet_gym  # noqa: F401  (registers the ids)
from prophet_gym.action_frames import project
from prophet_gym.cli import main
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import record
from prophet_gym.registration import ASSETS
from prophet_gym.sims.looks import LOOKS
from prophet_gym.sims.tabletop import TabletopSim
from prophet_gym.snapshot import SnapshotSet


@pytest.fixture(scope="module")
def sims():
    simulators = {look: TabletopSim(look=look) for look in LOOKS}
    yield simulators
    for simulator in simulators.values():
        simulator.close()


def test_a_look_changes_no_physics(sims):
    ends = []
    for sim in sims.values():
        sim.reset(seed=3)
        for t in range(6):
            sim.step(np.array([0.02, -0.03, -0.02, 0, 0, 0.1, t % 2], np.float32))
        ends.append(sim.get_state())
    assert np.array_equal(*ends)


@pytest.mark.render
def test_the_first_look_is_that_of_the_packaged_world(sims):
    sim = sims["first"]
    for snapshot in SnapshotSet.load(ASSETS / "tabletop" / "snapshots")[:4]:
        sim.reset(state=snapshot.simulator_state)
        assert sim.instruction == snapshot.instruction
        assert np.allclose(sim.camera.E, snapshot.camera.E) and np.allclose(sim.camera.K, snapshot.camera.K)
        assert np.abs(sim.render().astype(int) - snapshot.image).mean() < 1.0  # drivers differ in rounding
        sims["second"].reset(state=snapshot.simulator_state)
        assert np.abs(sims["second"].render().astype(int) - snapshot.image).mean() > 20


@pytest.mark.render
@pytest.mark.parametrize("look", LOOKS)
def test_every_camera_sees_hand_and_block_where_it_projects_them(look):
    """At three times the usual size, in which 3 px are one: fingers are thin."""
    sim, hands, blocks = TabletopSim(192, look), [], []
    renderer = sim._get_renderer()

    def centre(geom):
        rows, columns = np.nonzero(renderer.mask(sim.data, geom))
        return np.array([columns.mean(), rows.mean()]), len(rows)

    for seed in range(8):
        sim.reset(seed=seed)
        for climb in (0.04, 0.0):
            sim.step(np.array([0, 0, climb, 0, 0, 0, 1], np.float32))
        fingers = [centre(geom)[0] for geom in sim._pads]
        between_pads = sim.commanded_pose[0, :3, 3] + 0.009 * sim.commanded_pose[0, :3, 2]
        hands.append(np.mean(fingers, axis=0) - project(between_pads, sim.camera))
        place, pixels = centre(sim._block_geom)
        if pixels > 300:  # not behind the hand
            blocks.append(place - sim.block_px())
    sim.close()
    assert np.abs(hands).max() < 3.5  # the bar hides the upper ends of the pads from the front camera
    assert len(blocks) > 4 and np.abs(blocks).max() < 1.5


@pytest.mark.render
def test_env_speaks_and_starts_in_its_look():
    first, second = gym.make("Tabletop-v0"), gym.make("Tabletop-v0", look="second")
    _, info = second.reset(seed=1)
    words = info["instruction"].split()
    assert words[2] in LOOKS["second"].blocks and words[2] not in LOOKS["first"].blocks
    snapshot = second.unwrapped.snapshot("there")
    members = second.unwrapped.fork(2)
    assert all(np.array_equal(slot.unwrapped.snapshot().image, snapshot.image) for slot in members.envs)
    with pytest.raises(ValueError, match="'there'.*another camera than that of look='first'"):
        first.reset(options={"snapshot": snapshot})
    with pytest.raises(ValueError, match="another camera"):
        gym.make("Tabletop-v0", snapshots=[snapshot])
    with pytest.raises(ValueError, match="another camera"):
        gym.make("Tabletop-v0", look="second", snapshots=ASSETS / "tabletop" / "snapshots")
    first.reset(seed=1)
    with pytest.raises(ValueError, match="another camera"):
        first.unwrapped.fork(1).reset(options={"snapshots": [snapshot]})
    with pytest.raises(ValueError, match="Did you mean 'second'"):
        gym.make("Tabletop-v0", look="secnd")
    for env in (first, second, members):
        env.close()


@pytest.mark.render
def test_looks_are_recorded_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def prophet(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["prophet", "record", *words, "--steps", "2", "--workers", "0"])
        main()

    first, second = tmp_path / "first", tmp_path / "second"
    record(first, 1, seed=4, steps=2, workers=0, progress=False)
    prophet(str(second), "--episodes", "1", "--seed", "4", "--look", "second")
    a, b = EpisodeFolder(first)[0], EpisodeFolder(second)[0]
    assert np.array_equal(a.actions, b.actions) and np.array_equal(a.simulator_state, b.simulator_state)
    assert not np.allclose(a.camera.E, b.camera.E) and not np.array_equal(a.frames, b.frames)
    assert b.metadata["look"] == "second"
    assert "look" not in json.loads((first / a.name / "meta.json").read_text())["metadata"]
    record(first, 2, seed=4, steps=2, workers=0, progress=False)  # after the other look, in the same process
    assert np.allclose(EpisodeFolder(first)[1].camera.E, a.camera.E)
    with pytest.raises(SystemExit):
        prophet(str(first), "--episodes", "2", "--seed", "4", "--look", "second")
    assert "holds episodes of look='first', expected 'second'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="look='third': expected one of"):
        record(tmp_path / "none", 1, look="third")
