"""Pictures of an evaluation: real-over-imagined strips (PNG) and side-by-side videos (MP4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fidelity import check_video_pair

STRIP_TILE, VIDEO_TILE = 128, 192
"""About the height of one drawn frame in pixels; small frames are enlarged by a whole factor, unsmoothed."""

_GAP, _MARGIN, _LINE = 4, 92, 26
_INK, _PAPER, _FAINT = (30, 30, 30), (255, 255, 255), (110, 110, 110)


@dataclass(frozen=True, eq=False)
class Comparison:
    """One episode to draw.

    Attributes:
        title: line above it, such as the instruction and the outcome.
        real: (T + 1, H, W, 3) uint8, start frame first.
        imagined: (T + 1, H, W, 3) uint8, start frame first (the same one).

    Raises:
        ValueError: if the videos are not two equal (T + 1, H, W, 3) uint8 arrays.
    """

    title: str
    real: np.ndarray
    imagined: np.ndarray

    def __post_init__(self) -> None:
        check_video_pair(self.real, self.imagined)


def draw_strips(comparisons: Sequence[Comparison], columns: int = 9) -> np.ndarray:
    """Frames over time, the real row above the imagined row, one pair of rows per episode.

    Args:
        comparisons: episodes of equal length and frame size.
        columns: number of moments shown, evenly spread from the start frame to the last one.

    Returns:
        (H', W', 3) uint8 picture.

    Raises:
        ValueError: if there is nothing to draw, or the episodes differ in length or frame size.
    """
    _check_equal(comparisons)
    moments = np.unique(np.linspace(0, len(comparisons[0].real) - 1, columns).round().astype(int))
    tile = _enlarge(comparisons[0].real[0], STRIP_TILE).shape
    block_height = _LINE + 2 * (tile[0] + _GAP) + 3 * _GAP
    width = _MARGIN + len(moments) * (tile[1] + _GAP)
    canvas = Image.new("RGB", (width, _LINE + len(comparisons) * block_height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for column, t in enumerate(moments):
        label = "t = 0 (given)" if t == 0 else f"t = {t}"
        pen.text((_MARGIN + column * (tile[1] + _GAP), 5), label, _FAINT, font=_font(15))
    for row, comparison in enumerate(comparisons):
        top = _LINE + row * block_height
        pen.text((_MARGIN, top + 2), comparison.title, _INK, font=_font(17))
        for offset, name in enumerate(("real", "imagined")):
            y = top + _LINE + offset * (tile[0] + _GAP)
            pen.text((8, y + tile[0] // 2 - 10), name, _INK, font=_font(17))
            for column, t in enumerate(moments):
                frame = getattr(comparison, name)[t]
                canvas.paste(Image.fromarray(_enlarge(frame, STRIP_TILE)), (_MARGIN + column * (tile[1] + _GAP), y))
    return np.asarray(canvas).copy()


def draw_side_by_side(comparisons: Sequence[Comparison], columns: int = 3) -> np.ndarray:
    """A video of several episodes at once, real on the left and imagined on the right of each panel.

    Args:
        comparisons: episodes of equal length and frame size.
        columns: panels in a row.

    Returns:
        (T + 1, H', W', 3) uint8 video with even H' and W'.

    Raises:
        ValueError: if there is nothing to draw, or the episodes differ in length or frame size.
    """
    _check_equal(comparisons)
    tile = _enlarge(comparisons[0].real[0], VIDEO_TILE).shape
    columns = min(columns, len(comparisons))
    rows = -(-len(comparisons) // columns)
    panel = (2 * _LINE + tile[0] + _GAP, 2 * tile[1] + 4 * _GAP)
    size = (columns * panel[1], _LINE + rows * panel[0])
    canvas = Image.new("RGB", tuple(side + side % 2 for side in size), _PAPER)
    pen = ImageDraw.Draw(canvas)
    corners = [(_GAP + (i % columns) * panel[1], _LINE + (i // columns) * panel[0]) for i in range(len(comparisons))]
    for (x, y), comparison in zip(corners, comparisons, strict=True):
        pen.text((x, y + 3), _fit(pen, comparison.title, panel[1] - 3 * _GAP, 15), _INK, font=_font(15))
        pen.text((x, y + _LINE), "real", _FAINT, font=_font(15))
        pen.text((x + tile[1] + _GAP, y + _LINE), "imagined", _FAINT, font=_font(15))
    video = []
    for t in range(len(comparisons[0].real)):
        pen.rectangle((0, 0, canvas.width, _LINE - 1), fill=_PAPER)
        pen.text((_GAP, 4), f"t = {t}" + (" (given start frame)" if t == 0 else ""), _INK, font=_font(16))
        for (x, y), comparison in zip(corners, comparisons, strict=True):
            for offset, name in enumerate(("real", "imagined")):
                frame = Image.fromarray(_enlarge(getattr(comparison, name)[t], VIDEO_TILE))
                canvas.paste(frame, (x + offset * (tile[1] + _GAP), y + 2 * _LINE - 4))
        video.append(np.asarray(canvas).copy())
    return np.stack(video)


def save_png(path: Path, picture: np.ndarray) -> Path:
    """Write an (H, W, 3) uint8 picture."""
    Image.fromarray(picture).save(path)
    return path


def save_mp4(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Write a video that browsers play: H.264, yuv420p, index first.

    Args:
        path: file to write, ending in .mp4.
        frames: (T, H, W, 3) uint8 with even H and W.
        fps: frames per second.

    Returns:
        The path.

    Raises:
        ValueError: if the frames are not uint8 RGB with even sides.
    """
    is_video = frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8
    if not is_video or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"frames are {frames.shape} {frames.dtype}, expected (T, H, W, 3) uint8 with even H and W "
            "(yuv420p halves both). Pad the picture by one pixel."
        )
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast", "threads": "1"}  # the same bytes on every machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def _check_equal(comparisons: Sequence[Comparison]) -> None:
    shapes = {comparison.real.shape for comparison in comparisons}
    if len(shapes) != 1:
        raise ValueError(
            f"the episodes to draw have shapes {sorted(shapes)}, expected at least one episode and one common "
            "(T + 1, H, W, 3). Cut them to the same number of frames."
        )


def _enlarge(frame: np.ndarray, height: int) -> np.ndarray:
    factor = max(1, round(height / frame.shape[0]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """Shorten a line until it fits."""
    if pen.textlength(text, font=_font(size)) <= width:
        return text
    while text and pen.textlength(text + "...", font=_font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "..."
