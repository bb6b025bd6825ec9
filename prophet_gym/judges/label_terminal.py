"""Labels asked for in the terminal: a few frames of a rollout as coloured half blocks, then one letter.

A terminal that shows 24-bit colours draws two pixels in every cell: the upper one as the colour of "▀", the lower one
as its background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from prophet_gym.judges.human_labels import read_labels, write_labels
from prophet_gym.judges.pictures import spread_indices

if TYPE_CHECKING:
    from prophet_gym.data.episode import Episode

__all__ = ["ansi_strip", "label_in_terminal"]

LETTERS = {"y": "success", "n": "failure", "u": "unsure"}
QUESTION = "success? [y]es, [n]o, [u]nsure, [b]ack, [q]uit: "


def ansi_strip(frames: np.ndarray, width: int) -> str:
    """Returns frames side by side as text with 24-bit colour codes.

    Args:
        frames: (T, H, W, 3) uint8.
        width: of a frame in columns; its height follows from its shape.

    Returns:
        Lines of ``T * (width + 1)`` cells.

    Raises:
        ValueError: a width below 4 columns.
    """
    if width < 4:
        raise ValueError(f"width={width}: expected at least 4 columns for a frame.")
    height = max(2, round(width * frames.shape[1] / frames.shape[2] / 2) * 2)
    small = [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)) for frame in frames]
    lines = []
    for row in range(0, height, 2):
        line = []
        for picture in small:
            for upper, lower in zip(picture[row].tolist(), picture[row + 1].tolist(), strict=True):
                line.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*upper, *lower))
            line.append("\x1b[0m ")
        lines.append("".join(line))
    return "\n".join(lines)


def label_in_terminal(
    episodes: Iterable[Episode],
    out: str | Path,
    *,
    total: int,
    frames: int = 6,
    width: int = 24,
    ask: Callable[[str], str] = input,
    show: Callable[[str], None] = print,
) -> dict[str, str]:
    """Asks about every episode that has no label yet; each answer is kept at once.

    Args:
        episodes: with names of their own.
        out: JSON file of the labels, continued where it is there.
        total: number of episodes, for the display.
        frames: shown of each, the first and the last among them.
        width: of a frame in columns.
        ask: shows a question and returns the answer; the end of the input stops as "q" does.
        show: shows a text.

    Returns:
        All labels in the file, by episode name.

    Raises:
        ValueError: ``out`` is not a file of labels, or a setting is out of range.
    """
    if frames < 2:
        raise ValueError(f"frames={frames}: expected at least 2, the first and the last.")
    labels = read_labels(out) if Path(out).exists() else {}
    open_ones = ((number, each) for number, each in enumerate(episodes, 1) if each.name not in labels)
    before: list[tuple[int, Episode]] = []  # only those of this sitting can be gone back to
    ahead: list[tuple[int, Episode]] = []
    while True:
        number, episode = ahead.pop() if ahead else next(open_ones, (0, None))
        if episode is None:
            return labels
        shown = spread_indices(len(episode.frames), frames)
        show(f"\n{number} of {total}  {episode.name}: {episode.instruction or '(no instruction)'}")
        show(ansi_strip(episode.frames[shown], width))
        show(f"frames {', '.join(map(str, shown))}")
        answer = _answer(ask, show, can_go_back=bool(before))
        if answer == "q":
            return labels
        if answer == "b":
            ahead += [(number, episode), before.pop()]
            continue
        labels[episode.name] = LETTERS[answer]
        before.append((number, episode))
        write_labels(out, labels)


def _answer(ask: Callable[[str], str], show: Callable[[str], None], *, can_go_back: bool) -> str:
    while True:
        try:
            answer = ask(QUESTION).strip().lower()[:1]
        except EOFError:
            return "q"
        if answer in LETTERS or answer == "q" or (answer == "b" and can_go_back):
            return answer
        show("nothing to go back to" if answer == "b" else "please answer y, n, u, b or q")
