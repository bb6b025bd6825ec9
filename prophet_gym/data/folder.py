"""Episodes on disk: ``<root>/<name>/{image_0.mp4, data.npz, meta.json}``.

The video is lossless by default (H.264 in RGB at QP 0), so that what is trained on is what was recorded. ``data.npz``
holds the arrays (never pickled objects), ``meta.json`` everything that a person may want to read: instruction, action
spec, camera, rate, behaviour. Folders without our format mark are read as recordings (`prophet_gym.data.recordings`).
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ActionSpec
from prophet_gym.atomic import atomic_folder
from prophet_gym.data.episode import Episode
from prophet_gym.data.recordings import read_recording
from prophet_gym.data.sequence import EpisodeSequence
from prophet_gym.data.video import read_video, write_video

FORMAT = "prophet_gym.episode/1"
"""Mark of our layout in ``meta.json``."""
_VIEW = "image_0"
_LABEL = "label_"
_CONTENTS = ("meta.json", "data.npz", "*.mp4")  # of an episode's folder


def write_episode(
    folder: str | os.PathLike[str], episode: Episode, *, overwrite: bool = False, lossless: bool = True
) -> None:
    """Write an episode to a new folder, all or nothing; the folder's name becomes the episode's name.

    Args:
        folder: The episode's own folder, ``<root>/<name>``.
        episode: What to write; its frames are decoded if they are not yet.
        overwrite: Replace an existing episode.
        lossless: Keep every pixel. False writes ordinary H.264 (about a tenth of the size; even sizes only).

    Raises:
        ValueError: If the folder exists and `overwrite` is False or it holds more than an episode, the frames do not
            fit the actions, or the metadata is no JSON (nan is none).
    """
    arrays: dict[str, np.ndarray] = {"action": episode.actions}
    for key in ("eef_pose", "gripper", "simulator_state"):
        if getattr(episode, key) is not None:
            arrays[key] = np.asarray(getattr(episode, key), np.float64)
    for key, value in episode.labels.items():
        if value.dtype.hasobject:
            raise ValueError(f"label {key!r} has dtype {value.dtype}; expected numbers, booleans or strings")
        arrays[_LABEL + key] = value
    frames = episode.frames
    meta = {
        "format": FORMAT,
        "instruction": episode.instruction,
        "success": None if episode.success is None else bool(episode.success),
        "fps": float(episode.fps),
        "num_frames": len(frames),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "action_spec": episode.action_spec.to_dict(),
        "camera": None if episode.camera is None else episode.camera.to_dict(),
        "metadata": dict(episode.metadata),
    }
    try:
        text = json.dumps(meta, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata {dict(episode.metadata)} of episode {episode.name!r} cannot be stored ({error}); expected "
            "strings, finite numbers, booleans, None, and lists and dicts of them"
        ) from error
    with atomic_folder(folder, overwrite=overwrite, contents=_CONTENTS) as target:
        (target / "meta.json").write_text(text, encoding="utf-8")
        np.savez(target / "data.npz", allow_pickle=False, **arrays)
        write_video(target / f"{_VIEW}.mp4", frames, episode.fps, lossless=lossless)


def read_episode(folder: str | os.PathLike[str], *, camera_name: str | None = None) -> Episode:
    """Read an episode; the images are decoded at the first use of `Episode.frames`.

    Args:
        folder: The episode's own folder.
        camera_name: Which video of a recording with several cameras; by default the first in alphabetical order.

    Raises:
        ValueError: If a file is missing, damaged or foreign, or no such camera was recorded.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    arrays = _read_arrays(folder / "data.npz")
    if "format" not in meta:
        return read_recording(folder, meta, arrays, camera_name)
    if meta["format"] != FORMAT:
        raise ValueError(f"{folder / 'meta.json'} has format {meta['format']!r}; this version reads {FORMAT!r}")
    if camera_name not in (None, _VIEW):
        raise ValueError(f"{folder} has no camera {camera_name!r}; expected {_VIEW!r}")
    missing = {"instruction", "success", "fps", "action_spec", "camera", "metadata"} - set(meta)
    if missing or "action" not in arrays:
        raise ValueError(f"{folder} lacks {sorted(missing) or 'the array action in data.npz'}; write the episode again")
    return Episode(
        images=partial(read_video, folder / f"{_VIEW}.mp4"),
        actions=arrays["action"],
        action_spec=ActionSpec.from_dict(meta["action_spec"]),
        instruction=meta["instruction"],
        fps=meta["fps"],
        camera=None if meta["camera"] is None else Camera.from_dict(meta["camera"]),
        eef_pose=arrays.get("eef_pose"),
        gripper=arrays.get("gripper"),
        success=meta["success"],
        labels={key.removeprefix(_LABEL): value for key, value in arrays.items() if key.startswith(_LABEL)},
        name=folder.name,
        simulator_state=arrays.get("simulator_state"),
        metadata=meta["metadata"],
    )


class EpisodeFolder(EpisodeSequence):
    """The episodes of a folder, sorted by name, each read anew at every access (nothing is cached)."""

    def __init__(self, root: str | os.PathLike[str], *, camera_name: str | None = None) -> None:
        """List the episodes under `root`.

        Args:
            root: Folder of episode folders; those without ``meta.json`` and hidden ones are passed over.
            camera_name: See `read_episode`.

        Raises:
            ValueError: If `root` is no folder or holds no episode.
        """
        self.root = Path(root)
        self.camera_name = camera_name
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is no folder; expected one with an episode folder for each trajectory")
        self.names = tuple(
            sorted(p.parent.name for p in self.root.glob("*/meta.json") if not p.parent.name.startswith("."))
        )
        if not self.names:
            raise ValueError(f"{self.root} holds no episodes; expected <name>/meta.json, data.npz and a video in it")

    def read(self, index: int) -> Episode:
        """Read one episode; images stay undecoded."""
        return read_episode(self.root / self.names[index], camera_name=self.camera_name)

    def __repr__(self) -> str:
        """Say where and how many."""
        return f"EpisodeFolder({str(self.root)!r}, {len(self)} episodes)"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no meta.json; expected an episode folder with meta.json, data.npz and a video"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or record the episode again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds a {type(meta).__name__}; expected an object of keys and values")
    return meta


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except Exception as error:  # numpy and zipfile raise six kinds; each means the same to the reader
        raise ValueError(f"{path} cannot be read ({error}); restore it or record the episode again") from error
