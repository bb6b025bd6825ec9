"""Episodes written as a LeRobotDataset v3.0: the files, columns and metadata that lerobot 0.4 writes and reads.

Rows are images: the last one, which no action follows, gets a command that holds still. What the format does not hold
(action spec, names, success, calibration) goes to ``meta/prophet_gym.json``, which lerobot ignores and our reader uses.
Labels and simulator states are not kept: write a folder of episodes where they matter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prophet_gym.actions import state_vector
from prophet_gym.atomic import atomic_folder
from prophet_gym.data.cards import DatasetCard
from prophet_gym.data.columns import StateLayout
from prophet_gym.data.episode import Episode
from prophet_gym.data.lerobot import OWN_FILE
from prophet_gym.data.lerobot_stats import aggregate, image_stats, row_stats
from prophet_gym.data.sequence import need_extra
from prophet_gym.data.video import VideoWriter
from prophet_gym.strict_json import to_json

CHUNK_FILES, DATA_MB, VIDEO_MB = 1000, 100, 200
"""Limits of the format: files in a folder, megabytes of a data file and of a video."""
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA, _VIDEO = f"data/{_FILE}.parquet", "videos/{video_key}/" + _FILE + ".mp4"
_POSE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper_open", "pad")
_MOVE = ("dx", "dy", "dz", "rotation_x", "rotation_y", "rotation_z", "gripper")


def write_lerobot(
    root: str | os.PathLike[str],
    episodes: Iterable[Episode],
    *,
    camera: str = "image",
    robot_type: str | None = None,
    lossless: bool = False,
    overwrite: bool = False,
) -> int:
    """Write episodes to a new folder, all or nothing; one is in memory at a time.

    Args:
        root: Folder of the set.
        episodes: What to write; all share action spec, rate, image size and whether poses are known.
        camera: Name of the camera; the feature becomes ``observation.images.<camera>``.
        robot_type: Name of the robot, for ``info.json``.
        lossless: Keep every pixel (H.264 in RGB); by default YUV 4:2:0 at CRF 18, even sizes only.
        overwrite: Replace an existing set.

    Returns:
        Number of episodes.

    Raises:
        ValueError: If the folder exists, or holds more than a set to replace, there is no episode, or one differs from
            the first; it is named.
        MissingExtraError: pyarrow is not installed.
    """
    need_extra("pyarrow.parquet", "writing LeRobot data sets")
    with atomic_folder(root, overwrite=overwrite, contents=("meta", "data", "videos")) as target:
        writer: _Writer | None = None
        try:
            for episode in episodes:
                if writer is None:
                    writer = _Writer(target, Path(root).name, episode, f"observation.images.{camera}", lossless)
                writer.add(episode)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise ValueError(f"no episode was given to write to {root}; expected at least one")
        writer.write_metadata(robot_type)
        return len(writer.rows)


class _Place:
    """Chunk and file index of the file that is written now."""

    def __init__(self) -> None:
        self.chunk_index = self.file_index = 0

    def advance(self) -> None:
        self.file_index += 1
        if self.file_index == CHUNK_FILES:
            self.chunk_index, self.file_index = self.chunk_index + 1, 0

    def format(self, template: str, **keys: str) -> str:
        return template.format(chunk_index=self.chunk_index, file_index=self.file_index, **keys)


class _Writer:
    """State of one set while it is written."""

    def __init__(self, root: Path, name: str, first: Episode, key: str, lossless: bool) -> None:
        if first.fps != int(first.fps):
            raise ValueError(
                f"episode {first.name!r} has {first.fps} fps; LeRobot holds whole numbers only. Resample it"
            )
        self.root, self.name, self.first, self.key, self.lossless = root, name, first, key, lossless
        self.size = first.frames.shape[1:3]
        self.features = _features(first, key, self.size)
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.stats: list[Mapping[str, Mapping[str, np.ndarray]]] = []
        self.own: list[dict[str, Any]] = []
        self.cameras: list[dict[str, Any]] = []
        self.total = self.video_frames = 0
        self.data, self.movie = _Place(), _Place()
        self._table: Any = None
        self._video: VideoWriter | None = None

    def add(self, episode: Episode) -> None:
        """Append one episode."""
        self._check(episode)
        index, count = len(self.rows), len(episode) + 1
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        columns: dict[str, np.ndarray] = {}
        if episode.eef_pose is not None and episode.gripper is not None:
            columns["observation.state"] = state_vector(episode.eef_pose, episode.gripper)
        columns |= {
            "action": np.concatenate([episode.actions, _hold(episode)]),
            "timestamp": (np.arange(count) / episode.fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, index),
            "index": np.arange(self.total, self.total + count),
            "task_index": np.full(count, task),
        }
        self._write_rows(columns)
        start = self._write_frames(episode)
        stats = {key: row_stats(value) for key, value in columns.items()} | {self.key: image_stats(episode.frames)}
        video = f"videos/{self.key}/"
        self.rows.append(
            {
                "episode_index": index,
                "tasks": [episode.instruction],
                "length": count,
                "data/chunk_index": self.data.chunk_index,
                "data/file_index": self.data.file_index,
                "dataset_from_index": self.total,
                "dataset_to_index": self.total + count,
                video + "chunk_index": self.movie.chunk_index,
                video + "file_index": self.movie.file_index,
                video + "from_timestamp": start / episode.fps,
                video + "to_timestamp": (start + count) / episode.fps,
                **{f"stats/{k}/{name}": v.tolist() for k, values in stats.items() for name, v in values.items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self.stats.append(stats)
        self.own.append(
            {
                "name": episode.name or f"episode_{index:06d}",
                "success": episode.success,
                "camera": self._camera_index(episode),
                "metadata": dict(episode.metadata),
            }
        )
        self.total += count

    def close(self) -> None:
        """Finish the open files."""
        if self._table is not None:
            self._table.close()
        if self._video is not None:
            self._video.close()
        self._table = self._video = None

    def write_metadata(self, robot_type: str | None) -> None:
        """Write ``meta/``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        meta = self.root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(_task_table(list(self.tasks)), meta / "tasks.parquet")
        stats = aggregate(self.stats)
        values = {key: {name: v.tolist() for name, v in value.items()} for key, value in stats.items()}
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": len(self.rows),
            "total_frames": self.total,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self.first.fps),
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": _DATA,
            "video_path": _VIDEO,
            "features": self._described_features(),
        }
        card = DatasetCard(
            self.name,
            action_spec=self.first.action_spec,
            resolution=self.size,
            control_hz=float(self.first.fps),
            state=_layout(self.first),
            source="prophet_gym.data.write_lerobot",
        )
        own = {"card": card.to_dict(), "cameras": self.cameras, "episodes": self.own}
        for path, value in ((meta / "info.json", info), (meta / "stats.json", values), (self.root / OWN_FILE, own)):
            path.write_text(to_json(value, indent=4), encoding="utf-8")

    def _check(self, episode: Episode) -> None:
        first, size = self.first, episode.frames.shape[1:3]
        pairs = {
            "fps": (episode.fps, first.fps),
            "image size": (size, self.size),
            "action spec": (episode.action_spec, first.action_spec),
            "known poses": (episode.eef_pose is not None, first.eef_pose is not None),
        }
        for what, (got, expected) in pairs.items():
            if got != expected:
                raise ValueError(
                    f"episode {episode.name!r} has {what} {got}; the first, {first.name!r}, has {expected}. A LeRobot "
                    "set holds one: write two sets, or convert the episode"
                )

    def _write_rows(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append the rows as one row group; a new file where the old one is full."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = {
            key: pa.array(value)
            if value.ndim == 1
            else pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])
            for key, value in columns.items()
        }
        table = pa.table(arrays)
        path = self.root / self.data.format(_DATA)
        if self._table is not None and path.stat().st_size >= DATA_MB * 2**20:
            self._table.close()
            self._table = None
            self.data.advance()
            path = self.root / self.data.format(_DATA)
        if self._table is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._table.write_table(table)

    def _write_frames(self, episode: Episode) -> int:
        """Append the frames to the open video, or to a new one where it is full; return the first one's place."""
        if self._video is not None and self._video.path.stat().st_size >= VIDEO_MB * 2**20:
            self._video.close()
            self._video = None
            self.movie.advance()
        if self._video is None:
            path = self.root / self.movie.format(_VIDEO, video_key=self.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            # A key frame every second frame, as lerobot's own videos have: reading one frame decodes at most two.
            self._video = VideoWriter(path, self.size, episode.fps, lossless=self.lossless, key_frame_every=2)
            self.video_frames = 0
        start = self.video_frames
        for i, frame in enumerate(episode.frames):
            self._video.add(frame, key_frame=i == 0)
        self.video_frames += len(episode.frames)
        return start

    def _camera_index(self, episode: Episode) -> int | None:
        if episode.camera is None:
            return None
        camera = episode.camera.to_dict()
        if camera not in self.cameras:
            self.cameras.append(camera)
        return self.cameras.index(camera)

    def _described_features(self) -> dict[str, Any]:
        """Features with the facts of the video, under the names that lerobot gives them."""
        facts = {
            "video.height": self.size[0],
            "video.width": self.size[1],
            "video.codec": "h264",
            "video.pix_fmt": "gbrp" if self.lossless else "yuv420p",
            "video.is_depth_map": False,
            "video.fps": int(self.first.fps),
            "video.channels": 3,
            "has_audio": False,
        }
        return self.features | {self.key: self.features[self.key] | {"info": facts}}


def _features(first: Episode, key: str, size: tuple[int, int]) -> dict[str, Any]:
    count = first.action_spec.num_effectors

    def names(parts: tuple[str, ...]) -> list[str]:
        return [part if count == 1 else f"{part}_{n}" for n in range(count) for part in parts]

    features: dict[str, Any] = {}
    if first.eef_pose is not None:
        features["observation.state"] = {"dtype": "float32", "shape": [8 * count], "names": names(_POSE)}
    features["action"] = {"dtype": "float32", "shape": [7 * count], "names": names(_MOVE)}
    features[key] = {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    return features


def _layout(first: Episode) -> tuple[StateLayout, ...] | None:
    """Where `state_vector` puts each end-effector's pose and open ratio."""
    if first.eef_pose is None:
        return None
    return tuple(
        StateLayout(
            position=(n, n + 1, n + 2), rotation=(n + 3, n + 4, n + 5), rotation_kind="axis_angle", gripper=(n + 6,)
        )
        for n in range(0, 8 * first.action_spec.num_effectors, 8)
    )


def _hold(episode: Episode) -> np.ndarray:
    """A native command (1, 7N) without motion, the gripper as last commanded."""
    last = episode.actions[-1:].reshape(-1, 7).copy()
    last[:, :6] = 0.0
    return last.reshape(1, -1)


def _task_table(tasks: list[str]) -> Any:
    """The tasks as a pandas table has them: the words are its index."""
    import pyarrow as pa

    index = "__index_level_0__"
    described = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": to_json(described, indent=None)})
