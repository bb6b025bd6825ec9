"""From one format to another: ``prophet convert``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from ..data.episode import Episode
from ..data.fitting import stretched
from ..data.folder import write_episode
from ..data.lerobot_writer import write_lerobot
from ..data.opening import open_dataset
from ..data.variants import VARIANT_OF, augmented, mirrored, reversed_in_time

__all__ = ["convert"]


def convert(
    data: Positional[Path],
    out: Positional[Path],
    format: Literal["folder", "lerobot"] = "folder",  # noqa: A002 (the name of the flag)
    card: str | None = None,
    camera: str | None = None,
    image_size: tuple[int, int] | None = None,
    episodes: tuple[int, ...] = (),
    leave_out: tuple[int, ...] = (),
    prefix: str = "",
    variants: int = 0,
    mirror: bool = False,
    reverse: bool = False,
    seed: int = 0,
    control_hz: float | None = None,
) -> None:
    """Write a data set anew, as a folder of episodes or a LeRobotDataset v3.0: other images, some of its episodes.

    A folder of episodes may exist, so that several sets or cameras can be gathered in one; episodes of a name that is
    there already are an error. In a folder, `/` in names (of several HDF5 files) becomes `_`.

    Args:
        data: a data set of any format.
        out: where it goes.
        format: "folder" keeps everything and every pixel; "lerobot" is compressed, without labels.
        card: what the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera; the card's or the first by default.
        image_size: height and width in pixels that images and calibration are stretched to; as they are by default.
        episodes: which, by number from 0; all by default.
        leave_out: which not, by number from 0.
        prefix: put before the names of episodes.
        variants: further copies of each episode, each seen through a random crop, stretched to the episode's size or
            `image_size`, and in another light.
        mirror: mirror half of the variants, left and right exchanged in images, camera, poses and commands.
        reverse: play half of the variants backwards; for recordings whose images follow the commands at once.
        seed: of these variants.
        control_hz: rate to state instead of the recorded one, commands a second; so that sets of nearly the same rate
            can be gathered in one, since a command says how far, not how fast.
    """
    source = open_dataset(data, card=card, camera=camera)
    unknown = sorted({i for i in (*episodes, *leave_out) if not 0 <= i < len(source)})
    if unknown:
        raise ValueError(f"episodes {unknown} of {data}: expected numbers from 0 to {len(source) - 1}")
    chosen = [i for i in dict.fromkeys(episodes or range(len(source))) if i not in leave_out]
    if not chosen:
        raise ValueError(f"nothing is left of {data}: all {len(source)} episodes are left out")
    if variants < 0:
        raise ValueError(f"variants={variants}: expected 0 or more")

    def converted() -> Iterator[Episode]:
        for i in tqdm(chosen, unit="episode", mininterval=1.0):
            for k in range(1 + variants):
                size = image_size
                name = f"{prefix}{source.names[i]}"
                if format == "folder":  # a folder in a folder would not be found
                    name = name.replace("/", "_")
                episode = replace(source[i], name=f"{name}_v{k:02d}" if k else name)
                if control_hz is not None:
                    spec = replace(episode.action_spec, control_hz=control_hz)
                    episode = replace(episode, action_spec=spec, fps=control_hz)
                if k:
                    rng = np.random.default_rng([seed, i, k])
                    if mirror and rng.random() < 0.5:
                        episode = mirrored(episode)
                    if reverse and rng.random() < 0.5:
                        episode = reversed_in_time(episode)
                    size = size or episode.frames.shape[1:3]  # crops differ in size, and a set has one
                    episode = augmented(episode, rng)
                    episode = replace(episode, metadata={**episode.metadata, VARIANT_OF: name})
                yield episode if size is None else stretched(episode, size)

    if format == "lerobot":
        write_lerobot(out, converted())
    else:
        for episode in converted():
            write_episode(out / episode.name, episode)
    copies = f", {1 + variants} times each" if variants else ""
    print(f"{len(chosen)} of {len(source)} episodes{copies}: {out}")
