"""What people say about rollouts, in one small JSON file: the truth where no simulator tells it.

Labels go by the episode's name. Frames that a world model imagined of the same actions take the label of the episode,
as simulator labels do (paper 3.4.1).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from prophet_gym.atomic import atomic_text
from prophet_gym.errors import nearest
from prophet_gym.strict_json import to_json

__all__ = ["LABELS", "known_labels", "merge_labels", "read_labels", "write_labels"]

LABELS = ("success", "failure", "unsure")
FORMAT = "prophet_gym.rollout_labels"


def read_labels(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns labels of :data:`LABELS` by episode name.

    Raises:
        ValueError: no such file, or not one of labels.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of labels ({error}); `prophet judge label` writes one.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("labels"), dict):
        raise ValueError(f'{path}: expected an object with "format": "{FORMAT}" and "labels" by episode name.')
    for name, label in values["labels"].items():
        if label not in LABELS:
            raise ValueError(f"{path}: episode {name!r} is labelled {label!r}; expected one of {LABELS}."
                             f"{nearest(label, LABELS)}")  # fmt: skip
    return values["labels"]


def write_labels(path: str | os.PathLike[str], labels: Mapping[str, str]) -> None:
    """Writes labels of :data:`LABELS` by episode name; the file changes in one step."""
    atomic_text(path, to_json({"format": FORMAT, "labels": dict(sorted(labels.items()))}))


def known_labels(labels: Mapping[str, str]) -> dict[str, bool]:
    """Returns success by episode name, without those about which the person was unsure."""
    return {name: label == "success" for name, label in labels.items() if label != "unsure"}


def merge_labels(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> tuple[int, int]:
    """Takes the labels of another file into this one; the other's count where both know an episode.

    Args:
        path: changed in one step, or made.
        other: for example what the label page downloaded.

    Returns:
        How many episodes are new, and how many changed their label.

    Raises:
        ValueError: a file that is not one of labels.
    """
    mine = read_labels(path) if Path(path).exists() else {}
    theirs = read_labels(other)
    changed = sum(mine.get(name, label) != label for name, label in theirs.items())
    write_labels(path, {**mine, **theirs})
    return len(theirs.keys() - mine.keys()), changed
