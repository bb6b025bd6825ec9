"""LeRobotDataset v2.1 and v3.0 read as episodes, without importing lerobot: parquet tables and MP4 videos.

v2.1 keeps one parquet file and one video per camera for each episode; v3.0 joins episodes in both, so that an episode
is a range of rows and a range of seconds. Row t holds the state, the image and the command at that time. What the
numbers mean is not in these files: a dataset card says it. Sets written by `write_lerobot` carry their own.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.data.cards import DatasetCard, get_card
from prophet_gym.data.columns import Rows, assemble
from prophet_gym.data.episode import Episode
from prophet_gym.data.sequence import EpisodeSequence, need_extra, read_json
from prophet_gym.data.video import read_video_at
from prophet_gym.errors import nearest

VERSIONS = ("v2.0", "v2.1", "v3.0")
"""Format versions that are read; v2.0 differs from v2.1 in statistics only, which we do not use."""
OWN_FILE = "meta/prophet_gym.json"
"""What LeRobot's format does not hold: the card, names, success, calibration."""


class LeRobotEpisodes(EpisodeSequence):
    """The episodes of a LeRobotDataset on disk, in its own order.

    Attributes:
        root: Folder that holds ``meta/info.json``.
        info: Content of that file.
        card: Conventions of the numbers.
        camera: Feature that images come from, e.g. ``"observation.images.top"``.
        names: ``episode_000000`` and so on, or the names that `write_lerobot` was given.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, card: str | DatasetCard | None = None, camera: str | None = None
    ) -> None:
        """Read the metadata.

        Args:
            root: Folder of the set.
            card: Name of a card or a card; None for sets that carry their own.
            camera: Feature name, or its last part (``"top"``); by default the first that the card prefers, else the
                first one of ``info.json``.

        Raises:
            ValueError: If metadata are missing, damaged, or of another version, or card or camera are unknown.
            MissingExtraError: pyarrow is not installed.
        """
        need_extra("pyarrow.parquet", "reading LeRobot data sets")
        self.root = Path(root)
        path = self.root / "meta" / "info.json"
        self.info = read_json(path)
        version = self.info.get("codebase_version")
        if version not in VERSIONS:
            raise ValueError(
                f"{path} has codebase_version {version!r}; expected one of {VERSIONS}. Convert the set with lerobot's "
                "own script of that version, or read it with a newer prophet-gym"
            )
        missing = [key for key in ("fps", "features", "data_path") if key not in self.info]
        if missing or not isinstance(self.info.get("fps"), int | float) or self.info["fps"] <= 0:
            raise ValueError(f"{path} lacks {missing or 'a positive fps'}; restore the file")
        self._own = read_json(self.root / OWN_FILE) if (self.root / OWN_FILE).is_file() else {}
        self.card = self._card(card)
        self.camera = self._camera(camera)
        self._joined = version == "v3.0"
        self._episodes = self._read_episodes()
        self._tasks = self._read_tasks()
        self._extra: list[dict[str, Any]] = self._own.get("episodes", [])
        named = len(self._extra) == len(self._episodes)
        self.names = tuple(
            str(self._extra[i]["name"]) if named else f"episode_{row['episode_index']:06d}"
            for i, row in enumerate(self._episodes)
        )

    def read(self, index: int) -> Episode:
        """Read the rows of one episode; its frames are decoded at the first use.

        Raises:
            ValueError: If a file is missing or damaged, rates differ, or the numbers do not fit the card.
        """
        row, name = self._episodes[index], self.names[index]
        path = self._data_path(row)
        where = f"{path}, episode {name!r}"
        action_keys = self._keys("action", self.card.action_keys, required=self.card.actions_from == "commands")
        state_keys = self._keys("observation.state", self.card.state_keys, required=self.card.state is not None)
        table = self._table(path, row, ["timestamp", "task_index", *action_keys, *state_keys], where)
        times = self._timestamps(table["timestamp"], where)
        extra = self._extra[index] if len(self._extra) == len(self._episodes) else {}
        episode = assemble(
            Rows(
                where=where,
                name=name,
                images=partial(self._images, row, times, where),
                actions=_join(table, action_keys, where),
                states=_join(table, state_keys, where),
                instruction=self._instruction(row, table, where),
                fps=float(self.info["fps"]),
                success=extra.get("success"),
                metadata={"camera_name": self.camera, **extra.get("metadata", {})},
            ),
            self.card,
        )
        camera, known = extra.get("camera"), self._own.get("cameras", [])
        if camera is None:
            return episode
        if camera not in range(len(known)):
            raise ValueError(
                f"{where}: {self.root / OWN_FILE} lists {len(known)} cameras, and not number {camera!r}; restore it"
            )
        return replace(episode, camera=Camera.from_dict(known[camera]))

    def __repr__(self) -> str:
        """Say where, which camera, and how many."""
        return f"LeRobotEpisodes({str(self.root)!r}, {self.camera!r}, {len(self)} episodes)"

    def _card(self, card: str | DatasetCard | None) -> DatasetCard:
        if card is None and "card" in self._own:
            return DatasetCard.from_dict(self._own["card"])
        if card is None:
            names = {key: self.info["features"].get(key, {}).get("names") for key in ("action", "observation.state")}
            raise ValueError(
                f"{self.root}: LeRobot's format does not say what the numbers mean (names: {names}); give "
                "card='bridge', 'libero', ... or a DatasetCard of your own"
            )
        return get_card(card)

    def _camera(self, camera: str | None) -> str:
        features = self.info["features"]
        views = [key for key, value in features.items() if value.get("dtype") in ("video", "image")]
        if not views:
            raise ValueError(f"{self.root / 'meta' / 'info.json'} lists no camera; expected a feature of dtype video")
        if camera is None:
            preferred = [v for name in self.card.cameras or () for v in views if name in (v, v.rpartition(".")[2])]
            return (preferred or views)[0]
        found = [view for view in views if camera in (view, view.rpartition(".")[2])]
        if not found:
            short = [view.rpartition(".")[2] for view in views]
            raise ValueError(f"{self.root} has no camera {camera!r}; expected one of {views}.{nearest(camera, short)}")
        return found[0]

    def _keys(self, usual: str, keys: tuple[str, ...], *, required: bool) -> tuple[str, ...]:
        features = self.info["features"]
        absent = [key for key in keys or (usual,) if key not in features]
        if absent and (keys or required):
            raise ValueError(
                f"{self.root / 'meta' / 'info.json'} has no feature {absent[0]!r}; expected one of {list(features)}."
                f"{nearest(absent[0], features)} Set action_keys and state_keys of the card {self.card.name!r}"
            )
        return () if absent else keys or (usual,)

    def _read_episodes(self) -> list[dict[str, Any]]:
        if not self._joined:
            rows = _read_lines(self.root / "meta" / "episodes.jsonl")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
            if not files:
                raise ValueError(f"{self.root / 'meta' / 'episodes'} holds no parquet file; restore it")
            video = f"videos/{self.camera}/"
            wanted = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")
            rows = []
            for path in files:
                try:
                    file = pq.ParquetFile(path)
                    columns = [c for c in file.schema_arrow.names if c in wanted or c.startswith(video)]
                    rows += file.read(columns=columns).to_pylist()
                except (pa.ArrowInvalid, OSError) as error:
                    raise ValueError(f"{path} cannot be read ({error}); restore it") from error
        for row in rows:
            if not {"episode_index", "length"} <= set(row):
                raise ValueError(f"{self.root / 'meta'}: an episode is listed as {row}; expected episode_index, length")
        if not rows:
            raise ValueError(f"{self.root} lists no episodes")
        return sorted(rows, key=lambda row: row["episode_index"])

    def _read_tasks(self) -> dict[int, str]:
        if not self._joined:
            path = self.root / "meta" / "tasks.jsonl"
            try:
                return {row["task_index"]: row["task"] for row in _read_lines(path)}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}: a line lacks task_index or task ({error}); restore it") from error
        path = self.root / "meta" / "tasks.parquet"
        table = _read_table(path, None, None, str(path))
        words = [name for name in table.column_names if name != "task_index"]  # the index of a pandas table
        if "task_index" not in table.column_names or not words:
            raise ValueError(f"{path} has columns {table.column_names}; expected task_index and the tasks in words")
        return dict(zip(table["task_index"].to_pylist(), table[words[0]].to_pylist(), strict=True))

    def _data_path(self, row: dict[str, Any]) -> Path:
        return self.root / self.info["data_path"].format(**self._place(row, "data"))

    def _place(self, row: dict[str, Any], what: str) -> dict[str, Any]:
        """Values of the path templates."""
        if self._joined:
            try:
                return {"chunk_index": row[f"{what}/chunk_index"], "file_index": row[f"{what}/file_index"]}
            except KeyError as error:
                raise ValueError(
                    f"{self.root}, episode {row['episode_index']}: meta/episodes lacks {error}; restore it"
                ) from error
        index = row["episode_index"]
        return {"episode_index": index, "episode_chunk": index // self.info.get("chunks_size", 1000)}

    def _table(self, path: Path, row: dict[str, Any], columns: list[str], where: str) -> Any:
        rows = _read_table(path, columns, row["episode_index"] if self._joined else None, where)
        if len(rows) != row["length"]:
            raise ValueError(
                f"{where}: {len(rows)} rows, but meta/episodes says {row['length']}; restore the file or leave the "
                "episode out"
            )
        return rows

    def _timestamps(self, column: Any, where: str) -> np.ndarray:
        """Seconds since the episode's start, checked against the set's rate."""
        times, fps = column.to_numpy().astype(np.float64), float(self.info["fps"])
        steps = np.diff(times)
        if len(steps) and np.abs(steps * fps - 1).max() > 0.05:
            raise ValueError(
                f"{where}: rows are {steps.min():.4f} to {steps.max():.4f} s apart; info.json says {fps:g} fps, "
                f"{1 / fps:.4f} s. Episodes of several rates cannot share a set: split it, or resample them to one rate"
            )
        return times

    def _instruction(self, row: dict[str, Any], table: Any, where: str) -> str:
        index = table["task_index"][0].as_py()
        if index not in self._tasks:
            raise ValueError(f"{where}: task_index {index} is not in meta/tasks; expected one of {list(self._tasks)}")
        return str(self._tasks[index])

    def _images(self, row: dict[str, Any], times: np.ndarray, where: str) -> np.ndarray:
        if self.info["features"][self.camera]["dtype"] == "image":
            cells = self._table(self._data_path(row), row, [self.camera], where)[self.camera].to_pylist()
            return np.stack([_decode(cell, self.root, f"{where}, row {i}") for i, cell in enumerate(cells)])
        template, start = self.info.get("video_path"), 0.0
        if not template:
            raise ValueError(f"{self.root / 'meta' / 'info.json'} lacks video_path; restore the file")
        if self._joined:
            key = f"videos/{self.camera}/from_timestamp"
            seconds = row.get(key)
            if not isinstance(seconds, int | float):
                raise ValueError(f"{where}: meta/episodes has {key} {seconds!r}; expected seconds: restore it")
            start = float(seconds)
        path = self.root / template.format(video_key=self.camera, **self._place(row, f"videos/{self.camera}"))
        if not path.is_file():
            raise ValueError(f"{where}: the video {path} is missing; restore it or choose another camera")
        try:
            return read_video_at(path, start + times, float(self.info["fps"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _join(table: Any, keys: tuple[str, ...], where: str) -> np.ndarray | None:
    """Columns of numbers or of lists of numbers, side by side: (T, D)."""
    if not keys:
        return None
    parts = []
    for key in keys:
        try:
            parts.append(np.asarray(table[key].to_pylist(), np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: {key!r} holds no rows of as many numbers each ({error}); restore the file or leave the "
                "episode out"
            ) from error
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _decode(cell: Any, root: Path, where: str) -> np.ndarray:
    """Decode an image cell: ``{"bytes": ..., "path": ...}``, as the datasets library stores them."""
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise ValueError(f"{where}: the image is empty; restore the file or leave the episode out")
    try:
        data = cell.get("bytes") or (root / cell["path"]).read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: the image cannot be read ({error}); restore it or leave the episode out") from error
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{where}: the image cannot be decoded; restore the file or leave the episode out")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_table(path: Path, columns: list[str] | None, episode: int | None, where: str) -> Any:
    """Read columns of a parquet file, of one episode if it is given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{where}: {path} is missing; restore it or leave the episode out")
    only = None if episode is None else [("episode_index", "=", episode)]
    try:
        return pq.read_table(path, columns=columns, filters=only)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError, OSError) as error:
        raise ValueError(f"{where}: cannot be read ({error}); restore the file or leave the episode out") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected one JSON object per line: restore it") from error
