"""Reader of recorded robot data: ``<episode>/{*.mp4 | <camera>_NN.jpg, data.npz, meta.json}``, T images and T actions.

These folders come from converted public sets (BridgeData V2, DROID) and differ from ours: the last action leads to no
image and is dropped, several cameras lie side by side, and poses are ``[x, y, z, Euler x-y-z, gripper]`` with the set's
own gripper convention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prophet_gym import rotations
from prophet_gym.actions import ACTION_SPECS, Gripper, gripper_to_open_ratio
from prophet_gym.data.episode import Episode
from prophet_gym.data.video import read_video


@dataclass(frozen=True)
class _Source:
    """Conventions of one public set: its action spec and the gripper in its measured poses."""

    action_spec: str
    state_gripper: Gripper


_SOURCES = {"Bridge": _Source("bridge", "open_ratio"), "DROID": _Source("droid", "closed_ratio")}
_METADATA = ("dataset", "source_repo", "licence", "robot", "episode_id")
_GRIPPER_SLACK = 0.02  # measured openings exceed 1 by up to 0.005 in BridgeData; more is another convention


def read_recording(
    folder: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], camera_name: str | None
) -> Episode:
    """Build an episode from a recording's folder, metadata and arrays; images are decoded at first use.

    Arrays with one row per image become labels. Measured open ratios are clipped to [0, 1] (calibration error).

    Raises:
        ValueError: If the set is unknown, the camera does not exist, a number or array is missing or of another kind,
            or the numbers of rows contradict each other.
    """
    name = next((key for key in _SOURCES if str(meta.get("dataset", "")).startswith(key)), None)
    if name is None:
        raise ValueError(
            f"{folder}: dataset is {meta.get('dataset')!r}, whose conventions are unknown; expected one that starts "
            f"with {' or '.join(_SOURCES)}, or an episode written by prophet_gym.data.write_episode"
        )
    source = _SOURCES[name]
    length, fps = _clock(folder, meta)
    actions = _rows(folder, arrays, "action")
    if len(actions) != length:
        raise ValueError(f"{folder}: {len(actions)} actions for num_frames={length}; expected as many, the last unused")
    pose = gripper = None
    if "eef_pose" in arrays:
        state = _rows(folder, arrays, "eef_pose")
        pose = np.zeros((len(state), 1, 4, 4))
        pose[:, 0, :3, :3] = rotations.euler_to_matrix(state[:, 3:6])
        pose[:, 0, :3, 3] = state[:, :3]
        pose[:, 0, 3, 3] = 1.0
        gripper = gripper_to_open_ratio(state[:, 6:], source.state_gripper)
        if gripper.min() < -_GRIPPER_SLACK or gripper.max() > 1 + _GRIPPER_SLACK:
            raise ValueError(
                f"{folder}: measured grippers span [{gripper.min():.3f}, {gripper.max():.3f}] as open ratios; expected "
                "[0, 1]. Check the gripper convention of the recording"
            )
        gripper = np.clip(gripper, 0.0, 1.0)
    views = _views(folder)
    view = camera_name if camera_name is not None else next(iter(views), "")
    if view not in views:
        raise ValueError(f"{folder} has no camera {view!r}; expected one of {list(views)}")
    success = meta.get("success")
    used = {"action", "eef_pose"}
    return Episode(
        images=partial(_read_images, views[view], length),
        actions=actions[:-1],
        action_spec=replace(ACTION_SPECS[source.action_spec], control_hz=fps),
        instruction=meta.get("instruction") or "",
        fps=fps,
        eef_pose=pose,
        gripper=gripper,
        success=None if success is None else bool(success),
        labels={k: v for k, v in arrays.items() if k not in used and v.ndim and len(v) == length},
        name=folder.name,
        metadata={key: meta[key] for key in _METADATA if key in meta} | {"camera_name": view},
    )


def _clock(folder: Path, meta: Mapping[str, Any]) -> tuple[int, float]:
    """Number of images, and images per second."""
    try:
        return int(meta["num_frames"]), float(meta.get("fps") or meta["fps_native_control"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'meta.json'}: {type(error).__name__} {error}; expected numbers as num_frames and as fps or "
            "fps_native_control: restore the file or leave the episode out"
        ) from error


def _rows(folder: Path, arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    """An array (T, 7) of numbers."""
    if key not in arrays:
        raise ValueError(
            f"{folder / 'data.npz'} holds {sorted(arrays)}, no {key!r}: restore the file or leave the episode out"
        )
    rows = arrays[key]
    if rows.ndim != 2 or rows.shape[1] != 7 or rows.dtype.kind not in "fiu":
        raise ValueError(
            f"{folder / 'data.npz'}: {key!r} is {rows.dtype} {rows.shape}; expected numbers (T, 7): restore the file "
            "or leave the episode out"
        )
    return rows if key == "action" else rows.astype(np.float64)


def _views(folder: Path) -> dict[str, list[Path]]:
    """Files of each camera: one video, or images numbered in order."""
    views = {path.stem: [path] for path in sorted(folder.glob("*.mp4"))}
    for path in sorted(folder.glob("*_*.jpg")):
        views.setdefault(path.stem.rpartition("_")[0], []).append(path)
    return views


def _read_images(files: list[Path], length: int) -> np.ndarray:
    """Decode one camera; two DROID recordings have one video frame more than rows of data: it is dropped."""
    if files[0].suffix == ".mp4":
        frames = read_video(files[0])
        return frames[:length] if len(frames) == length + 1 else frames
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR) for path in files]
    if any(image is None for image in images):
        raise ValueError(f"{files[[i is None for i in images].index(True)]} cannot be decoded; restore the file")
    return np.stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images])
