"""Answers on disk, one small JSON file for each question, so that a rollout is paid for once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prophet_gym.judges.backends import Answer
from prophet_gym.strict_json import to_json

__all__ = ["AnswerCache"]

logger = logging.getLogger(__name__)


class AnswerCache:
    """A folder of answers; several processes may share it.

    Files are written beside their place and renamed, so that a reader never sees half of one. One that cannot be read
    is reported and asked for again. What failed is never kept.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: it cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache={str(folder)!r} is no folder and cannot be made one ({error}).") from error

    def get(self, key: str) -> list[Answer] | None:
        """Returns the answers under ``key``, or None."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            return [_answer(**fields) for fields in entry["answers"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("Cached answers in %s cannot be read and are asked for again: %s", path, error)
            return None

    def put(self, key: str, answers: Sequence[Answer], about: Mapping[str, Any]) -> None:
        """Keeps ``answers`` unless one of them is an error.

        Args:
            key: a hex digest.
            answers: to one question.
            about: what a person who opens the file wants to know, as JSON values.
        """
        if any(answer.error for answer in answers):
            return
        path = self._path(key)
        # Unique among machines too; mkstemp's would be unreadable to other people who share the folder.
        temporary = path.with_name(f".{key[:12]}.{uuid.uuid4().hex}")
        rows = [{name: value for name, value in asdict(answer).items() if name != "error"} for answer in answers]
        content = to_json({**about, "answers": rows})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:  # a full disk must not cost the verdicts that were paid for
            logger.warning("Answers cannot be kept in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _answer(text: str, finished: bool, probability: float | None) -> Answer:
    """Builds an answer from a file's fields, whose types nobody has checked."""
    if not isinstance(text, str) or not isinstance(finished, bool):
        raise ValueError(f"text={text!r}, finished={finished!r}: expected a string and a bool")
    if probability is not None and not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability={probability!r} is outside [0, 1]")
    return Answer(text, finished=finished, probability=probability)
