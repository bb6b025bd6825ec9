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
from typing import Any

import numpy as np
import pytest
from audit_faults import (
    as_euler,
    as_local,
    blind,
    degrees,
    early_video,
    flipped_gripper,
    frozen_video,
    late_video,
    millimetres,
    mirrored_axis,
    missing_frame,
    swapped_axes,
    turning,
    upside_down,
)
from PIL import Image
from squares import square_episode

from prophet_gym import audit as audit_module
from prophet_gym import audit_signals
from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.audit import AuditReport, audit, format_audit
from prophet_gym.audit_checks import check_calibration, check_images
from prophet_gym.audit_report import write_audit_page
from prophet_gym.audit_signals import Signals, correlation, delays_at, explained, joined, projected_motion
from prophet_gym.data import Episode, EpisodeFolder, write_episode

DELAYS = delays_at(5.0)


def faults(report: AuditReport) -> set[str]:
    return {finding.check for finding in report.findings if finding.level == "fault"}


def said(report: AuditReport, check: str) -> str:
    return " ".join(finding.message for finding in report.findings if finding.check == check)


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
        (late_video, "image delay", r"by 6 step\(s\), 0.6 s.* 0 to 4. The video is shifted: move the images earlier"),
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
    late = faults(audit([late_video(blind(episode)) for episode in tabletop]))
    assert late == {"image delay", "frozen images"}  # it begins with the same image seven times
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
    share, weights = explained(*joined(targets, inputs, 2, DELAYS))
    assert share == pytest.approx(1) and np.allclose(weights, response)
    assert abs(explained(*joined(targets, inputs, 0, DELAYS))[0]) < 0.2
    a = rng.normal(size=(50, 2))
    table = correlation(a, np.stack([a[:, 1], -a[:, 0], np.ones(50)], axis=1))
    assert table[0, 1] == pytest.approx(-1) and table[1, 0] == pytest.approx(1) and not table[:, 2].any()


def test_every_delay_pairs_as_many_rows_of_short_episodes():
    for length in range(1, 30):
        steps = np.arange(length)[:, None]
        for delay in DELAYS:
            targets, inputs = joined([steps], [steps], delay, DELAYS)
            assert (targets - inputs == delay).all() and len(targets) == len(inputs)
    assert explained(np.zeros((0, 2)), np.zeros((0, 3)))[0] == 0 and not correlation(*np.zeros((2, 0, 2))).any()


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
def test_short_episodes_are_audited(length, count):
    report = audit([square_episode(0, length=length)] * count)
    assert report.episodes == count
    assert "are needed to say anything" in said(report, "image delay") or count * (length - 2) >= 40


@pytest.mark.render
def test_short_pieces_of_clean_episodes_pass(tabletop):
    def piece(episode: Episode, first: int, last: int) -> Episode:
        rows = slice(first, last + 1)
        kept = {key: getattr(episode, key)[rows] for key in ("eef_pose", "gripper")}
        return replace(episode, images=episode.frames[rows], actions=episode.actions[first:last], labels={}, **kept)

    pieces = [piece(episode, first, first + 4) for episode in tabletop for first in range(0, 24, 4)]
    report = audit([piece(tabletop[0], 8, 15), *pieces])  # only one leaves steps to a delay of 5 or 6
    assert report.exit_code == 0, format_audit(report)


def test_one_and_two_arms_in_one_set_are_a_fault(tmp_path):
    one = square_episode(0)
    both = np.tile(one.actions, (1, 2))
    two = replace(one, action_spec=ACTION_SPECS["agibot"], actions=both, eef_pose=None, gripper=None)
    report = audit([one, two])
    assert "2 action specs in one set; split it" in said(report, "action spec") and report.exit_code == 1
    assert report.response == {} and report.delay is None and "FAULT" in format_audit(report)
    write_audit_page(report, [one, two], tmp_path / "mixed.html", name="mixed")
    assert "<h1>1 fault(s) in mixed</h1>" in (tmp_path / "mixed.html").read_text()


def test_images_of_an_audited_episode_are_let_go(monkeypatch):
    kept = []
    monkeypatch.setattr(audit_module, "check_units", lambda read: kept.extend(read) or [])
    audit([square_episode(i, labels={"mask": np.zeros((10, 16, 16))}) for i in range(3)])
    for episode in kept:
        held = episode.frames
        while held.base is not None:
            held = held.base
        assert held.nbytes == 3 * len(episode.frames) and not episode.labels


# Signals made by hand: commands, the image's motion, what the camera predicts


def signals_of(seed: int = 0, *, fps: float = 5.0, lag: int = 0, length: int = 300, **changes: Any) -> Signals:
    """The image moves as commanded, ``lag`` steps later; the camera predicts just that."""
    rng = np.random.default_rng(seed)
    commands = rng.normal(size=(length + lag, 1, 7))
    motion = commands[:, 0, :2]
    values = {
        "name": str(seed),
        "fps": fps,
        "commands": commands[lag:],
        "image_motion": motion[:length],
        "same_image": np.zeros(length, bool),
        "motion": None,
        "predicted": motion[:length].copy(),
    }
    return Signals(**(values | changes))


@pytest.mark.parametrize(
    ("fps", "lag", "level"),
    [
        (5.0, 1, "note"),
        (5.0, 2, "warning"),
        (5.0, 3, "fault"),
        (2.0, 2, "warning"),
        (10.0, 4, "warning"),
        (10.0, 5, "fault"),
        (30.0, 6, "note"),
        (30.0, 12, "warning"),
        (30.0, 20, "fault"),
    ],
)
def test_the_image_delay_is_judged_in_seconds(fps, lag, level):
    delay, followed, weights, (finding,) = check_images([signals_of(i, fps=fps, lag=lag) for i in range(3)])
    assert (delay, finding.check, finding.level) == (lag, "image delay", level), finding.message
    assert followed[lag] == pytest.approx(1) and np.allclose(weights[:2], np.eye(2))
    assert f"by {lag} step(s), {lag / fps:.2g} s" in finding.message


def test_the_camera_of_another_scene_is_a_fault():
    rng = np.random.default_rng(1)
    (finding,) = check_calibration([signals_of()])
    assert finding.level == "note" and "1.00 (right) and 1.00 (down)" in finding.message
    elsewhere = rng.normal(size=(300, 2))
    (finding,) = check_calibration([signals_of(predicted=elsewhere)])
    assert finding.level == "fault" and "the camera is of another scene" in finding.message
    half = np.stack([signals_of().image_motion[:, 0], elsewhere[:, 1]], axis=1)
    assert check_calibration([signals_of(predicted=half)])[0].level == "fault"
    # An axis along which hardly anything moves says nothing.
    for still in (0.0, 0.001, 0.2):
        (finding,) = check_calibration([signals_of(predicted=half * [1, still])])
        assert finding.level == "note", finding.message
    # Images that come late, as they may, do not speak against the camera.
    (finding,) = check_calibration([signals_of(predicted=np.roll(signals_of().image_motion, -2, axis=0))])
    assert finding.level == "note" and "1.00 (right)" in finding.message


def through(episode: Episode, change: Callable[[np.ndarray], np.ndarray]) -> Episode:
    assert episode.camera is not None
    camera = episode.camera
    return replace(episode, camera=Camera(camera.K, change(camera.E), camera.width, camera.height))


@pytest.mark.render
def test_a_hand_behind_the_camera_is_noticed(tabletop):
    opengl = np.diag([1.0, -1.0, -1.0, 1.0])
    report = audit([through(episode, lambda E: opengl @ E) for episode in tabletop])
    assert faults(report) == {"camera"}
    assert "behind the camera in 150 of 150 frames; expected none. E may be inverted" in said(report, "camera")
    assert faults(audit([through(tabletop[0], lambda E: opengl @ E)])) == {"camera"}  # however few
    poses = tabletop[0].eef_pose.copy()
    poses[5, 0, 2, 3] = 3.0  # above a camera that looks down
    once = [replace(tabletop[0], eef_pose=poses), *tabletop[1:]]
    report = audit(once)
    assert "camera" not in faults(report) and "in 1 of 150 frames" in said(report, "camera")
    assert re.search(r"correlate by 0\.9\d \(right\) and 0\.9\d \(down\)", said(report, "camera"))
    assert "camera" in faults(audit([upside_down(episode) for episode in once]))


def test_arms_that_the_camera_sees_predict_the_motion():
    pixels = np.array([[[0, 0], [1, 1]], [[2, 4], [np.nan, np.nan]], [[np.nan, np.nan]] * 2])
    np.testing.assert_array_equal(projected_motion(pixels), [[2, 4], [np.nan, np.nan]])


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
