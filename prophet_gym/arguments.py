"""Checks of what callers give an environment; each failure is a ``ValueError`` that names expected and received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from .errors import nearest
from .snapshot import Snapshot


def parse_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Returns ``mode`` as the enumeration's member."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        values = [known.value for known in AutoresetMode]
        raise ValueError(
            f"autoreset_mode={mode!r}: expected an AutoresetMode or one of {values}.{nearest(mode, values)}"
        ) from None


def require_between(name: str, value: int, low: int, high: int | None) -> None:
    """Requires an integer from ``low`` to ``high``; None is no upper limit."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or (high and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high} (the model's maximum)"
        raise ValueError(f"{name}={value!r}: expected an integer {limits}.")


def known_options(options: dict[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    """Returns a copy of the reset options after requiring that all of them are ``known``."""
    for key in options or {}:
        if key not in known:
            raise ValueError(f"Unknown reset option {key!r}; known are {list(known)}.{nearest(key, known)}")
    return dict(options or {})


def per_slot(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    """Returns ``values`` as a list of ``count``; None stands for a list of None."""
    if values is None:
        return [None] * count
    if isinstance(values, str | dict | Snapshot) or not hasattr(values, "__len__") or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list | tuple | np.ndarray) else type(values).__name__
        raise ValueError(f"{name}: expected one entry for each of the {count} slots, got {found}.")
    return list(values)


def require_snapshots(snapshots: Any) -> None:
    """Requires None, or a sequence of at least one snapshot."""
    if snapshots is None:
        return
    expected = "expected a SnapshotSet, a list of prophet_gym.Snapshot, or None"
    if isinstance(snapshots, str) or not isinstance(snapshots, Sequence):
        hint = ": give [snapshot]" if isinstance(snapshots, Snapshot) else ""
        raise ValueError(f"snapshots is a {type(snapshots).__name__}; {expected}{hint}.")
    if len(snapshots) == 0:
        raise ValueError("snapshots is empty; expected at least one Snapshot, or None.")
    for index, snapshot in enumerate(snapshots):
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"snapshots[{index}] is a {type(snapshot).__name__}; {expected}.")


def require_snapshot(snapshot: Any, index: int) -> Snapshot:
    """Returns ``snapshot`` after requiring that it is one."""
    if not isinstance(snapshot, Snapshot):
        raise ValueError(f"Slot {index}: expected a prophet_gym.Snapshot, got {type(snapshot).__name__}.")
    return snapshot
