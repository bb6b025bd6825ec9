"""Episodes of any length and size, cut into windows of one length and brought to one image size.

Training indexes clips as arrays, so all of them are equally long. A long episode gives several overlapping windows; the
last one ends where the episode ends. A window is an episode of its own: its history begins where it begins.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np

from prophet_gym.data.cards import Fit
from prophet_gym.data.episode import Episode
from prophet_gym.data.fitting import fit_camera, fit_frames, fit_points
from prophet_gym.data.sequence import EpisodeSequence

_KEPT = 2 * (os.cpu_count() or 1)  # decoded episodes kept, so that neighbouring windows share one decoding


class EpisodeWindows(EpisodeSequence):
    """Windows of ``length`` commands, in the order of the episodes.

    Attributes:
        names: ``<episode>@<first command>``.
        left_out: Names of the episodes that are shorter than a window.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        length: int,
        *,
        stride: int | None = None,
        image_size: tuple[int, int] | None = None,
        fit: Fit = "stretch",
        cover: bool = True,
    ) -> None:
        """Read how long the episodes are; no image is decoded.

        Args:
            episodes: Any lazy sequence of episodes, e.g. from `prophet_gym.data.open_dataset`.
            length: Commands of a window.
            stride: Commands between the starts of neighbouring windows; default half a window.
            image_size: (height, width) that images, cameras and labels in pixels (``*_px``) are brought to; by
                default they stay as they are.
            fit: How they come to that size: `prophet_gym.data.fitting`.
            cover: Whether a last window ends with the episode, wherever that starts; else some commands are left over,
                and windows whose stride is their length do not overlap.

        Raises:
            ValueError: If length or stride is below 1, or no episode is long enough.
        """
        stride = max(1, length // 2) if stride is None else stride
        if length < 1 or stride < 1:
            raise ValueError(f"windows of {length} commands every {stride}; expected at least 1 of both")
        self.episodes, self.length, self.image_size, self.fit = episodes, length, image_size, fit
        self._places: list[tuple[int, int]] = []
        names, left_out, longest = [], [], 0
        for i in range(len(episodes)):
            episode = episodes[i]
            last = len(episode) - length
            longest = max(longest, len(episode))
            if last < 0:
                left_out.append(episode.name)
                continue
            starts = [*range(0, last, stride), last] if cover else list(range(0, last + 1, stride))
            self._places += [(i, start) for start in starts]
            names += [f"{episode.name}@{start}" for start in starts]
        if not names:
            raise ValueError(
                f"none of {len(episodes)} episodes has {length} commands, the longest {longest}; use shorter windows"
            )
        self.names, self.left_out = tuple(names), tuple(left_out)
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sizes: dict[int, tuple[int, int]] = {}  # recorded ones, of the episodes with labels in pixels
        self._lock = Lock()

    def read(self, index: int) -> Episode:
        """Read one window; its frames are decoded at the first use, once for several windows of an episode.

        Labels in pixels that are brought to another size need the recorded one: one more decoding of an episode.
        """
        place, start = self._places[index]
        whole = self.episodes[place]
        rows = slice(start, start + self.length + 1)

        def part(values: Any) -> Any:
            return None if values is None else values[rows]

        camera = whole.camera
        if camera is not None and self.image_size is not None:
            camera = fit_camera(camera, self.image_size, self.fit)
        return replace(
            whole,
            images=lambda: self._frames(place, whole)[rows],
            actions=whole.actions[start : start + self.length],
            camera=camera,
            eef_pose=part(whole.eef_pose),
            gripper=part(whole.gripper),
            labels={key: self._scaled(key, part(value), place, whole) for key, value in whole.labels.items()},
            name=self.names[index],
            simulator_state=whole.simulator_state if start == 0 else None,
        )

    def _scaled(self, key: str, values: np.ndarray, place: int, episode: Episode) -> np.ndarray:
        if self.image_size is None or not key.endswith("_px"):
            return values
        if place not in self._sizes:
            _, height, width, _ = replace(episode).frames.shape  # of a copy: its frames are freed
            self._sizes[place] = (height, width)
        return fit_points(values, self._sizes[place], self.image_size, self.fit)

    def __repr__(self) -> str:
        """Say how many, how long, and of what."""
        return f"EpisodeWindows({len(self)} of {self.length} commands, of {self.episodes!r})"

    def _frames(self, place: int, episode: Episode) -> np.ndarray:
        with self._lock:
            if place in self._decoded:
                self._decoded.move_to_end(place)
                return self._decoded[place]
        frames = replace(episode).frames  # of a copy, as above
        frames = frames if self.image_size is None else fit_frames(frames, self.image_size, self.fit)
        with self._lock:
            self._decoded[place] = frames
            while len(self._decoded) > _KEPT:
                self._decoded.popitem(last=False)
        return frames
