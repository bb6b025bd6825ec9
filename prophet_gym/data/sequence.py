"""What the readers of all formats share: a lazy sequence of episodes, and the same one without its bad members."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, overload

from tqdm import tqdm

from prophet_gym.data.episode import Episode
from prophet_gym.errors import MissingExtraError


class EpisodeSequence(Sequence[Episode], ABC):
    """Episodes that are read anew at every access; nothing is cached and no image decoded.

    Attributes:
        names: Name of each episode.
    """

    names: tuple[str, ...]

    @abstractmethod
    def read(self, index: int) -> Episode:
        """Read episode ``index``, 0 to ``len(self) - 1``.

        Raises:
            ValueError: If a file is missing, damaged or foreign; the message names file, episode and fix.
        """

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        """Read one episode, or a list of them for a slice; images stay undecoded."""
        positions = range(len(self))[index]
        return [self.read(i) for i in positions] if isinstance(positions, range) else self.read(positions)


class EpisodeRange(EpisodeSequence):
    """Neighbouring episodes of a sequence, as lazy as it is: slices are lists, which keep the frames they decode."""

    def __init__(self, episodes: EpisodeSequence, first: int, last: int) -> None:
        """Take episodes ``first`` up to, not including, ``last``.

        Raises:
            ValueError: If they are not 0 <= first < last <= len(episodes).
        """
        if not 0 <= first < last <= len(episodes):
            raise ValueError(f"episodes {first} to {last} of {len(episodes)}; expected 0 <= first < last <= all")
        self.episodes, self.first = episodes, first
        self.names = tuple(episodes.names[first:last])

    def read(self, index: int) -> Episode:
        """Read the episode at this place of the range."""
        return self.episodes.read(self.first + index)

    def __repr__(self) -> str:
        """Say which, and of what."""
        return f"EpisodeRange({len(self)} from {self.first} of {self.episodes!r})"


@dataclass(frozen=True)
class SkippedEpisode:
    """An episode that cannot be read.

    Attributes:
        name: Name of the episode.
        reason: The error, which names the file and the fix.
    """

    name: str
    reason: str


class SoundEpisodes(EpisodeSequence):
    """The episodes of a set that can be read and decoded; the others are listed in `skipped`.

    Attributes:
        names: Names of those left.
        skipped: The others, with reasons.
    """

    def __init__(self, episodes: Any, *, progress: bool = False) -> None:
        """Read and decode every episode once.

        Args:
            episodes: An `EpisodeSequence` or `EpisodeFolder`.
            progress: Show a progress bar with the remaining time.

        Raises:
            ValueError: If no episode is left.
        """
        self.episodes = episodes
        skipped, kept = [], []
        for i in tqdm(
            range(len(episodes)), desc="checking episodes", unit="episode", disable=None if progress else True
        ):
            try:
                len(episodes[i].frames)  # decodes them
                kept.append(i)
            except ValueError as error:
                skipped.append(SkippedEpisode(episodes.names[i], str(error)))
        if not kept:
            raise ValueError(f"none of {len(episodes)} episodes can be read. The first: {skipped[0].reason}")
        self._kept = kept
        self.names = tuple(episodes.names[i] for i in kept)
        self.skipped = tuple(skipped)

    def read(self, index: int) -> Episode:
        """Read the episode at this place among those left."""
        return self.episodes[self._kept[index]]

    def __repr__(self) -> str:
        """Say how many are left, and of what."""
        return f"SoundEpisodes({len(self)} of {self.episodes!r}, {len(self.skipped)} skipped)"


def need_extra(module: str, what: str) -> Any:
    """Import a module of the extra ``data``.

    Raises:
        MissingExtraError: It is not installed; the message holds the pip line.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'{what} needs {module}: pip install "prophet-gym[data]"') from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a metadata file that holds one JSON object.

    Raises:
        ValueError: It is missing, no JSON or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected a JSON object: restore the file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object of keys and values")
    return values
