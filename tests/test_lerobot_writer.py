"""LeRobot data sets are written as the library writes them, and read back as they went."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.data import Episode, lerobot_writer, open_dataset, write_lerobot
from prophet_gym.data.video import read_video

TASKS = ["put the carrot on the plate", "stack the cubes"]
TOP = "observation.images.top"


def make_episode(length: int, seed: int, **changes) -> Episode:
    rng = np.random.default_rng(seed)
    spec = ACTION_SPECS["tabletop"]
    actions = (spec.action_space(length).low + rng.uniform(size=(length, 7)) * 0.05).astype(np.float32)
    start = np.eye(4)[None]
    start[0, 2, 3] = 0.1
    values = {
        "images": rng.integers(0, 256, (length + 1, 24, 32, 3), dtype=np.uint8),
        "actions": actions,
        "action_spec": spec,
        "instruction": TASKS[seed % 2],
        "fps": 10.0,
        "camera": Camera(np.diag([30.3, 30.1, 1]), np.eye(4), 32, 24),
        "eef_pose": np.concatenate([start[None], integrate_poses(start, spec.to_canonical(actions), spec)]),
        "gripper": rng.uniform(size=(length + 1, 1)),
        "success": bool(seed % 2),
        "name": f"seed {seed}",
        "metadata": {"seed": seed},
    }
    return Episode(**(values | changes))


def test_written_sets_read_back(tmp_path):
    written = [make_episode(length, seed) for seed, length in enumerate((4, 7, 2))]
    assert write_lerobot(tmp_path / "set", written, camera="top", lossless=True) == 3
    again = open_dataset(tmp_path / "set")  # it carries its card
    assert again.names == ("seed 0", "seed 1", "seed 2") and again.camera == TOP
    for left, right in zip(again, written, strict=True):
        np.testing.assert_array_equal(left.frames, right.frames)
        np.testing.assert_array_equal(left.actions, right.actions)
        np.testing.assert_allclose(left.eef_pose, right.eef_pose, atol=1e-6)
        np.testing.assert_allclose(left.gripper, right.gripper, atol=1e-6)
        for key in ("action_spec", "instruction", "fps", "success", "name"):
            assert getattr(left, key) == getattr(right, key)
        assert left.camera.to_dict() == right.camera.to_dict()
        assert left.metadata["seed"] == right.metadata["seed"]


def test_written_files_are_those_of_lerobot(tmp_path):
    """Names, keys, columns and types as lerobot 0.4.4 writes them; that library reads our files (checked by hand)."""
    episodes = [make_episode(length, seed) for seed, length in enumerate((4, 7))]
    write_lerobot(tmp_path / "set", episodes, camera="top", robot_type="floating gripper")
    root = tmp_path / "set"
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/prophet_gym.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.top/chunk-000/file-000.mp4",
    }
    info = json.loads((root / "meta" / "info.json").read_text())
    described = {key: info[key] for key in info if key not in ("features",)}
    assert described == {
        "codebase_version": "v3.0",
        "robot_type": "floating gripper",
        "total_episodes": 2,
        "total_frames": 13,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    assert info["features"][TOP]["dtype"] == "video" and info["features"][TOP]["info"]["video.pix_fmt"] == "yuv420p"
    data = pq.read_table(root / "data" / "chunk-000" / "file-000.parquet")
    assert data.schema.field("action").type == pa.list_(pa.float32(), 7)
    assert data.schema.field("observation.state").type == pa.list_(pa.float32(), 8)
    assert data.schema.field("timestamp").type == pa.float32()
    for key in ("frame_index", "episode_index", "index", "task_index"):
        assert data.schema.field(key).type == pa.int64()
    assert data["index"].to_pylist() == list(range(13))
    assert data["frame_index"].to_pylist() == [*range(5), *range(8)]
    assert data["action"][4].as_py()[:6] == [0.0] * 6  # the last row holds still
    listed = pq.read_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert listed[1]["dataset_from_index"] == 5 and listed[1]["dataset_to_index"] == 13
    assert listed[1][f"videos/{TOP}/from_timestamp"] == 0.5 and listed[1][f"videos/{TOP}/to_timestamp"] == 1.3
    assert listed[1]["tasks"] == [TASKS[1]] and np.shape(listed[1][f"stats/{TOP}/mean"]) == (3, 1, 1)
    tasks = pq.read_table(root / "meta" / "tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    stats = json.loads((root / "meta" / "stats.json").read_text())
    every = np.array(data["action"].to_pylist())
    for name, value in {"mean": every.mean(0), "std": every.std(0), "min": every.min(0), "max": every.max(0)}.items():
        np.testing.assert_allclose(stats["action"][name], value, atol=1e-6)
    assert stats["action"]["count"] == [13] and stats[TOP]["count"] == [13]
    pixels = np.concatenate([e.frames for e in episodes]) / 255
    np.testing.assert_allclose(np.squeeze(stats[TOP]["mean"]), pixels.mean((0, 1, 2)), atol=1e-6)
    assert read_video(root / "videos" / TOP / "chunk-000" / "file-000.mp4").shape == (13, 24, 32, 3)


def test_full_files_are_followed_by_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_writer, "VIDEO_MB", 0)
    monkeypatch.setattr(lerobot_writer, "CHUNK_FILES", 2)
    written = [make_episode(3, seed, eef_pose=None, gripper=None, camera=None) for seed in range(3)]
    write_lerobot(tmp_path / "set", written, lossless=True)
    files = sorted(str(path.relative_to(tmp_path / "set" / "data")) for path in tmp_path.rglob("data/*/*.parquet"))
    assert files == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]
    assert len(list(tmp_path.rglob("*.mp4"))) == 3
    for left, right in zip(open_dataset(tmp_path / "set"), written, strict=True):
        np.testing.assert_array_equal(left.frames, right.frames)
        assert left.eef_pose is None and left.camera is None


def test_writing_is_all_or_nothing(tmp_path):
    good = make_episode(3, 0)
    faults = {
        "has fps 5.0; the first, 'seed 0', has 10.0": {"fps": 5.0},
        r"image size \(12, 32\)": {"images": np.zeros((4, 12, 32, 3), np.uint8), "camera": None},
        "known poses False": {"eef_pose": None, "gripper": None},
        "action spec": {"action_spec": replace(ACTION_SPECS["tabletop"], delta="local")},
    }
    for message, changes in faults.items():
        with pytest.raises(ValueError, match=message):
            write_lerobot(tmp_path / "set", [good, make_episode(3, 1, **changes)])
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="12.5 fps; LeRobot holds whole numbers only"):
        write_lerobot(tmp_path / "set", [make_episode(3, 0, fps=12.5)])
    with pytest.raises(ValueError, match="no episode was given"):
        write_lerobot(tmp_path / "set", [])
    write_lerobot(tmp_path / "set", [good])
    with pytest.raises(ValueError, match="exists already"):
        write_lerobot(tmp_path / "set", [good])
    write_lerobot(tmp_path / "set", [good, good], overwrite=True)
    assert len(open_dataset(tmp_path / "set")) == 2
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="also holds notes.txt"):
        write_lerobot(tmp_path / "set", [good], overwrite=True)
    assert len(open_dataset(tmp_path / "set")) == 2
