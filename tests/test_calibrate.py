"""A camera from clicks: recovers a known one, says what is missing, and writes data that train with it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.calibrate import Click, calibrate_camera, clicked_points, read_clicks
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder, write_episode
from prophet_gym.registration import ASSETS
from prophet_gym.snapshot import SnapshotSet


@pytest.fixture(scope="module")
def tabletop() -> Camera:
    camera = SnapshotSet.load(ASSETS / "tabletop" / "snapshots")[0].camera
    assert camera is not None
    return camera


def robot_camera(seed: int) -> Camera:
    """Somewhere around a table, looking at it, as cameras beside robots do."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi)
    place = np.array([np.cos(angle), np.sin(angle), rng.uniform(0.4, 1.2)]) * rng.uniform(0.7, 1.3)
    forward = -place / np.linalg.norm(place)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    E = np.eye(4)
    E[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    E[:3, 3] = -E[:3, :3] @ place
    focal = rng.uniform(0.8, 2.0) * 256
    return Camera(np.array([[focal, 0, 127.5], [0, focal, 95.5], [0, 0, 1]]), E, 256, 192)


def workspace(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform((-0.15, -0.15, 0.02), (0.15, 0.15, 0.25), (count, 3))


def error_on(camera: Camera, truth: Camera, points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(project(points, camera) - project(points, truth), axis=1)


@pytest.mark.parametrize("count", [8, 20])
def test_exact_clicks_recover_the_camera(tabletop: Camera, count: int) -> None:
    for seed, truth in enumerate([tabletop, robot_camera(1), robot_camera(2), robot_camera(3)]):
        points = workspace(count, seed)
        result = calibrate_camera(points, project(points, truth), truth.width, truth.height)
        assert error_on(result.camera, truth, workspace(100, 99)).max() < 0.5
        assert result.median <= result.worst < 0.3 and result.errors.shape == (count,)
        if count == 20:
            assert abs(result.camera.K[0, 0] / truth.K[0, 0] - 1) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_noisy_clicks_and_a_slip_come_near(tabletop: Camera, seed: int) -> None:
    truth = tabletop if seed == 0 else robot_camera(seed)
    points = workspace(24, seed)
    clicks = project(points, truth) + np.random.default_rng(seed).normal(0, 1.0, (24, 2))
    result = calibrate_camera(points, clicks, truth.width, truth.height)
    assert np.median(error_on(result.camera, truth, workspace(100, 99))) < 1.2
    assert error_on(result.camera, truth, workspace(100, 99)).max() < 2.5
    clicks[5] += 25.0  # on something else
    slipped = calibrate_camera(points, clicks, truth.width, truth.height)
    assert error_on(slipped.camera, truth, workspace(100, 99)).max() < 3.5
    assert slipped.errors.argmax() == 5 and slipped.worst > 20


def test_the_focal_length_is_called_uncertain_where_clicks_leave_it_open(tabletop: Camera) -> None:
    view = np.eye(4)
    view[2, 3] = 1.0  # looks along z at a plane that stands across
    truth = Camera(np.array([[200.0, 0, 63.5], [0, 200, 63.5], [0, 0, 1]]), view, 128, 128)
    flat = workspace(20, 0) * [1, 1, 0]
    result = calibrate_camera(flat, project(flat, truth), 128, 128)
    assert result.worst < 0.5 and result.focal_uncertainty > 0.2
    deep = workspace(20, 0)
    assert calibrate_camera(deep, project(deep, truth), 128, 128).focal_uncertainty < 0.1


def test_clicks_that_determine_nothing_are_refused(tabletop: Camera) -> None:
    def refused(points: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            calibrate_camera(points, project(points, tabletop), 64, 64)

    points = workspace(10, 0)
    refused(points[:3], "3 points; expected at least 4")
    refused(points[:0].reshape(0, 3), "0 points")
    refused(points[:1].repeat(10, axis=0), "at one place of the world; expected clicks at several poses")
    refused(np.linspace((0, 0, 0.1), (0.1, 0.1, 0.2), 10), "on one line of the world; expected poses that differ")
    for count in (4, 5):  # as many as there must be: a camera that sees them there
        few = calibrate_camera(points[:count], project(points[:count], tabletop), 64, 64)
        assert few.worst < 1.0
    with pytest.raises(ValueError, match="at one place of the image"):
        calibrate_camera(points, np.full((10, 2), 30.0), 64, 64)
    with pytest.raises(ValueError, match=r"points \(10, 2\)"):
        calibrate_camera(points[:, :2], points[:, :2], 64, 64)


@pytest.fixture
def uncalibrated(tabletop: Camera, tmp_path: Path) -> Path:
    """Two episodes without a camera, whose images the camera of Tabletop has taken."""
    for name in ("a", "b"):
        poses = np.tile(np.eye(4), (13, 1, 1, 1))
        poses[:, 0, :3, :3] = cv2.Rodrigues(np.array([np.pi, 0.0, 0.0]))[0]  # the gripper points down
        poses[:, 0, :3, 3] = workspace(13, ord(name))
        episode = Episode(
            np.zeros((13, 64, 64, 3), np.uint8), np.zeros((12, 7)), ACTION_SPECS["tabletop"], "", 10.0,
            eef_pose=poses, gripper=np.ones((13, 1)), name=name,
        )  # fmt: skip
        write_episode(tmp_path / "data" / name, episode)
    return tmp_path / "data"


def true_clicks(data: Path, camera: Camera, offset: np.ndarray) -> list[Click]:
    clicks = []
    for episode in EpisodeFolder(data):
        for frame in range(0, 13, 2):
            pose = episode.eef_pose[frame, 0]
            u, v = project(pose[:3, 3] + pose[:3, :3] @ offset, camera)
            if 0 <= u <= 63 and 0 <= v <= 63:
                clicks.append(Click(episode.name, frame, float(u), float(v)))
    return clicks


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_command_fits_reports_and_applies(
    uncalibrated: Path, tabletop: Camera, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    offset = np.array([0.0, 0.01, 0.03])
    clicks = true_clicks(uncalibrated, tabletop, offset)
    assert len(clicks) >= 8
    file, out, copy = (
        uncalibrated.parent / f"clicks.{suffix}",
        uncalibrated.parent / "c.json",
        uncalibrated.parent / "d",
    )
    if suffix == "csv":
        rows = [f"{c.episode},{c.frame},{c.u},{c.v}" for c in clicks]
        file.write_text("\n".join(["episode,frame,u,v", *rows]) + "\n")
    else:
        file.write_text(json.dumps([vars(click) for click in clicks]))
    assert read_clicks(file) == clicks
    words = [str(uncalibrated), "--clicks", str(file), "--out", str(out), "--apply", str(copy)]
    monkeypatch.setattr(sys, "argv", ["prophet", "calibrate", *words, "--offset", *map(str, offset)])
    main()
    shown = capsys.readouterr().out
    assert f"{len(clicks)} clicks: median 0.0" in shown and "worst 0." in shown
    camera = Camera.from_dict(json.loads(out.read_text()))
    assert error_on(camera, tabletop, workspace(100, 99)).max() < 0.5
    before, after = EpisodeFolder(uncalibrated), EpisodeFolder(copy)
    assert after.names == before.names
    for old, new in zip(before, after, strict=True):
        assert old.camera is None and np.array_equal(new.camera.E, camera.E) and np.array_equal(new.camera.K, camera.K)
        assert np.array_equal(new.frames, old.frames) and np.array_equal(new.eef_pose, old.eef_pose)
    with pytest.raises(SystemExit):
        main()
    assert "exists already" in capsys.readouterr().err


def test_clicks_that_fit_no_recording_are_refused(uncalibrated: Path, tmp_path: Path) -> None:
    episodes = EpisodeFolder(uncalibrated)

    def refused(click: Click, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            clicked_points([click], episodes)

    refused(Click("c", 0, 1, 1), "no episode 'c'; expected one of a, b")
    refused(Click("a", 13, 1, 1), "images 0 to 12")
    refused(Click("a", 0, 1, 1, effector=1), "1 end-effector")
    refused(Click("a", 0, 64, 1), "outside of the image of 64x64")
    bare = replace(episodes[0], eef_pose=None, gripper=None)
    write_episode(tmp_path / "bare" / "a", bare)
    with pytest.raises(ValueError, match="no measured poses"):
        clicked_points([Click("a", 0, 1, 1)], EpisodeFolder(tmp_path / "bare"))
    for text, message in (("episode,frame,u\na,0,1\n", "expected episode, frame, u, v"), ("e", "0 points|expected")):
        (tmp_path / "clicks.csv").write_text(text)
        if text != "e":
            with pytest.raises(ValueError, match=message):
                read_clicks(tmp_path / "clicks.csv")
    (tmp_path / "clicks.json").write_text('[{"episode": "a", "frame": 0, "u": NaN, "v": 1}]')
    with pytest.raises(ValueError, match="finite pixels"):
        read_clicks(tmp_path / "clicks.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_clicks(tmp_path / "absent.csv")


@pytest.mark.render
def test_recorded_tabletop_episodes_give_their_camera_back(tmp_path: Path) -> None:
    from prophet_gym.data.record import record

    record(tmp_path / "data", 2, seed=3, steps=30, workers=1)
    episodes = EpisodeFolder(tmp_path / "data")
    clicks, rest = [], []
    for episode in episodes:
        truth = episode.camera
        for frame in range(31):
            u, v = project(episode.eef_pose[frame, 0, :3, 3], truth)
            if 0 <= u <= 63 and 0 <= v <= 63:
                (clicks if frame % 4 == 0 else rest).append(Click(episode.name, frame, float(u), float(v)))
    points, pixels, (height, width) = clicked_points(clicks, episodes)
    result = calibrate_camera(points, pixels, width, height)
    others, seen, _ = clicked_points(rest, episodes)
    assert len(clicks) >= 8 and np.linalg.norm(project(others, result.camera) - seen, axis=1).max() < 0.5
    noisy = calibrate_camera(points, pixels + np.random.default_rng(0).normal(0, 1, pixels.shape), width, height)
    assert np.linalg.norm(project(others, noisy.camera) - seen, axis=1).max() < 2.5
