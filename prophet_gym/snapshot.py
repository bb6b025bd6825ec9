"""Where a rollout starts: one image, an instruction and the end-effectors' poses; and folders of such starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.atomic import atomic_folder

_INDEX = "snapshots.json"
_FORMAT = "prophet_gym.snapshots/1"
_KEYS = {"image", "instruction", "eef_pose", "gripper", "camera", "simulator_state", "name"}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The start of a rollout. Arrays are copied and read-only: copy them before writing.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        instruction: The goal in words; may be empty.
        eef_pose: (N, 4, 4) float64, end-effector to world, metres.
        gripper: (N,) float64 open ratio, 0 closed to 1 open.
        camera: Calibration of `image`, or None where unknown (then no action frames can be drawn).
        simulator_state: (S,) float64, what the ground-truth simulator needs to start here, or None.
        name: Where it comes from.

    Raises:
        ValueError: If a field has another shape, dtype or range, or the camera another size than the image.
    """

    image: np.ndarray
    instruction: str
    eef_pose: np.ndarray
    gripper: np.ndarray
    camera: Camera | None = None
    simulator_state: np.ndarray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        """Check every field and freeze the arrays."""
        image = np.asarray(self.image)
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(
                f"snapshot image has shape {image.shape}; expected (H, W, 3) RGB. Drop an alpha channel with "
                "image[..., :3]; repeat a grey one three times; move channels last"
            )
        if image.dtype != np.uint8:
            raise ValueError(
                f"snapshot image has dtype {image.dtype}; expected uint8 in 0..255. For floats in [0, 1] use "
                "(image * 255).round().astype(np.uint8)"
            )
        if not isinstance(self.instruction, str):
            raise ValueError(f"snapshot instruction is {self.instruction!r}; expected a string")
        gripper = np.asarray(self.gripper, np.float64)
        pose = np.asarray(self.eef_pose, np.float64)
        if gripper.ndim != 1 or len(gripper) < 1 or pose.shape != (len(gripper), 4, 4):
            raise ValueError(
                f"snapshot eef_pose has shape {pose.shape} and gripper {gripper.shape}; expected (N, 4, 4) and (N,) "
                "for N end-effectors"
            )
        if not (gripper >= 0).all() or not (gripper <= 1).all():
            raise ValueError(
                f"snapshot gripper is {gripper.tolist()}; expected open ratios in [0, 1]. Convert other conventions "
                "with prophet_gym.actions.gripper_to_open_ratio"
            )
        rotation = pose[:, :3, :3]
        error = np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max()
        if not np.isfinite(pose).all() or not error < 1e-4 or not (pose[:, 3] == [0, 0, 0, 1]).all():
            raise ValueError(
                f"snapshot eef_pose is {pose.tolist()}; expected finite rigid transforms, end-effector to world, last "
                "row [0, 0, 0, 1]"
            )
        camera = self.camera
        if camera is not None and (camera.height, camera.width) != image.shape[:2]:
            raise ValueError(
                f"snapshot camera is {camera.width}x{camera.height} pixels but the image {image.shape[1]}x"
                f"{image.shape[0]}; use camera.resized(width, height)"
            )
        state = self.simulator_state
        if state is not None and (np.ndim(state) != 1 or not np.isfinite(state).all()):
            raise ValueError(
                f"snapshot simulator_state has shape {np.shape(state)}, all finite: {np.isfinite(state).all()}; "
                "expected a flat vector of finite numbers"
            )
        object.__setattr__(self, "image", _frozen(image, np.uint8))
        object.__setattr__(self, "eef_pose", _frozen(pose, np.float64))
        object.__setattr__(self, "gripper", _frozen(gripper, np.float64))
        object.__setattr__(self, "simulator_state", None if state is None else _frozen(state, np.float64))

    @property
    def num_effectors(self) -> int:
        """N."""
        return len(self.gripper)


class SnapshotSet(Sequence[Snapshot]):
    """An ordered, non-empty collection of snapshots."""

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        """Keep `snapshots` in order.

        Raises:
            ValueError: If there is none, or an item is no Snapshot.
        """
        self._snapshots = tuple(snapshots)
        if not self._snapshots:
            raise ValueError("got no snapshots; expected at least one")
        for index, item in enumerate(self._snapshots):
            if not isinstance(item, Snapshot):
                raise ValueError(f"item {index} is a {type(item).__name__}; expected a prophet_gym.Snapshot")

    def __len__(self) -> int:
        """Return the number of snapshots."""
        return len(self._snapshots)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> SnapshotSet: ...
    def __getitem__(self, index: int | slice) -> Snapshot | SnapshotSet:
        """Return one snapshot, or the set of a slice."""
        if isinstance(index, slice):
            return SnapshotSet(self._snapshots[index])
        return self._snapshots[index]

    def __repr__(self) -> str:
        """Say how many."""
        return f"SnapshotSet({len(self)} snapshots)"

    def sample(self, rng: np.random.Generator) -> Snapshot:
        """Draw one snapshot uniformly."""
        return self._snapshots[int(rng.integers(len(self._snapshots)))]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write one PNG per snapshot and ``snapshots.json`` into a new folder, all or nothing.

        Raises:
            ValueError: If the folder exists and `overwrite` is False, or it holds more than a set.
        """
        with atomic_folder(folder, overwrite=overwrite, contents=(_INDEX, "[0-9]*.png")) as target:
            entries = []
            for index, snapshot in enumerate(self._snapshots):
                image = f"{index:04d}.png"
                _, png = cv2.imencode(".png", cv2.cvtColor(snapshot.image, cv2.COLOR_RGB2BGR))
                (target / image).write_bytes(png.tobytes())
                state = snapshot.simulator_state
                entries.append(
                    {
                        "image": image,
                        "name": snapshot.name,
                        "instruction": snapshot.instruction,
                        "eef_pose": snapshot.eef_pose.tolist(),
                        "gripper": snapshot.gripper.tolist(),
                        "camera": None if snapshot.camera is None else snapshot.camera.to_dict(),
                        "simulator_state": None if state is None else state.tolist(),
                    }
                )
            text = json.dumps({"format": _FORMAT, "snapshots": entries}, indent=1, allow_nan=False)
            (target / _INDEX).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SnapshotSet:
        """Read a folder written by `save`; floats come back bit for bit.

        Raises:
            ValueError: If the folder or a file is missing, foreign or damaged; the message names it.
        """
        folder = Path(folder)
        index = folder / _INDEX
        if not folder.is_dir():
            what = f"a file; give its folder, {folder.parent}" if folder.name == _INDEX else "no folder"
            raise ValueError(f"{folder} is {what}; expected a folder written by SnapshotSet.save")
        if not index.is_file():
            raise ValueError(f"{folder} holds no {_INDEX}; expected a folder written by SnapshotSet.save")
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{index} is not valid JSON ({error}); restore the file or write the set again") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != _FORMAT:
            raise ValueError(f"{index} has format {found!r}; expected {_FORMAT!r}, as SnapshotSet.save writes it")
        entries = content.get("snapshots")
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{index} lists no snapshots; expected at least one")
        return cls(_read_entry(index, number, entry) for number, entry in enumerate(entries))


def _read_entry(index: Path, number: int, entry: Any) -> Snapshot:
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        found = f"an entry with keys {sorted(entry)}" if isinstance(entry, dict) else f"{entry!r}"
        raise ValueError(f"{index}: number {number} is {found}; expected an entry with keys {sorted(_KEYS)}")
    path = index.parent / str(entry["image"])
    data = np.frombuffer(path.read_bytes() if path.is_file() else b"", np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if image is None or image.ndim != 3 or image.shape[-1] != 3:
        found = "missing or damaged" if image is None else f"an image of shape {image.shape}"
        raise ValueError(f"{path} is {found}; expected a PNG with three channels")
    camera, state = entry["camera"], entry["simulator_state"]
    try:
        return Snapshot(
            image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
            instruction=entry["instruction"],
            eef_pose=np.asarray(entry["eef_pose"], np.float64),
            gripper=np.asarray(entry["gripper"], np.float64),
            camera=None if camera is None else Camera.from_dict(camera),
            simulator_state=None if state is None else np.asarray(state, np.float64),
            name=entry["name"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{index}: number {number} is no snapshot: {error}") from error


def _frozen(array: np.ndarray, dtype: type) -> np.ndarray:
    copy: np.ndarray = np.array(array, dtype)
    copy.setflags(write=False)
    return copy
