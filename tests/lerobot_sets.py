"""Small LeRobot data sets of both layouts, written as the library does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prophet_gym.data.video import write_video

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
