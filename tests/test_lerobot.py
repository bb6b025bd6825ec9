"""LeRobot data sets of both layouts are read as documented, written as the library does, and refused with a fix."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_sets import (
    LENGTHS,
    SIDE,
    TASKS,
    TOP,
    frames_of,
    info_of,
    lines,
    make,
    make_v2,
    make_v3,
    rows_of,
    save,
    save_video,
)
from squares import square_episode

from prophet_gym import rotations
from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.data import CARDS, DatasetCard, StateLayout, open_dataset, write_lerobot
from prophet_gym.data.lerobot import LeRobotEpisodes
from prophet_gym.errors import MissingExtraError


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_episodes_come_with_their_own_rows_and_frames(tmp_path, version):
    episodes = open_dataset(make(tmp_path / "set", version), card="bridge")
    assert isinstance(episodes, LeRobotEpisodes)
    assert episodes.names == ("episode_000000", "episode_000001", "episode_000002")
    assert [len(e) for e in episodes[:]] == [n - 1 for n in LENGTHS]
    for i, length in enumerate(LENGTHS):
        episode = episodes[i]
        actions, states = rows_of(i, length)
        assert callable(episode.images)  # nothing decoded yet
        np.testing.assert_array_equal(episode.frames, frames_of(i, length))
        np.testing.assert_array_equal(episode.actions, actions[:-1])  # the last one leads to no image
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, 3], states[:, :3])
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, :3], rotations.euler_to_matrix(states[:, 3:6]))
        np.testing.assert_allclose(episode.gripper[:, 0], states[:, 6])
        assert (episode.instruction, episode.fps) == (TASKS[i % 2], 5.0)
        assert episode.action_spec == replace(ACTION_SPECS["bridge"], control_hz=5.0)
        assert episode.metadata == {"dataset": "bridge", "camera_name": TOP}
    assert episodes[-1].name == "episode_000002"
    with pytest.raises(IndexError):
        episodes[3]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_cameras_are_chosen_by_name(tmp_path, version):
    root = make(tmp_path / "set", version)
    for camera in ("side", SIDE):
        np.testing.assert_array_equal(open_dataset(root, card="bridge", camera=camera)[1].frames, frames_of(1, 6, SIDE))
    preferred = replace(CARDS["bridge"], cameras=("wrist", "side"))
    assert open_dataset(root, card=preferred).camera == SIDE
    with pytest.raises(ValueError, match=r"no camera 'sied'; expected one of .*Did you mean 'side'"):
        open_dataset(root, card="bridge", camera="sied")


def test_images_inside_parquet(tmp_path):
    root = make_v2(tmp_path / "set")
    (root / "meta" / "info.json").write_text(json.dumps(info_of("v2.1", "image")))
    path = root / "data" / "chunk-000" / "episode_000001.parquet"
    pictures = [cv2.imencode(".png", cv2.cvtColor(f, cv2.COLOR_RGB2BGR))[1].tobytes() for f in frames_of(1, 6)]
    cells = pa.array([{"bytes": picture, "path": None} for picture in pictures])
    pq.write_table(pq.read_table(path).append_column(TOP, cells), path)
    np.testing.assert_array_equal(open_dataset(root, card="bridge")[1].frames, frames_of(1, 6))


def test_images_beside_parquet_that_are_missing_are_named(tmp_path):
    root = make_v2(tmp_path / "set")
    (root / "meta" / "info.json").write_text(json.dumps(info_of("v2.1", "image")))
    for i, length in enumerate(LENGTHS):
        cells = [{"bytes": None, "path": f"images/{i}_{t}.png"} for t in range(length)]
        for cell, frame in zip(cells, frames_of(i, length), strict=True):
            (root / "images").mkdir(exist_ok=True)
            cv2.imwrite(str(root / cell["path"]), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        path = root / "data" / f"chunk-{i // 2:03d}" / f"episode_{i:06d}.parquet"
        if i == 2:
            cells[1] = {"bytes": None, "path": None}
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pq.read_table(path).append_column(TOP, pa.array(cells, kind)), path)
    (root / "images" / "1_3.png").unlink()
    episodes = open_dataset(root, card="bridge")
    np.testing.assert_array_equal(episodes[0].frames, frames_of(0, LENGTHS[0]))
    with pytest.raises(
        ValueError, match="episode 'episode_000001', row 3: the image cannot be read .*1_3.png.*restore"
    ):
        episodes[1].frames  # noqa: B018
    with pytest.raises(ValueError, match="episode 'episode_000002', row 1: the image is empty; restore"):
        episodes[2].frames  # noqa: B018
    assert open_dataset(root, card="bridge", on_error="skip").names == ("episode_000000",)


def test_damaged_lists_of_episodes_and_tasks_are_named(tmp_path):
    root = make_v3(tmp_path / "joined")
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    rows, key = pq.read_table(path).to_pylist(), f"videos/{TOP}/from_timestamp"
    rows[1][key] = None
    save(path, pa.Table.from_pylist(rows))
    with pytest.raises(ValueError, match=f"'episode_000001': meta/episodes has {key} None; expected seconds: restore"):
        open_dataset(root, card="bridge")[1].frames  # noqa: B018
    save(path, pq.read_table(path).drop_columns([key]))
    with pytest.raises(ValueError, match="none of 3 episodes can be read. The first: .*from_timestamp None"):
        open_dataset(root, card="bridge", on_error="skip")
    root = make_v2(tmp_path / "single")
    lines(root / "meta" / "tasks.jsonl", [{"task_index": 0}])
    with pytest.raises(ValueError, match=r"tasks.jsonl: a line lacks task_index or task \('task'\); restore it"):
        open_dataset(root, card="bridge")


def test_rows_of_different_widths_are_named(tmp_path):
    root = make_v2(tmp_path / "set")
    path = root / "data" / "chunk-000" / "episode_000000.parquet"
    table = pq.read_table(path)
    ragged = pa.array([[0.0] * 7, None, [0.0] * 6, [0.0] * 7])
    pq.write_table(table.set_column(table.column_names.index("action"), "action", ragged), path)
    with pytest.raises(ValueError, match="'episode_000000': 'action' holds no rows of as many numbers each"):
        open_dataset(root, card="bridge")[0]


def test_a_camera_that_is_not_listed_is_named(tmp_path):
    write_lerobot(tmp_path / "set", [square_episode(0, camera=Camera(np.diag([20.0, 20.0, 1.0]), np.eye(4), 16, 16))])
    path = tmp_path / "set" / "meta" / "prophet_gym.json"
    assert open_dataset(tmp_path / "set")[0].camera is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cameras": []}))
    with pytest.raises(ValueError, match="prophet_gym.json lists 0 cameras, and not number 0; restore it"):
        open_dataset(tmp_path / "set")[0]


def test_actions_can_come_from_measured_poses(tmp_path):
    """Whatever the frame of the deltas, integrating them leads back along the measured poses."""
    root = make(tmp_path / "set", "v3.0")
    for name in ("agibot", "bridge", "droid"):  # local, difference, servo
        spec = replace(ACTION_SPECS[name], num_effectors=1)
        card = DatasetCard("own", action_spec=spec, actions_from="poses", state=(StateLayout(),))
        episode = open_dataset(root, card=card)[1]
        led = integrate_poses(episode.eef_pose[0], episode.canonical_actions, episode.action_spec)
        np.testing.assert_allclose(led, episode.eef_pose[1:], atol=1e-6)
        np.testing.assert_allclose(episode.canonical_actions[:, 0, 6], episode.gripper[1:, 0], atol=1e-6)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_sets_written_by_lerobot_itself(tmp_path, version):
    """Made by lerobot 0.3.3 and 0.4.4: AV1 video, grey level 20 + 10 t + 60 episode; see fixtures/README.md."""
    with ZipFile(Path(__file__).parent / "fixtures" / f"lerobot_{version}.zip") as archive:
        archive.extractall(tmp_path)
    rng = np.random.default_rng(0)
    episodes = open_dataset(tmp_path, card="bridge")
    assert len(episodes) == 3 and episodes.camera == TOP
    for i, length in enumerate((5, 8, 3)):
        actions = rng.uniform(-0.05, 0.05, (length, 7)).astype(np.float32)
        states = rng.uniform(0, 0.9, (length, 7)).astype(np.float32)
        episode = episodes[i]
        np.testing.assert_array_equal(episode.actions, actions[:-1])
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, 3], states[:, :3])
        grey = 20 + 10 * np.arange(length) + 60 * i
        assert np.abs(episode.frames - grey[:, None, None, None]).max() <= 1
        assert (episode.instruction, episode.fps) == (f"task {i % 2}", 5.0)


# Bad input


def change_info(root: Path, **changes) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_versions_are_refused(tmp_path):
    root = make(tmp_path / "set", "v2.1")
    for version in ("v1.6", "v3.1", "v4.0", None):
        change_info(root, codebase_version=version)
        with pytest.raises(ValueError, match=rf"info.json has codebase_version {version!r}; expected one of.*Convert"):
            open_dataset(root, card="bridge")


def test_a_card_is_needed_and_must_fit(tmp_path):
    root = make(tmp_path / "set", "v3.0")
    with pytest.raises(ValueError, match="does not say what the numbers mean.*give card='bridge'"):
        open_dataset(root)
    with pytest.raises(ValueError, match="no dataset card 'brigde'.*Did you mean 'bridge'"):
        open_dataset(root, card="brigde")
    with pytest.raises(ValueError, match="card 'bc_z' states no action_spec"):
        open_dataset(root, card="bc_z")[0]
    two = DatasetCard("own", action_spec=ACTION_SPECS["agibot"])
    with pytest.raises(ValueError, match="episode 'episode_000000': actions have 7 numbers; card 'own' expects 14"):
        open_dataset(root, card=two)[0]
    with pytest.raises(ValueError, match="no feature 'actoin'.*Did you mean 'action'"):
        open_dataset(root, card=replace(CARDS["bridge"], action_keys=("actoin",)))[0]
    swapped = replace(CARDS["bridge"], state=(StateLayout(gripper=(6,), closed=0.0, open=0.04),))
    with pytest.raises(ValueError, match="measured gripper reads .* expected 0 .closed. to 0.04 .open."):
        open_dataset(root, card=swapped)[0]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_missing_and_truncated_videos_are_named(tmp_path, version):
    root = make(tmp_path / "set", version)
    video = next(path for path in sorted(root.rglob("*.mp4")) if TOP in str(path))
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    episodes = open_dataset(root, card="bridge")
    with pytest.raises(ValueError, match=rf"episode 'episode_000000': .*{video.name} cannot be decoded.*restore"):
        episodes[0].frames  # noqa: B018
    video.unlink()
    with pytest.raises(ValueError, match=rf"episode 'episode_000000': the video .*{video.name} is missing; restore"):
        episodes[0].frames  # noqa: B018
    assert episodes[2].frames.shape == (3, 16, 24, 3)


def test_short_and_foreign_videos_are_refused(tmp_path):
    root = make_v2(tmp_path / "set")
    folder = root / "videos" / "chunk-000" / TOP
    save_video(folder / "episode_000000.mp4", frames_of(0, 3))
    save_video(folder / "episode_000001.mp4", frames_of(1, 12), fps=10)
    episodes = open_dataset(root, card="bridge")
    with pytest.raises(
        ValueError, match="ends at 0.400 s, but the episode lasts until 0.600 s; the video is truncated"
    ):
        episodes[0].frames  # noqa: B018
    np.testing.assert_array_equal(episodes[1].frames, frames_of(1, 12)[::2])  # 10 Hz holds every 5 Hz time
    save_video(folder / "episode_000001.mp4", frames_of(1, 6), fps=4)
    with pytest.raises(ValueError, match=r"no frame at 0.\d+ s .*expected one every 0.2000 s. .*another frame rate"):
        episodes[1].frames  # noqa: B018


def test_nan_actions_and_mixed_rates_are_named(tmp_path):
    root = make_v2(tmp_path / "set")
    path = root / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(path)
    actions = rows_of(1, 6)[0]
    actions[2, 3] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    episodes = open_dataset(root, card="bridge")
    message = (
        r"episode_000001.parquet, episode 'episode_000001': action row 2, number 3 is nan; 1 of 42 .*Repair the log"
    )
    with pytest.raises(ValueError, match=message):
        episodes[1]
    times = pa.array((np.arange(6) / 10).astype(np.float32))
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), path)
    with pytest.raises(ValueError, match="'episode_000001': rows are 0.1000 to 0.1000 s apart; info.json says 5 fps"):
        episodes[1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="episode_000001.parquet, episode 'episode_000001': cannot be read"):
        episodes[1]
    path.unlink()
    with pytest.raises(ValueError, match="episode 'episode_000001': .* is missing"):
        episodes[1]
    pq.write_table(table.slice(0, 4), path)
    with pytest.raises(ValueError, match="4 rows, but meta/episodes says 6"):
        episodes[1]


def test_one_bad_episode_of_a_hundred_is_skipped_and_listed(tmp_path):
    root = make_v3(tmp_path / "set", (2,) * 100)
    path = root / "data" / "chunk-000" / "file-001.parquet"
    table = pq.read_table(path)
    values = np.array(table["action"].to_pylist(), np.float32)
    values[2 * 40 - 4, 0] = np.inf  # a row of episode 40: the file begins with episode 2
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(ValueError, match="episode_000040.*inf"):
        open_dataset(root, card="bridge")[40]
    sound = open_dataset(root, card="bridge", on_error="skip")
    assert len(sound) == 99 and "episode_000040" not in sound.names
    (bad,) = sound.skipped
    assert bad.name == "episode_000040" and "file-001.parquet" in bad.reason and "inf" in bad.reason
    np.testing.assert_array_equal(sound[40].frames, frames_of(41, 2))
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected 'raise' or 'skip'"):
        open_dataset(root, card="bridge", on_error="ignore")


def test_a_set_without_a_sound_episode_is_an_error(tmp_path):
    root = make_v2(tmp_path / "set")
    for path in root.rglob("*.mp4"):
        path.unlink()
    with pytest.raises(ValueError, match="none of 3 episodes can be read. The first: .*is missing"):
        open_dataset(root, card="bridge", on_error="skip")


def test_damaged_metadata_are_named(tmp_path):
    root = make(tmp_path / "set", "v3.0")
    for name in ("episodes/chunk-000/file-000.parquet", "tasks.parquet", "info.json"):
        path = root / "meta" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{path.name}.* cannot be read"):
            open_dataset(root, card="bridge")
        path.write_bytes(whole)
    change_info(root, fps=0)
    with pytest.raises(ValueError, match="lacks a positive fps"):
        open_dataset(root, card="bridge")


def test_without_pyarrow_the_pip_line_is_shown(tmp_path, monkeypatch):
    root = make(tmp_path / "set", "v2.1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r'pip install "prophet-gym\[data\]"'):
        open_dataset(root, card="bridge")
    with pytest.raises(MissingExtraError, match=r"writing LeRobot data sets needs pyarrow"):
        write_lerobot(tmp_path / "new", [])


def test_unknown_folders_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="is no file or folder; expected a folder with meta/info.json"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no data set that is known here"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="format 'lerobot', which has no splits"):
        open_dataset(make(tmp_path / "set", "v2.1"), card="bridge", split="val")
