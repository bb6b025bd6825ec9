"""Several data sets to pretrain on (paper 4.1.1): a TOML file names them, and every mini-batch comes from one of them.

Resolution, conventions and conditioning differ between data sets, so a batch cannot mix them. Which one a micro-batch
is drawn from follows from the seed and its number alone: all processes draw from the same one, and a resumed run from
the same ones. A large set is drawn more often, with probability proportional to weight * clips^(1 / temperature).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..data.cards import Fit, get_card, is_card_file
from ..data.episode import Episode
from ..data.windows import EpisodeWindows
from ..errors import nearest
from .clips import ClipSource

DEFAULT_CLIP_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class MixtureDataset:
    """One data set of a mixture; the keys of a ``[[dataset]]`` table are these fields.

    Attributes:
        path: The data, of any format; relative to the file.
        name: Short name for logs and cache folders; default that of the path.
        card: What the numbers mean, for formats that do not say: a name, or a TOML file.
        camera: Which camera; the card's or the first by default.
        clip_length: Commands of a clip, at least a chunk; longer episodes give several, shorter ones are left out.
        image_size: (height, width), multiples of 16; default the card's, or as recorded.
        fit: How images come to that size; default the card's, or "stretch".
        episodes: First episode and the one after the last; default all.
        weight: Factor on how often it is drawn, beside its size.
        draw_actions: Whether action frames are drawn; default: where episodes have camera and poses. Some of both is an
            error that asks for a choice.
    """

    path: Path
    name: str
    card: str | None = None
    camera: str | None = None
    clip_length: int = DEFAULT_CLIP_LENGTH
    image_size: tuple[int, int] | None = None
    fit: Fit | None = None
    episodes: tuple[int, int] | None = None
    weight: float = 1.0
    draw_actions: bool | None = None

    def __post_init__(self) -> None:
        """Check what does not need the data."""
        if not self.weight > 0:
            raise ValueError(f"dataset {self.name!r}: weight={self.weight}; expected a number above 0")
        if self.image_size is not None and (
            len(self.image_size) != 2 or any(s % 16 or s < 16 for s in self.image_size)
        ):
            raise ValueError(
                f"dataset {self.name!r}: image_size={self.image_size}; expected [height, width], multiples of 16"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"dataset name {self.name!r}; expected a name for a folder")

    @property
    def source(self) -> ClipSource:
        """How the data become clips."""
        card = None if self.card is None else get_card(self.card)
        size = self.image_size or (card.resolution if card else None)
        fit = self.fit or (card.fit if card else None) or "stretch"
        return ClipSource(self.card, self.camera, self.clip_length, size, self.episodes, fit)


@dataclass(frozen=True)
class Mixture:
    """Data sets, and how a large one counts against a small one.

    Attributes:
        datasets: At least one, of different names.
        temperature: 1 draws all clips equally often, infinity all data sets.
    """

    datasets: tuple[MixtureDataset, ...]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check names and temperature."""
        names = [dataset.name for dataset in self.datasets]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"data sets named {names}; expected at least one, and different names: give name=")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; expected a number above 0")

    def shares(self, clips: Sequence[int]) -> np.ndarray:
        """Probability of each data set, float64, given its number of clips."""
        weights = np.array([dataset.weight for dataset in self.datasets])
        raw = weights * np.asarray(clips, np.float64) ** (1.0 / self.temperature)
        return raw / raw.sum()


def draw_dataset(shares: np.ndarray, seed: int, micro_batch: int) -> int:
    """The data set that a micro-batch is drawn from, the same in every process."""
    return int(np.random.default_rng([seed, 11, micro_batch]).choice(len(shares), p=shares))


def read_mixture(file: str | Path) -> Mixture:
    """Read a mixture from a TOML file; the data are not opened.

    Raises:
        ValueError: no TOML, an unknown key, a wrong type, or settings that contradict each other; the message names
            the file.
    """
    file = Path(file)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as TOML ({error}); expected [[dataset]] tables") from error
    try:
        _known(values, ("temperature", "dataset"))
        tables = values.get("dataset", [])
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            raise ValueError("dataset is no list of tables; expected one [[dataset]] for each")
        temperature = values.get("temperature", 1.0)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise ValueError(f"temperature={temperature!r}; expected a number")
        return Mixture(tuple(_dataset(table, file.parent) for table in tables), float(temperature))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "name": (str,),
    "card": (str,),
    "camera": (str,),
    "clip_length": (int,),
    "image_size": (list,),
    "fit": (str,),
    "episodes": (list,),
    "weight": (int, float),
    "draw_actions": (bool,),
}


def _dataset(table: Mapping[str, Any], folder: Path) -> MixtureDataset:
    _known(table, [field.name for field in fields(MixtureDataset)])
    if "path" not in table:
        raise ValueError(f"[[dataset]] with {sorted(table)} and no path; expected a path to the data")
    for key, value in table.items():
        pair = key in ("image_size", "episodes")
        sound = isinstance(value, _KINDS[key]) and (isinstance(value, bool) == (key == "draw_actions"))
        if not sound or (pair and not (len(value) == 2 and all(type(item) is int for item in value))):
            kind = "two whole numbers" if pair else " or ".join(kind.__name__ for kind in _KINDS[key])
            raise ValueError(f"dataset {table['path']!r}: {key}={value!r}; expected {kind}")
    if table.get("fit") not in (None, "stretch", "pad_or_crop"):
        raise ValueError(f"dataset {table['path']!r}: fit={table['fit']!r}; expected 'stretch' or 'pad_or_crop'")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    path = folder / str(plain.pop("path"))
    if is_card_file(plain.get("card", "")):
        plain["card"] = str(folder / plain["card"])
    return MixtureDataset(path=path, **{"name": path.name, **plain})


def _known(table: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = sorted(set(table) - set(names))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; expected {', '.join(names)}.{nearest(unknown[0], names)}")


@dataclass(frozen=True, eq=False)
class OpenedDataset:
    """What the plan and the run know of a data set before an image is decoded.

    Attributes:
        dataset: As the file says, with the image size of its images.
        clips: Windows of ``clip_length`` commands.
        draws: Whether action frames are drawn.
        first: The first clip, for its conventions.
    """

    dataset: MixtureDataset
    clips: int
    draws: bool
    first: Episode

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that it is trained at."""
        assert self.dataset.image_size is not None
        return self.dataset.image_size


def open_mixture(
    mixture: Mixture,
    *,
    chunk_length: int,
    num_effectors: int | None,
    action_frames: Literal["none", "pooled", "spatial"],
) -> list[OpenedDataset]:
    """Open every data set and count its clips; of images, at most the first is decoded, for its size.

    Args:
        mixture: as read.
        chunk_length: commands of a chunk of the denoiser.
        num_effectors: end-effectors of the denoiser; None for as many as the data have.
        action_frames: of the denoiser; "none" draws none.

    Raises:
        ValueError: a set cannot be opened, its clips are shorter than a chunk, it has more end-effectors than the
            denoiser, or action frames are asked for and a camera or poses are missing.
    """
    opened = []
    for dataset in mixture.datasets:
        if dataset.clip_length < chunk_length:
            raise ValueError(
                f"dataset {dataset.name!r}: clips of {dataset.clip_length} commands; expected at least {chunk_length}, "
                "a chunk of the denoiser"
            )
        source = dataset.source
        clips = source.open(dataset.path)
        first = clips[0]
        size = source.image_size or first.frames.shape[1:3]
        if num_effectors is not None and first.action_spec.num_effectors > num_effectors:
            raise ValueError(
                f"dataset {dataset.name!r}: commands of {first.action_spec.num_effectors} end-effectors; the denoiser "
                f"has {num_effectors}"
            )
        episodes = clips.episodes if isinstance(clips, EpisodeWindows) else clips
        drawable = sum(_drawable(episodes[i]) for i in range(len(episodes)))
        draws = drawable > 0 if dataset.draw_actions is None else dataset.draw_actions
        if draws and action_frames != "none" and drawable < len(episodes):
            raise ValueError(
                f"dataset {dataset.name!r}: camera and poses are known of {drawable} of {len(episodes)} episodes; "
                "expected all of them: give draw_actions = false, or leave the others out"
            )
        sized = replace(dataset, image_size=(int(size[0]), int(size[1])))
        opened.append(OpenedDataset(sized, len(clips), draws and action_frames != "none", first))
    return opened


def _drawable(episode: Episode) -> bool:
    return episode.camera is not None and episode.eef_pose is not None
