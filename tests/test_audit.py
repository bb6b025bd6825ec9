"""The audit passes clean data and names every planted fault, on Tabletop and on recorded robots."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape

import numpy as np
import pytest
from PIL import Image
from squares import square_episode

from prophet_gym import audit_signals
from prophet_gym.action_frames import project
from prophet_gym.actions import integrate_poses
from prophet_gym.audit import AuditReport, audit, format_audit
from prophet_gym.audit_report import write_audit_page
from prophet_gym.audit_signals import correlation, explained, joined
from prophet_gym.data import Episode, EpisodeFolder, write_episode


def faults(report: AuditReport) -> set[str]:
    return {finding.check for finding in report.findings if finding.level == "fault"}


def said(report: AuditReport, check: str) -> str:
    return " ".join(finding.message for finding in report.findings if finding.check == check)


# Faults, as logs have them: the commands or the images are wrong, the measured poses are right


def flipped_gripper(episode: Episode) -> Episode:
    actions = episode.actions.copy()
    actions[:, 6] = 1 - actions[:, 6]
    return replace(episode, actions=actions)


def swapped_axes(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions[:, [1, 0, 2, 3, 4, 5, 6]])


def mirrored_axis(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1, -1, 1, 1, 1, 1, 1]))


def degrees(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1, 1, 1, *[180 / np.pi] * 3, 1]))


def millimetres(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1000, 1000, 1000, 1, 1, 1, 1]))


def late_video(episode: Episode) -> Episode:
    """The video lags by 3 frames."""
    return replace(episode, images=episode.frames[np.maximum(np.arange(len(episode) + 1) - 3, 0)])


def early_video(episode: Episode) -> Episode:
    return replace(episode, images=episode.frames[np.minimum(np.arange(len(episode) + 1) + 3, len(episode))])


def upside_down(episode: Episode) -> Episode:
    return replace(episode, images=episode.frames[:, ::-1])


def frozen_video(episode: Episode) -> Episode:
    """Every second frame repeats the one before."""
    return replace(episode, images=episode.frames[np.arange(len(episode) + 1) // 2 * 2])


def turning(episode: Episode) -> Episode:
    """Large turns about changing axes, commanded as rotation vectors and followed exactly."""
    rng = np.random.default_rng(len(episode.name) + int(episode.actions[0, 0] * 1e6) % 97)
    spec = replace(episode.action_spec, low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7, workspace=None)
    actions = episode.actions.copy()
    actions[:, 3:6] = rng.uniform(-0.4, 0.4, (len(actions), 3))
    assert episode.eef_pose is not None
    path = integrate_poses(episode.eef_pose[:1].astype(np.float64), spec.to_canonical(actions)[None], spec)[0]
    poses = np.concatenate([episode.eef_pose[:1], path])
    return replace(episode, actions=actions, eef_pose=poses, action_spec=spec, camera=None)


def as_euler(episode: Episode) -> Episode:
    """The spec calls rotation vectors Euler angles."""
    episode = turning(episode)
    return replace(episode, action_spec=replace(episode.action_spec, rotation="euler_xyz"))


def as_local(episode: Episode) -> Episode:
    """The spec calls deltas in the base frame local."""
    episode = turning(episode)
    return replace(episode, action_spec=replace(episode.action_spec, delta="local"))


def missing_frame(episode: Episode) -> Episode:
    frames = episode.frames
    return replace(episode, images=lambda: frames[:-1])


def blind(episode: Episode) -> Episode:
    return replace(episode, eef_pose=None, gripper=None, camera=None)


@pytest.fixture(scope="module", autouse=True)
def motion_is_measured_once() -> Iterator[None]:
    """Most faults leave the video as it is."""
    measure, known = audit_signals.image_motion, {}

    def remembered(frames: np.ndarray) -> np.ndarray:
        key = frames.shape, hashlib.sha256(np.ascontiguousarray(frames)).digest()
        if key not in known:
            known[key] = measure(frames)
        return known[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_signals, "image_motion", remembered)
        yield


@pytest.fixture(scope="module")
def tabletop() -> list[Episode]:
    """Clean episodes with exact poses and a calibrated camera."""
    from prophet_gym.data.record import record_episode
    from prophet_gym.sims.tabletop import TabletopSim

    sim = TabletopSim()
    episodes = [record_episode(sim, seed, steps=24, behaviour="expert") for seed in range(6)]
    sim.close()
    return episodes


@pytest.mark.render
def test_clean_episodes_pass(tabletop):
    report = audit(tabletop)
    assert report.exit_code == 0 and not faults(report), format_audit(report)
    assert report.episodes == 6 and report.delay == 0 and report.followed[0] > 0.7
    assert "no faults found" in format_audit(report)
    assert report.response["x"]["slope"] == pytest.approx(1, abs=0.01)
    assert report.response["x"]["correlation"] > 0.99
    assert report.to_dict()["findings"]


@pytest.mark.render
@pytest.mark.parametrize(
    ("plant", "check", "words"),
    [
        (flipped_gripper, "gripper", "polarity"),
        (swapped_axes, "axes", "commanded x moves measured y .* swapped"),
        (mirrored_axis, "sign", "commanded y moves measured y backwards"),
        (degrees, "units", "Degrees for radians"),
        (millimetres, "units", "Millimetres"),
        (late_video, "image delay", r"by 3 step\(s\).*shifted: move the images earlier"),
        (early_video, "image delay", r"by -3 step\(s\).*shifted: move the images later"),
        (upside_down, "camera", r"-0\.\d+ \(down\); expected clearly positive"),
        (frozen_video, "frozen images", "repeat the image before"),
        (
            as_euler,
            "frame",
            "read as .'servo', 'axis_angle'. instead of .'servo', 'euler_xyz'.: .*rotation='axis_angle'",
        ),
        (as_local, "frame", "set delta='servo', rotation='axis_angle'"),
        (missing_frame, "unreadable episode", "24 images for 24 actions; expected 25"),
    ],
)
def test_planted_faults_are_named(tabletop, plant: Callable[[Episode], Episode], check: str, words: str):
    episodes = [plant(episode) for episode in tabletop]
    if plant is missing_frame:
        episodes[:4] = tabletop[:4]
    report = audit(episodes)
    assert report.exit_code == 1 and check in faults(report), format_audit(report)
    assert re.search(words, said(report, check)), said(report, check)


@pytest.mark.render
def test_without_poses_the_audit_says_what_it_cannot_see(tabletop):
    report = audit([blind(episode) for episode in tabletop])
    assert report.exit_code == 0
    assert "axes are not checked" in said(report, "poses") and "no calibrated camera" in said(report, "camera")
    assert report.response["x"]["slope"] is None and report.response["x"]["image"] is not None
    grasping = [episode for episode in tabletop if episode.actions[0, 6] == 1] * 3  # pushing begins closed
    flipped = audit([flipped_gripper(blind(episode)) for episode in grasping])
    assert faults(flipped) == {"gripper"} and "begin with a closed gripper" in said(flipped, "gripper")
    assert faults(audit([late_video(blind(episode)) for episode in tabletop])) == {"image delay"}
    fast = audit([millimetres(blind(episode)) for episode in tabletop])
    assert faults(fast) == {"units"} and "m/s; expected at most 3" in said(fast, "units")


@pytest.mark.render
def test_images_of_other_episodes_are_noticed(tabletop):
    mixed = [replace(e, images=tabletop[i - 1].frames[::-1]) for i, e in enumerate(map(blind, tabletop))]
    assert faults(audit(mixed)) & {"image follows", "image delay"}


@pytest.mark.render
def test_what_differs_in_a_set_is_listed(tabletop):
    odd = [replace(tabletop[0], fps=5.0, instruction=""), *tabletop[1:]]
    report = audit(odd)
    assert "[5.0, 10.0] Hz" in said(report, "frame rate") and "1 of 6 episodes" in said(report, "instruction")
    assert report.exit_code == 0
    assert not faults(audit([turning(episode) for episode in tabletop])) & {"frame", "axes", "sign", "units"}
    uncalibrated = audit([replace(tabletop[0], camera=None), *tabletop[1:]])
    assert "1 of 6 episodes have no calibrated camera" in said(uncalibrated, "camera")
    cut = audit([replace(e, actions=e.actions.clip(-0.005, [*[0.005] * 3, *[1.0] * 4])) for e in tabletop])
    assert re.search("x: .* are at the largest value, 0.005", said(cut, "clipped commands"))
    assert not said(audit(tabletop), "clipped commands")
    with pytest.raises(ValueError, match="none of 1 episodes can be audited. The first: .*24 images"):
        audit([missing_frame(tabletop[0])])


@pytest.mark.parametrize(("count", "limit", "found"), [(1, 0, 0), (1, -1, -1), (0, None, 0)])
def test_nothing_to_audit(count, limit, found):
    with pytest.raises(ValueError, match=f"{found} episodes to audit; expected at least 1"):
        audit([square_episode(0)][:count], limit=limit)


@pytest.mark.render
def test_the_command_reports_and_exits_with_the_verdict(tabletop, tmp_path, monkeypatch, capsys):
    from prophet_gym.cli import main

    for i, episode in enumerate(tabletop[:3]):
        write_episode(tmp_path / "clean" / str(i), episode)
        write_episode(tmp_path / "flipped" / str(i), flipped_gripper(episode))
    clean, page = str(tmp_path / "clean"), tmp_path / "pages" / "clean.html"
    words = ["prophet", "audit", clean, "--out", str(tmp_path / "a.json"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert "3 episodes audited" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["delay"] == 0
    html = page.read_text()
    assert "<h1>No faults in clean</h1>" in html and html.count("data:image/png") == 3 and "<svg" in html
    assert escape(tabletop[0].instruction) in html and "<td>gripper</td><td>1.000</td>" in html
    for folder, status in (("flipped", 1), ("nowhere", 2)):
        monkeypatch.setattr(sys, "argv", ["prophet", "audit", str(tmp_path / folder)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == status
    shown = capsys.readouterr()
    assert "FAULT" in shown.out and "polarity" in shown.out and "is no file or folder" in shown.err


@pytest.mark.render
def test_the_page_marks_the_hand_where_the_camera_sees_it(tabletop, tmp_path):
    episode = tabletop[0]
    write_audit_page(audit(tabletop), tabletop, tmp_path / "a.html", name="<tabletop>", strips=1)
    html = (tmp_path / "a.html").read_text()
    assert "&lt;tabletop&gt;" in html and "<tabletop>" not in html
    strip = np.array(Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)"', html).group(1)))))
    magenta = (strip[:, :124].astype(int) - [255, 0, 200]).__abs__().sum(axis=-1) < 30
    rows, columns = magenta.nonzero()
    u, v = project(episode.eef_pose[0, 0, :3, 3], episode.camera)
    assert abs(columns.mean() / 2 - 0.5 - u) < 1 and abs(rows.mean() / 2 - 0.5 - v) < 1
    unreadable = [missing_frame(episode), *tabletop[1:]]
    report = audit(unreadable)
    write_audit_page(report, unreadable, tmp_path / "b.html", name="b")
    html = (tmp_path / "b.html").read_text()
    assert "<h1>1 fault(s) in b</h1>" in html and "24 images for 24 actions" in html and html.count("image/png") == 3


def test_measures_against_closed_form():
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(40, 3)) for _ in range(2)]
    response = np.array([[1.0, 0.5], [-2.0, 0.0], [0.0, 1.0]])
    targets = [np.concatenate([np.zeros((2, 2)), i[:-2] @ response]) for i in inputs]  # two steps late
    share, weights = explained(*joined(targets, inputs, 2))
    assert share == pytest.approx(1) and np.allclose(weights, response)
    assert abs(explained(*joined(targets, inputs, 0))[0]) < 0.2
    a = rng.normal(size=(50, 2))
    table = correlation(a, np.stack([a[:, 1], -a[:, 0], np.ones(50)], axis=1))
    assert table[0, 1] == pytest.approx(-1) and table[1, 0] == pytest.approx(1) and not table[:, 2].any()


@pytest.mark.data
@pytest.mark.parametrize("name", ["bridge", "bridge64", "droid"])
def test_recorded_robots_pass_and_their_traps_are_told(recordings, name):
    episodes = [e for e in EpisodeFolder(recordings / name) if e.fps == (5.0 if name != "droid" else 4.0)]
    report = audit(episodes[:4] if name == "droid" else episodes)
    assert report.exit_code == 0, format_audit(report)
    if name == "bridge":
        assert report.delay in (1, 2) and "8 of 8 episodes have no instruction" in said(report, "instruction")
        assert "begin with a zero command" in said(report, "first command")
        assert "axes are not checked" in said(report, "poses")


@pytest.mark.data
def test_faults_planted_in_recordings_are_named(recordings):
    bridge = EpisodeFolder(recordings / "bridge")[:]
    assert "gripper" in faults(audit([flipped_gripper(e) for e in bridge]))
    assert "image delay" in faults(audit([late_video(e) for e in bridge]))
    assert "units" in faults(audit([degrees(e) for e in bridge]))
    measured = EpisodeFolder(recordings / "bridge64")[:]
    assert "axes" in faults(audit([swapped_axes(e) for e in measured]))
