"""RLDS data sets as TFDS stores them (Open-X, BridgeData V2, DROID), read as episodes without TensorFlow.

The folder holds ``dataset_info.json`` (shards and their lengths), ``features.json`` (shapes and types) and TFRecord
shards ``<name>-<split>.tfrecord-00000-of-00001``. A record is one episode: an Example whose features ``steps/...`` hold
the values of all steps one after the other. Step t has the observation before command t.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prophet_gym.data.cards import DatasetCard, get_card
from prophet_gym.data.columns import Rows, assemble
from prophet_gym.data.episode import Episode
from prophet_gym.data.sequence import EpisodeSequence, need_extra, read_json
from prophet_gym.data.tfrecord import Record, parse_example, read_record, scan_records
from prophet_gym.errors import nearest

_STEPS = "steps/"
_INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction")


@dataclass(frozen=True)
class _Feature:
    """One entry of ``features.json``: ``"image"``, ``"text"`` or ``"tensor"``, its shape and NumPy type."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = "none"


class RLDSEpisodes(EpisodeSequence):
    """The episodes of one split of a TFDS folder, in the order of the shards.

    Attributes:
        root: Folder that holds ``dataset_info.json``.
        card: Conventions of the numbers.
        camera: Observation that images come from, e.g. ``"image_0"``.
        names: ``<split>_000000`` and so on.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        card: str | DatasetCard,
        camera: str | None = None,
        split: str = "train",
    ) -> None:
        """Read the metadata; the shards are opened when their episodes are read.

        Args:
            root: Folder of one version, e.g. ``bridge_dataset/1.0.0``.
            card: Name of a card or a card.
            camera: Observation name; by default the first that the card prefers, else the first in ``features.json``.
            split: Name of the split.

        Raises:
            ValueError: If metadata are missing, damaged, or describe another format, or split, card or camera are
                unknown.
            MissingExtraError: google-crc32c or protobuf are not installed.
        """
        need_extra("google_crc32c", "reading RLDS data sets")
        self.root, self.card, self.split = Path(root), get_card(card), split
        info = read_json(self.root / "dataset_info.json")
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(
                f"{self.root / 'dataset_info.json'} has fileFormat {info['fileFormat']!r}; expected 'tfrecord': "
                "prepare the set again with tfds' default file format"
            )
        self._features = dict(_flatten(read_json(self.root / "features.json")))
        if not any(name.startswith(_STEPS) for name in self._features):
            raise ValueError(f"{self.root / 'features.json'} has no steps: this is no RLDS data set of episodes")
        self.camera = self._choose_camera(camera)
        self._shards = self._list_shards(info)
        self._records: dict[Path, tuple[list[Record], str]] = {}
        self._places = [(path, i) for path, length in self._shards for i in range(length)]
        self.names = tuple(f"{split}_{i:06d}" for i in range(len(self._places)))
        if not self.names:
            raise ValueError(f"{self.root}: split {split!r} holds no episodes")

    def read(self, index: int) -> Episode:
        """Read one record; its images are decoded at the first use.

        Raises:
            ValueError: If the shard is truncated there, a checksum is wrong, or the numbers do not fit the card.
        """
        (path, number), name = self._places[index], self.names[index]
        where = f"{path}, episode {name!r}"
        if path not in self._records:
            self._records[path] = scan_records(path)
        records, fault = self._records[path]
        if number >= len(records):
            reason = fault or f"holds {len(records)} records"
            raise ValueError(
                f"{where}: record {number} is missing; the file {reason}. Restore it, or read the others with "
                'open_dataset(path, on_error="skip")'
            )
        try:
            example = parse_example(read_record(path, records[number]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if self.card.control_hz is None:
            raise ValueError(
                f"{where}: neither the format nor card {self.card.name!r} states the rate; give "
                "dataclasses.replace(card, control_hz=...)"
            )
        commands = self.card.actions_from == "commands"
        action = self._join(example, self.card.action_keys or ("action",), where) if commands else None
        keys = self.card.state_keys or (("observation/state",) if _STEPS + "observation/state" in example else ())
        state = self._join(example, keys, where) if keys and self.card.state is not None else None
        encoded = example.get(_STEPS + self.camera, [])
        return assemble(
            Rows(
                where=where,
                name=name,
                images=lambda: _decode_all(encoded, where),
                actions=action,
                states=state,
                instruction=_instruction(example),
                fps=self.card.control_hz,
                metadata={"camera_name": self.camera.rpartition("/")[2], **_metadata(example)},
            ),
            self.card,
        )

    def __repr__(self) -> str:
        """Say where, which camera, and how many."""
        return f"RLDSEpisodes({str(self.root)!r}, {self.camera!r}, {len(self)} episodes)"

    def _choose_camera(self, camera: str | None) -> str:
        views = [name.removeprefix(_STEPS) for name, feature in self._features.items() if feature.kind == "image"]
        colour = [v for v in views if self._features[_STEPS + v].shape[-1:] in ((3,), ())]
        wanted = (self.card.cameras or ()) if camera is None else (camera,)
        found = [view for name in wanted for view in colour if name in (view, view.rpartition("/")[2])]
        if camera is not None and not found:
            short = [view.rpartition("/")[2] for view in colour]
            raise ValueError(f"{self.root} has no camera {camera!r}; expected one of {short}.{nearest(camera, short)}")
        if not colour:
            raise ValueError(f"{self.root / 'features.json'} lists no colour images among the steps")
        return (found or colour)[0]

    def _list_shards(self, info: Mapping[str, Any]) -> list[tuple[Path, int]]:
        splits = {str(split.get("name")): split for split in info.get("splits", [])}
        if self.split not in splits:
            raise ValueError(
                f"{self.root} has no split {self.split!r}; expected one of {list(splits)}.{nearest(self.split, splits)}"
            )
        split = splits[self.split]
        lengths = [int(length) for length in split.get("shardLengths", [])]
        template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
        paths = []
        for i in range(len(lengths)):
            shard = f"{i:05d}-of-{len(lengths):05d}"
            paths.append(
                self.root
                / template.format(
                    DATASET=info.get("name", ""), SPLIT=self.split, FILEFORMAT="tfrecord", SHARD_X_OF_Y=shard
                )
            )
        return list(zip(paths, lengths, strict=True))

    def _join(self, example: Mapping[str, Any], keys: tuple[str, ...], where: str) -> np.ndarray:
        """Features side by side: (T, D)."""
        parts = []
        for key in keys:
            feature, values = self._features.get(_STEPS + key), example.get(_STEPS + key)
            if feature is None or values is None:
                known = [name.removeprefix(_STEPS) for name in self._features if name.startswith(_STEPS)]
                raise ValueError(
                    f"{where}: no {key!r} in the steps; expected one of {known}.{nearest(key, known)} Set action_keys "
                    f"and state_keys of the card {self.card.name!r}"
                )
            if feature.kind != "tensor" or feature.encoding != "none" or isinstance(values, list):
                raise ValueError(f"{where}: {key!r} is {feature}; expected a tensor of plain numbers")
            width = int(np.prod(feature.shape, dtype=int))
            if width < 1 or len(values) % width:
                raise ValueError(f"{where}: {key!r} has {len(values)} numbers; expected a multiple of {width}")
            parts.append(values.reshape(-1, width))
        if len({len(part) for part in parts}) > 1:
            lengths = {key: len(part) for key, part in zip(keys, parts, strict=True)}
            raise ValueError(f"{where}: {lengths} steps; expected as many of each")
        return np.concatenate(parts, axis=1).astype(np.float64)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, _Feature]]:
    """Names as the Example has them (``steps/observation/image``), with kind, shape and type."""
    if "featuresDict" in tree:
        for name, child in tree["featuresDict"]["features"].items():
            yield from _flatten(child, f"{prefix}/{name}" if prefix else name)
    elif "sequence" in tree:
        yield from _flatten(tree["sequence"]["feature"], prefix)
    elif "image" in tree:
        shape = tree["image"].get("shape", {}).get("dimensions", [])
        yield prefix, _Feature("image", tuple(int(n) for n in shape))
    elif "text" in tree:
        yield prefix, _Feature("text")
    elif "tensor" in tree:
        tensor = tree["tensor"]
        shape = tensor.get("shape", {}).get("dimensions", [])
        encoding = str(tensor.get("encoding", "none")).lower()
        yield prefix, _Feature("tensor", tuple(int(n) for n in shape), str(tensor.get("dtype")), encoding)


def _decode_all(encoded: Any, where: str) -> np.ndarray:
    frames = []
    for t, data in enumerate(encoded):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if image is None:
            raise ValueError(f"{where}: image {t} ({len(data)} bytes) cannot be decoded; leave the episode out")
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    if not frames:
        raise ValueError(f"{where}: holds no images of this camera; choose another camera, or leave the episode out")
    return np.stack(frames)


def _instruction(example: Mapping[str, Any]) -> str:
    for key in _INSTRUCTIONS:
        words = example.get(_STEPS + key)
        if isinstance(words, list) and words:
            return str(words[0].decode("utf-8", errors="replace"))
    return ""


def _metadata(example: Mapping[str, Any]) -> dict[str, Any]:
    """Single strings of ``episode_metadata``, such as the path of the source file."""
    prefix = "episode_metadata/"
    return {
        key.removeprefix(prefix): value[0].decode("utf-8", errors="replace")
        for key, value in sorted(example.items())
        if key.startswith(prefix) and isinstance(value, list) and len(value) == 1 and len(value[0]) < 1000
    }
