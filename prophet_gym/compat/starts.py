"""Which snapshots a task of another project starts from."""

from __future__ import annotations

from typing import Any

from ..snapshot import Snapshot, SnapshotSet

__all__ = ["only_task", "pick_episode"]


def only_task(snapshots: Any, instruction: str, env_id: str) -> SnapshotSet:
    """Returns the snapshots with this instruction.

    Raises:
        ValueError: there are none.
    """
    chosen = [snapshot for snapshot in snapshots or () if snapshot.instruction == instruction]
    if not chosen:
        found = sorted({snapshot.instruction for snapshot in snapshots or ()})
        raise ValueError(
            f"{env_id} has no snapshot with the instruction {instruction!r}; its snapshots ask for {found}. "
            "Give snapshots=, a SnapshotSet or its folder, that holds some of this task."
        )
    return SnapshotSet(chosen)


def pick_episode(snapshots: Any, episode_id: int) -> Snapshot:
    """Returns snapshot ``episode_id``, counted modulo their number as the real environments count.

    Raises:
        ValueError: the world has no snapshots.
    """
    if snapshots is None:
        raise ValueError(f"episode_id={episode_id}: this world has no snapshots to choose from; give snapshots=.")
    return snapshots[episode_id % len(snapshots)]
