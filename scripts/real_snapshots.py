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

# The recordings in bridge/ have no language: these sentences are ours. Two more would make the checkpoint too large to
# ship: a tap seen from elsewhere, and one in which nothing is moved.
BRIDGE = {
    "train_000": "move the red pan to the left of the yellow cloth",
    "train_001": "unfold the blue cloth",
    "train_005": "take the corn from the box and put it on the table",
    "train_006": "put the metal pot on the yellow cloth",
    "train_007": "move the purple cloth to the right",
    "train_008": "pick up the blue fork",
}
# Each of these recordings of the rig from one of its cameras.
DROID = {
    "exterior_1": ("0001", "0005", "0007", "0010", "0012"),
    "exterior_2": ("0002", "0006", "0008", "0011"),
}


def first_image(episode: Episode) -> Snapshot:
    """Returns where a recording begins."""
    return replace(episode.snapshot(), instruction=episode.instruction or BRIDGE[episode.name], name=episode.name)


def main(episodes: Positional[Path], out: Positional[Path]) -> None:
    """Writes both sets.

    Args:
        episodes: folder with bridge/ and droid/, calibrated.
        out: where bridge/ and droid/ go.
    """
    chosen = {
        "bridge": list(BRIDGE),
        "droid": [f"{camera}_droid_new_setup_val_{number}" for camera, numbers in DROID.items() for number in numbers],
    }
    for robot, names in chosen.items():
        recordings = EpisodeFolder(episodes / robot)
        SnapshotSet(first_image(recordings[recordings.names.index(name)]) for name in names).save(out / robot)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
