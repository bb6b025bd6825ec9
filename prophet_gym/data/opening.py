"""One entry for data sets of every format: the files tell which it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from prophet_gym.data.cards import DatasetCard
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.hdf5 import SUFFIXES, HDF5Episodes
from prophet_gym.data.lerobot import LeRobotEpisodes
from prophet_gym.data.rlds import RLDSEpisodes
from prophet_gym.data.sequence import EpisodeSequence, SoundEpisodes

Format = Literal["lerobot", "hdf5", "rlds", "folder"]


def detect_format(path: str | os.PathLike[str]) -> tuple[Format, Path]:
    """Recognise a data set by its files.

    Returns:
        The format, and the file or folder that its reader takes (of TFDS, the newest version's folder).

    Raises:
        ValueError: If there is nothing at `path`, or nothing known.
    """
    path = Path(path)
    if path.is_file() and path.suffix in SUFFIXES:
        return "hdf5", path
    if path.is_dir():
        if (path / "meta" / "info.json").is_file():
            return "lerobot", path
        if (path / "features.json").is_file():
            return "rlds", path
        versions = [file.parent for file in path.glob("*/features.json")]
        if versions:
            return "rlds", max(versions, key=_version)
        if any(file.suffix in SUFFIXES for file in path.iterdir()):
            return "hdf5", path
        if any(not file.parent.name.startswith(".") for file in path.glob("*/meta.json")):
            return "folder", path
    what = "is no file or folder" if not path.exists() else "holds no data set that is known here"
    raise ValueError(
        f"{path} {what}; expected a folder with meta/info.json (LeRobot), features.json or <version>/features.json "
        f"(RLDS), *{' or *'.join(SUFFIXES)} (LIBERO, robomimic), or <episode>/meta.json (folder of episodes; "
        "`prophet record` makes one)"
    )


def open_dataset(
    path: str | os.PathLike[str],
    *,
    card: str | DatasetCard | None = None,
    camera: str | None = None,
    split: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
) -> EpisodeSequence | EpisodeFolder:
    """Open a data set of any format that is read here, as a lazy sequence of episodes.

    Args:
        path: File or folder; its format is recognised (`detect_format`).
        card: What the numbers mean: a name of `CARDS`, a TOML file (`read_card`), or a card. Needed for RLDS, and for
            LeRobot sets that carry none; LIBERO's by default for HDF5; none for a folder of episodes, which says it
            itself.
        camera: Which camera; see the readers for the default.
        split: Split of an RLDS set, ``"train"`` by default.
        on_error: ``"raise"`` at the access of a bad episode; ``"skip"`` reads and decodes all of them once now, leaves
            the bad ones out, and lists them in `SoundEpisodes.skipped`.
        progress: Show a progress bar while ``"skip"`` reads.

    Raises:
        ValueError: If the format is not recognised, the set is unreadable as a whole, or an argument does not fit it.
        MissingExtraError: The format needs the extra ``data``.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    kind, place = detect_format(path)
    if split is not None and kind != "rlds":
        raise ValueError(f"{place} is of format {kind!r}, which has no splits; leave out split={split!r}")
    episodes: Any
    if kind == "folder":
        if card is not None:
            raise ValueError(f"{place} is a folder of episodes, which state their own conventions; leave out card=")
        episodes = EpisodeFolder(place, camera_name=camera)
    elif kind == "lerobot":
        episodes = LeRobotEpisodes(place, card=card, camera=camera)
    elif kind == "hdf5":
        episodes = HDF5Episodes(place, card="libero" if card is None else card, camera=camera)
    else:
        if card is None:
            raise ValueError(
                f"{place} is an RLDS data set, which does not say what its numbers mean; give card='bridge', ..."
            )
        episodes = RLDSEpisodes(place, card=card, camera=camera, split=split or "train")
    return SoundEpisodes(episodes, progress=progress) if on_error == "skip" else episodes


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in folder.name.split("."))
