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

from prophet_gym import rotations
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.data import CARDS, DatasetCard, StateLayout, open_dataset, write_lerobot
from prophet_gym.data.lerobot import LeRobotEpisodes
from prophet_gym.data.video import write_video
from prophet_gym.errors import MissingExtraError

FPS = 5
TASKS = ["put the carrot on the plate", "stack the cubes"]
LENGTHS = (4, 6, 3)
TOP, SIDE = "observation.images.top", "observation.images.side"


def frames_of(episode: int, length: int, camera: str = TOP) -> np.ndarray:
    """Random images, different for every episode, time and camera."""
    return np.random.default_rng((episode, camera == SIDE)).integers(0, 256, (length, 16, 24, 3), dtype=np.uint8)


def rows_of(episode: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states (length, 7) in Bridge conventions."""
    rng = np.random.default_rng((7, episode))
    ends = rng.uniform(-0.05, 0.05, (2, length, 7))
    ends[:, :, 6] = rng.uniform(0, 1, (2, length))
    return ends[0].astype(np.float32), ends[1].astype(np.float32)


def table_of(episode: int, length: int, first: int) -> pa.Table:
    actions, states = rows_of(episode, length)

    def vector(rows: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])

    return pa.table(
        {
            "observation.state": vector(states),
            "action": vector(actions),
            "timestamp": pa.array((np.arange(length) / FPS).astype(np.float32)),
            "frame_index": pa.array(np.arange(length)),
            "episode_index": pa.array(np.full(length, episode)),
            "index": pa.array(np.arange(first, first + length)),
            "task_index": pa.array(np.full(length, episode % 2)),
        }
    )


def info_of(version: str, dtype: str = "video") -> dict:
    def view() -> dict:
        return {"dtype": dtype, "shape": [16, 24, 3], "names": ["height", "width", "channels"]}

    features = {
        "observation.state": {"dtype": "float32", "shape": [7], "names": None},
        "action": {"dtype": "float32", "shape": [7], "names": None},
        TOP: view(),
        **({SIDE: view()} if dtype == "video" else {}),
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("frame_index", "episode_index", "index")},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    joined = version == "v3.0"
    file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    single = "chunk-{episode_chunk:03d}/"
    return {
        "codebase_version": version,
        "robot_type": "widowx",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 1000 if joined else 2,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": f"data/{file}.parquet" if joined else f"data/{single}episode_{{episode_index:06d}}.parquet",
        "video_path": f"videos/{{video_key}}/{file}.mp4"
        if joined
        else f"videos/{single}{{video_key}}/episode_{{episode_index:06d}}.mp4",
        "features": features,
    }


def save(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def save_video(path: Path, frames: np.ndarray, fps: float = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps)


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_v2(root: Path, version: str = "v2.1", lengths: tuple[int, ...] = LENGTHS) -> Path:
    """One file an episode, two episodes a chunk, as v2.1 lays them out."""
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info_of(version)))
    lines(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    listed = [{"episode_index": i, "tasks": [TASKS[i % 2]], "length": n} for i, n in enumerate(lengths)]
    lines(root / "meta" / "episodes.jsonl", listed)
    for i, length in enumerate(lengths):
        chunk = f"chunk-{i // 2:03d}"
        save(root / "data" / chunk / f"episode_{i:06d}.parquet", table_of(i, length, sum(lengths[:i])))
        for camera in (TOP, SIDE):
            path = root / "videos" / chunk / camera / f"episode_{i:06d}.mp4"
            save_video(path, frames_of(i, length, camera))
    return root


def make_v3(root: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """Episodes 0 and 1 share a data file and a video, the rest share the second ones, as v3.0 lays them out."""
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info_of("v3.0")))
    index = pa.table({"task_index": pa.array([0, 1]), "__index_level_0__": pa.array(TASKS)})
    save(root / "meta" / "tasks.parquet", index)
    files = [(0, 1), tuple(range(2, len(lengths)))]
    listed = []
    for number, members in enumerate(files):
        tables = [table_of(i, lengths[i], sum(lengths[:i])) for i in members]
        save(root / "data" / "chunk-000" / f"file-{number:03d}.parquet", pa.concat_tables(tables))
        for camera in (TOP, SIDE):
            frames = np.concatenate([frames_of(i, lengths[i], camera) for i in members])
            save_video(root / "videos" / camera / "chunk-000" / f"file-{number:03d}.mp4", frames)
        start = 0
        for i in members:
            row = {"episode_index": i, "tasks": [TASKS[i % 2]], "length": lengths[i]}
            row |= {"data/chunk_index": 0, "data/file_index": number}
            for camera in (TOP, SIDE):
                times = {"from_timestamp": start / FPS, "to_timestamp": (start + lengths[i]) / FPS}
                place = {"chunk_index": 0, "file_index": number, **times}
                row |= {f"videos/{camera}/{key}": value for key, value in place.items()}
            listed.append(row | {"stats/action/mean": [0.0] * 7})
            start += lengths[i]
    save(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet", pa.Table.from_pylist(listed))
    return root


def make(root: Path, version: str) -> Path:
    return make_v3(root) if version == "v3.0" else make_v2(root, version)


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
