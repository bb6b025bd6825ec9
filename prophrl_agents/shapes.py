"""Shape checks at the public boundary: one helper, messages with letters."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LETTERS", "check_shape"]

LETTERS = {
    "B": "batch",
    "S": "policy calls",
    "K": "flow steps",
    "K+1": "flow steps + 1",
    "CH": "commands per chunk",
    "D": "action dimensions",
}


def check_shape(name: str, tensor: Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Checks one tensor against a layout such as ``"B S K CH D"`` and records the sizes it fixes.

    Args:
        name: argument name for the message.
        tensor: what the caller passed.
        letters: expected axes, separated by spaces.
        sizes: lengths already known; axes met for the first time are added, so that the next call compares with them.

    Raises:
        ValueError: wrong number of axes, or an axis whose length is known to be another.
    """
    axes = letters.split()
    shape = tuple(tensor.shape)
    if len(shape) != len(axes) or any(sizes.get(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
        wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        meaning = ", ".join(f"{axis} {LETTERS[axis]}" for axis in axes if axis in LETTERS)
        raise ValueError(f"{name} has shape {shape}, expected ({wanted}). Axes: {meaning}; reorder or reshape it so.")
    sizes.update(zip(axes, shape, strict=True))
