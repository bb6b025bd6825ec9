"""Episodes of any length and size become clips of one: windows, and what training makes of them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from squares import square_episode

from prophet_gym.action_frames import Camera, project
from prophet_gym.data import Episode, EpisodeFolder, write_episode, write_lerobot
from prophet_gym.data.windows import EpisodeWindows
from prophet_gym.training import clips as clips_module
from prophet_gym.training.clips import ClipSource, load_clips

CAMERA = Camera(np.array([[20.0, 0, 7], [0, 20, 8], [0, 0, 1]]), np.eye(4), 16, 16)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Lengths 7, 12 and 3."""
    return [
        square_episode(
            i, length, name=name, camera=CAMERA, labels={"block_px": np.arange(2.0 * length + 2).reshape(-1, 2)}
        )
        for i, (length, name) in enumerate(zip((7, 12, 3), "abc", strict=True))
    ]


def test_windows_cover_every_command_and_end_with_the_episode(episodes: list[Episode]) -> None:
    windows = EpisodeWindows(episodes, 5)
    assert windows.names == ("a@0", "a@2", "b@0", "b@2", "b@4", "b@6", "b@7") and windows.left_out == ("c",)
    window, whole = windows[3], episodes[1]
    assert len(window) == 5 and window.name == "b@2" and window.instruction == whole.instruction
    np.testing.assert_array_equal(window.actions, whole.actions[2:7])
    np.testing.assert_array_equal(window.frames, whole.frames[2:8])
    np.testing.assert_array_equal(window.eef_pose, whole.eef_pose[2:8])
    np.testing.assert_array_equal(window.labels["block_px"], whole.labels["block_px"][2:8])
    assert [len(w) for w in windows[5:]] == [5, 5]
    assert EpisodeWindows(episodes, 3, stride=9).names == ("a@0", "a@4", "b@0", "b@9", "c@0")
    apart = EpisodeWindows(episodes, 3, stride=3, cover=False)
    assert apart.names == ("a@0", "a@3", "b@0", "b@3", "b@6", "b@9", "c@0")


def test_images_cameras_and_labels_scale_together(episodes: list[Episode]) -> None:
    whole = episodes[0]
    window = EpisodeWindows([whole], 7, image_size=(32, 96))[0]
    assert window.frames.shape == (8, 32, 96, 3)
    height, width = whole.frames.shape[1:3]
    before, after = (project(e.eef_pose[:, 0, :3, 3], e.camera) for e in (whole, window))
    factor = np.array([96 / width, 32 / height])
    np.testing.assert_allclose(after, (before + 0.5) * factor - 0.5, atol=1e-6)
    np.testing.assert_allclose(window.labels["block_px"], (whole.labels["block_px"] + 0.5) * factor - 0.5)


@pytest.mark.parametrize("size", [(32, 48), (32, 16)])
def test_padding_and_cropping_move_cameras_and_labels_alike(episodes: list[Episode], size: tuple[int, int]) -> None:
    """Black borders of 8 columns to each side, or 8 columns cut off."""
    whole = episodes[0]
    whole = replace(whole, labels={"hand_px": project(whole.eef_pose[:, 0, :3, 3], whole.camera)})
    window = EpisodeWindows([whole], 7, image_size=size, fit="pad_or_crop")[0]
    seen = project(window.eef_pose[:, 0, :3, 3], window.camera)
    np.testing.assert_allclose(window.labels["hand_px"], seen, atol=1e-6)
    np.testing.assert_allclose(seen, (whole.labels["hand_px"] + 0.5) * 2 - 0.5 + [(size[1] - 32) / 2, 0], atol=1e-6)
    assert (window.frames[:, :, :8] == 0).all() == (size[1] == 48)


def test_windows_of_an_episode_share_one_decoding(episodes: list[Episode]) -> None:
    decoded = []

    def decode() -> np.ndarray:
        decoded.append(1)
        return episodes[1].frames

    windows = EpisodeWindows([replace(episodes[1], images=decode)], 4)
    assert len(windows) == 5 and not decoded
    assert all(window.frames.shape[0] == 5 for window in windows) and len(decoded) == 1


def test_windows_that_cannot_be_are_refused(episodes: list[Episode]) -> None:
    with pytest.raises(ValueError, match="none of 3 episodes has 20 commands, the longest 12; use shorter windows"):
        EpisodeWindows(episodes, 20)
    for length, stride in ((0, 1), (5, 0)):
        with pytest.raises(ValueError, match=f"windows of {length} commands every {stride}; expected at least 1"):
            EpisodeWindows(episodes, length, stride=stride)


def test_clips_come_from_data_sets_of_any_format(
    episodes: list[Episode], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ClipSource(clip_length=6)
    for episode in episodes:
        write_episode(tmp_path / "folder" / episode.name, episode)
    write_lerobot(tmp_path / "lerobot", episodes, lossless=True)
    with caplog.at_level(logging.WARNING):
        clips = load_clips(tmp_path / "folder", tmp_path / "cache-a", source=source)
    assert "1 of 3 episodes are shorter than 6 commands and left out: c" in caplog.text
    other = load_clips(tmp_path / "lerobot", tmp_path / "cache-b", source=source)
    assert clips.frames.shape[:2] == (5, 7) and clips.content != other.content
    np.testing.assert_array_equal(clips.frames, other.frames)
    np.testing.assert_allclose(clips.actions, other.actions, atol=1e-6)
    np.testing.assert_array_equal(clips.actions[1], episodes[0].canonical_actions[1:7])
    with pytest.raises(ValueError, match="train one data set at a time"):  # of several lengths
        load_clips(tmp_path / "folder", tmp_path / "cache-c")


def test_the_cache_follows_files_and_source(episodes: list[Episode], tmp_path: Path) -> None:
    write_episode(tmp_path / "folder" / "a", episodes[0])
    for length in (3, 4, 4):
        clips = load_clips(tmp_path / "folder", tmp_path / "cache", source=ClipSource(clip_length=length))
        assert clips.actions.shape[1] == length
    write_episode(tmp_path / "folder" / "b", episodes[1])
    assert len(load_clips(tmp_path / "folder", tmp_path / "cache", source=ClipSource(clip_length=4))) > len(clips)


def test_runs_on_other_data_share_a_cache_without_touching_each_others_clips(
    episodes: list[Episode], tmp_path: Path
) -> None:
    for name, episode in (("long", episodes[1]), ("short", episodes[0])):
        write_episode(tmp_path / name / "a", episode)
    first = load_clips(tmp_path / "long", tmp_path / "cache")
    kept = {name: getattr(first, name).copy() for name in ("frames", "actions")}
    second = load_clips(tmp_path / "short", tmp_path / "cache")
    assert second.actions.shape != first.actions.shape
    for name, values in kept.items():  # memory-mapped: pages that were overwritten would change, or end the process
        np.testing.assert_array_equal(getattr(first, name), values)


def test_runs_on_the_same_data_decode_it_once(
    episodes: list[Episode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_episode(tmp_path / "data" / "a", episodes[0])
    decode, calls = clips_module._decode, []

    def slow(*args: object) -> None:
        calls.append(1)
        time.sleep(0.2)
        decode(*args)

    monkeypatch.setattr(clips_module, "_decode", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: load_clips(tmp_path / "data", tmp_path / "cache"), range(3)))
    assert len(calls) == 1
    for clips in found:
        np.testing.assert_array_equal(clips.frames[0], episodes[0].frames)


def test_labels_in_pixels_cost_one_decoding_more(episodes: list[Episode]) -> None:
    decoded = []

    class Counted(list):
        def __getitem__(self, index):
            def decode() -> np.ndarray:
                decoded.append(1)
                return episodes[1].frames

            px = np.zeros((len(episodes[1]) + 1, 2))
            return replace(episodes[1], images=decode, labels={"block_px": px})

    windows = EpisodeWindows(Counted([None]), 4, image_size=(16, 16))
    assert len(windows) == 5 and all(window.frames.shape[1:3] == (16, 16) for window in windows)
    assert len(decoded) == 2


@pytest.mark.data
def test_real_recordings_become_clips(recordings: Path, tmp_path: Path) -> None:
    clips = load_clips(
        recordings / "bridge", tmp_path / "cache", source=ClipSource(clip_length=20, image_size=(64, 64))
    )
    assert clips.frames.shape[1:] == (21, 64, 64, 3) and clips.drawn is None and np.isnan(clips.effector_px).all()
    first = EpisodeFolder(recordings / "bridge")[0]
    np.testing.assert_allclose(clips.actions[0], first.canonical_actions[:20], atol=1e-6)
    assert np.abs(clips.frames[0, 0].mean(axis=(0, 1)) - first.frames[0].mean(axis=(0, 1))).max() < 1
