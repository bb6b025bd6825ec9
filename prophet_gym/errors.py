"""Errors with a name of their own, and the nearest-name hint that their messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["MissingCheckpointError", "MissingExtraError", "nearest"]


class MissingCheckpointError(ValueError):
    """No weights for a world; the message holds the command that gets or trains some."""


class MissingExtraError(ValueError):
    """A package of an extra is not installed; the message holds the pip line that brings it."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
