"""Starts of the packaged Bridge and DROID worlds: first images of the calibrated recordings, with instructions.

``python scripts/real_snapshots.py EPISODES OUT`` takes what ``real_cameras.py`` wrote and writes ``OUT/bridge`` and
``OUT/droid``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro
from tyro.conf import Positional

from prophet_gym import Snapshot, SnapshotSet
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder

# The recordings in bridge/ have no language. These sentences are ours: what is done, or, in 009, could be.
OURS = {
    "train_000": "move the red pan to the left of the yellow cloth",
    "train_001": "unfold the blue cloth",
    "train_004": "turn the tap to the left",
    "train_005": "take the corn from the box and put it on the table",
    "train_006": "put the metal pot on the yellow cloth",
    "train_007": "move the purple cloth to the right",
    "train_008": "pick up the blue fork",
    "train_009": "pick up the yellow bottle",
}


def first_image(episode: Episode) -> Snapshot:
    """Returns where a recording begins."""
    return replace(episode.snapshot(), instruction=episode.instruction or OURS.get(episode.name, ""), name=episode.name)


def main(episodes: Positional[Path], out: Positional[Path]) -> None:
    """Writes both sets.

    Args:
        episodes: folder with bridge/ and droid/, calibrated.
        out: where bridge/ and droid/ go.
    """
    for robot in ("bridge", "droid"):
        SnapshotSet(first_image(episode) for episode in EpisodeFolder(episodes / robot)).save(out / robot)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
