"""Labels asked for in a browser: one HTML file that holds its frames, plays them, and downloads what was answered.

Nothing is loaded from elsewhere and nothing sent. Answers stay in the browser until they are downloaded; the page opens
at the first rollout without one.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from prophet_gym.atomic import atomic_text
from prophet_gym.judges.human_labels import FORMAT
from prophet_gym.judges.pictures import spread_indices

if TYPE_CHECKING:
    from prophet_gym.data.episode import Episode

__all__ = ["write_label_page"]

_PAGE = Path(__file__).with_suffix(".html")
MOST_FRAMES, MOST_PIXELS, JPEG_QUALITY = 60, 192, 80


def write_label_page(
    episodes: Iterable[Episode], path: str | Path, labels: Mapping[str, str] | None = None, *, name: str = ""
) -> None:
    """Writes the page in one step.

    Up to 60 frames of a rollout are kept, of at most 192 pixels: some 100 to 300 KB for each.

    Args:
        episodes: with names of their own.
        path: of the HTML file.
        labels: already given, by episode name; the page shows and keeps them.
        name: of the data set, for the title and for what the browser remembers.

    Raises:
        ValueError: there are no episodes.
    """
    rollouts = [
        {"name": e.name, "instruction": e.instruction, "frames": (shown := spread_indices(len(e.frames), MOST_FRAMES)),
         "strip": _strip(e.frames[shown])}
        for e in episodes
    ]  # fmt: skip
    if not rollouts:
        raise ValueError("A label page needs at least one episode, got none.")
    content = {"format": FORMAT, "set": name, "rollouts": rollouts, "labels": dict(labels or {})}
    page = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(name or "rollouts"),
        content=json.dumps(content).replace("<", "\\u003c"),  # an instruction must not end the script
    )
    atomic_text(path, page)


def _strip(frames: np.ndarray) -> str:
    """All frames side by side as one JPEG, as a data URL: neighbours of one picture compress and load together."""
    height, width = frames.shape[1:3]
    factor = min(1.0, MOST_PIXELS / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    tiles = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1)).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
