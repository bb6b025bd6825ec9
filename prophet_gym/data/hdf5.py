"""HDF5 demonstrations of LIBERO and robomimic, ``data/demo_<i>/{actions, obs/...}``, read as episodes.

Two traps are handled here, not left to the user. LIBERO's recorder stores what it saw *after* each command
(``obs[t]`` follows ``actions[t]``) and images upside down unless the file says otherwise; robomimic stores what was
seen before the command, upright. The files differ: LIBERO's carry ``problem_info`` and name images ``*_rgb``.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prophet_gym.data.cards import DatasetCard, get_card
from prophet_gym.data.columns import Rows, StateLayout, assemble
from prophet_gym.data.episode import Episode
from prophet_gym.data.sequence import EpisodeSequence, need_extra
from prophet_gym.errors import nearest

_LIBERO = StateLayout(rotation_kind="axis_angle", gripper=(6, 7), closed=0.0, open=0.04)
_ROBOMIMIC = StateLayout(rotation=(3, 4, 5, 6), rotation_kind="quaternion_xyzw", gripper=(7, 8), closed=0.0, open=0.04)
_STATES = (  # names of the columns, and what a Panda's say
    (("ee_states", "gripper_states"), _LIBERO),
    (("ee_pos", "ee_ori", "gripper_states"), _LIBERO),
    (("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"), _ROBOMIMIC),
)
SUFFIXES = (".hdf5", ".h5")


class HDF5Episodes(EpisodeSequence):
    """The demonstrations of one HDF5 file, or of all files of a folder, by number.

    Attributes:
        files: The files, sorted.
        card: Conventions of the numbers.
        camera: Name of the images, e.g. ``"agentview_rgb"``; None: the first that the card prefers.
        names: ``<file>/demo_<i>``; ``demo_<i>`` where there is one file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, card: str | DatasetCard = "libero", camera: str | None = None
    ) -> None:
        """List the demonstrations.

        Args:
            path: A file, or a folder of them.
            card: Name of a card or a card. LIBERO's fits robomimic data of the same controller, but for the state
                layout: LIBERO's is of rotation vectors, robomimic stores quaternions.
            camera: Name of the images under ``obs``.

        Raises:
            ValueError: If there is no file, one is damaged or no demonstration file, or the card is unknown.
            MissingExtraError: h5py is not installed.
        """
        need_extra("h5py", "reading HDF5 demonstrations")
        self.path, self.card, self.camera = Path(path), get_card(card), camera
        self.files = [self.path]
        if self.path.is_dir():
            self.files = sorted(file for file in self.path.iterdir() if file.suffix in SUFFIXES)
        if not self.files:
            raise ValueError(f"{self.path} holds no file that ends in {' or '.join(SUFFIXES)}")
        self._demos = [(file, demo) for file in self.files for demo in _demos(file)]
        prefix = len(self.files) > 1
        self.names = tuple(f"{file.stem}/{demo}" if prefix else demo for file, demo in self._demos)

    def read(self, index: int) -> Episode:
        """Read the commands and states of one demonstration; its images are read at the first use.

        Raises:
            ValueError: If it is damaged, lacks what the card names, or its rate or rotations are not the card's.
        """
        (path, demo), name = self._demos[index], self.names[index]
        where = f"{path}, episode {demo!r}"
        with _opened(path) as file:
            try:
                data, group = file["data"], file["data"][demo]
                obs = group["obs"]
                libero = "problem_info" in data.attrs
                camera = self._choose_camera(obs, where)
                action_keys = self.card.action_keys or ("actions",)
                rows = Rows(
                    where=where,
                    name=name,
                    images=partial(_images, path, demo, camera, _upside_down(data.attrs, camera)),
                    actions=_join(group, action_keys, where) if self.card.actions_from == "commands" else None,
                    states=self._states(obs, where),
                    instruction=_instruction(data.attrs),
                    fps=self._rate(data.attrs, path),
                    after_action=libero,
                    success=bool(np.asarray(group["rewards"]).max() > 0) if "rewards" in group else None,
                    metadata={"camera_name": camera},
                )
            except (KeyError, OSError, RuntimeError) as error:
                raise ValueError(f"{where}: cannot be read ({error}); restore the file or leave it out") from error
        return assemble(rows, self.card)

    def __repr__(self) -> str:
        """Say where and how many."""
        return f"HDF5Episodes({str(self.path)!r}, {len(self)} episodes)"

    def _choose_camera(self, obs: Any, where: str) -> str:
        views = [key for key in obs if obs[key].ndim == 4 and obs[key].shape[-1] == 3]
        for name in (self.camera,) if self.camera is not None else (*(self.card.cameras or ()), *views):
            if name in views:
                return str(name)
        hint = "" if self.camera is None else nearest(self.camera, views)
        raise ValueError(f"{where}: no images {self.camera or ''!r} in obs; expected one of {views}.{hint}")

    def _states(self, obs: Any, where: str) -> np.ndarray | None:
        if self.card.state is None:
            return None
        if self.card.state_keys:
            return _join(obs, self.card.state_keys, where)
        there = [(keys, layout) for keys, layout in _STATES if all(key in obs for key in keys)]
        wanted = {layout.rotation_kind for layout in self.card.state}
        for keys, layout in there:
            if wanted == {layout.rotation_kind}:
                return _join(obs, keys, where)
        if there:
            keys, layout = there[0]
            raise ValueError(
                f"{where}: {', '.join(keys)} hold rotations as {layout.rotation_kind}, but card "
                f"{self.card.name!r} reads {', '.join(sorted(wanted))}. Use "
                f"dataclasses.replace(card, state=({layout},)), the same as [[state]] of a card in TOML, or state=None "
                "for episodes without poses"
            )
        return None

    def _rate(self, attrs: Any, path: Path) -> float:
        stated = self.card.control_hz
        own = _json(attrs, "env_args").get("env_kwargs", {}).get("control_freq")
        if stated is not None and own is not None and float(own) != stated:
            raise ValueError(
                f"{path}: recorded at {own} Hz, but card {self.card.name!r} says {stated:g} Hz. Use "
                f"dataclasses.replace(card, control_hz={own}) for this file, and do not mix rates in one set"
            )
        rate = stated if own is None else own
        if rate is None:
            raise ValueError(f"{path} states no control_freq and card {self.card.name!r} no control_hz; give one")
        return float(rate)


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 ({error}); restore the file or leave it out") from error


def _demos(path: Path) -> list[str]:
    with _opened(path) as file:
        names = [name for name in file.get("data", {}) if re.fullmatch(r"demo_\d+", name)]
    if not names:
        raise ValueError(f"{path} holds no data/demo_<i>; expected demonstrations as LIBERO and robomimic store them")
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _join(group: Any, keys: tuple[str, ...], where: str) -> np.ndarray:
    """Arrays side by side: (T, D)."""
    missing = [key for key in keys if key not in group]
    if missing:
        raise ValueError(f"{where}: no {missing[0]!r} in {group.name}; expected one of {list(group)}")
    parts = [np.asarray(group[key], np.float64) for key in keys]
    if len({len(part) for part in parts}) > 1:
        lengths = {key: len(part) for key, part in zip(keys, parts, strict=True)}
        raise ValueError(f"{where}: {lengths} rows; expected as many in each")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _images(path: Path, demo: str, camera: str, flip: bool) -> np.ndarray:
    with _opened(path) as file:
        try:
            frames = np.asarray(file["data"][demo]["obs"][camera])
        except (KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"{path}, episode {demo!r}: {camera} cannot be read ({error}); restore it") from error
    return np.ascontiguousarray(frames[:, ::-1]) if flip else frames


def _upside_down(attrs: Any, camera: str) -> bool:
    """Robosuite's convention "opengl" has the first row at the bottom; robomimic turns its ``*_image`` upright."""
    convention = attrs.get("macros_image_convention")
    return camera.endswith("_rgb") if convention is None else str(convention) == "opengl"


def _json(attrs: Any, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(attrs.get(key, "{}")))
    except (TypeError, ValueError):
        return {}


def _instruction(attrs: Any) -> str:
    words = _json(attrs, "problem_info").get("language_instruction", "")
    return "".join(words) if isinstance(words, list) else str(words)
