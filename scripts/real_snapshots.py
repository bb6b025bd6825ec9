"""Starts of the packaged Bridge and DROID worlds: first frames of the recordings, with instructions.

``python scripts/real_snapshots.py RECORDINGS OUT`` writes ``OUT/bridge`` and ``OUT/droid``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro
from tyro.conf import Positional

from prophet_gym import Snapshot, SnapshotSet
from prophet_gym.data.opening import open_dataset
from prophet_gym.world_model.resized import resized_snapshot

# The recordings in bridge/ have no language: these sentences are ours, from watching them.
OURS = {
    "train_000": "move the red pan to the left of the yellow cloth",
    "train_001": "unfold the blue cloth",
    "train_004": "turn the tap to the left",
    "train_005": "take the corn from the box and put it on the table",
    "train_006": "put the metal pot on the yellow cloth",
    "train_007": "move the purple cloth to the right",
    "train_008": "pick up the blue fork",
}


def first_frame(source: Path, index: int, size: tuple[int, int], camera: str | None = None) -> Snapshot:
    """Returns where a recording begins; its pose is the origin where none was measured."""
    episode = open_dataset(source, camera=camera)[index].with_poses()
    name = f"{source.name}/{episode.name}"
    instruction = episode.instruction or OURS.get(episode.name, "")
    return replace(resized_snapshot(episode.snapshot(), size), name=name, instruction=instruction)


def main(recordings: Positional[Path], out: Positional[Path]) -> None:
    """Writes both sets.

    Args:
        recordings: folder with bridge/, bridge64/ and droid/.
        out: where bridge/ and droid/ go.
    """
    bridge, small, droid = (recordings / name for name in ("bridge", "bridge64", "droid"))
    wide, instructed = (256, 256), [i for i, e in enumerate(open_dataset(droid)) if e.instruction]
    starts = [first_frame(bridge, i, wide) for i in range(len(OURS))]
    starts += [first_frame(small, i, wide, "image_0") for i in range(len(open_dataset(small)))]
    SnapshotSet(starts).save(out / "bridge")
    SnapshotSet(first_frame(droid, i, (192, 320), "exterior_1") for i in instructed).save(out / "droid")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
