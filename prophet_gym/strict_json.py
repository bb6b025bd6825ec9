"""JSON that every reader takes: nan and infinity, which JSON lacks and Python writes all the same, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["json_ready", "to_json"]


def json_ready(value: Any) -> Any:
    """Replace what JSON cannot hold: nan and infinity become None, numpy numbers become Python's, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = 1) -> str:
    """Return ``value`` as strict JSON text that ends in a newline.

    Raises:
        TypeError: something else than mappings, lists, tuples, strings, numbers, booleans and None.
    """
    return json.dumps(json_ready(value), indent=indent, allow_nan=False) + "\n"
