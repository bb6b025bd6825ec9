"""From the frames of a rollout to the few small pictures that a vision-language model is shown (paper 3.4)."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

__all__ = ["ImageFormat", "encode_frames", "spread_indices"]

ImageFormat = Literal["jpeg", "png"]
JPEG_QUALITY = 90


def spread_indices(length: int, count: int) -> list[int]:
    """Returns ``count`` indices of a rollout of ``length`` frames, evenly spread, the first and the last among them.

    A rollout that is not longer than ``count`` is shown whole, without repeats.
    """
    if length <= count:
        return list(range(length))
    return [round(place) for place in np.linspace(0, length - 1, count)]


def encode_frames(frames: np.ndarray, size: int, image_format: ImageFormat) -> tuple[bytes, ...]:
    """Resizes frames to squares and compresses them.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        size: side of the square in pixels; other shapes are stretched, as in the paper.
        image_format: "jpeg" (quality 90) or "png".
    """
    pictures = []
    for frame in frames:
        image = Image.fromarray(frame)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)  # smooths before it shrinks
        buffer = io.BytesIO()
        image.save(buffer, image_format, quality=JPEG_QUALITY)
        pictures.append(buffer.getvalue())
    return tuple(pictures)
