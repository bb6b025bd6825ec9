"""Where is the block? Object tracking by colour on Tabletop frames, real or imagined.

The instructed block is the only object of its colour in every look of Tabletop, and the table is hardly saturated. So
every frame is searched on its own: no motion model that could carry a block on after it faded, no memory that could
drift. Each pixel is split into table and block colour on the plane of opponent colours (which ignores shading), the
heaviest connected region of block colour wins, and its weighted centroid is the answer. A region that is too small or
too faint is *lost*.

The same function looks at real and imagined frames. On real frames it is checked against the simulator's labels
(`tests/test_tracking.py`), and `prophet_gym.metrics.evaluate` reports its error there beside the imagined ones.
"""

from __future__ import annotations

import cv2
import numpy as np

MIN_SHARE = 0.35
"""Least share of block colour for a pixel to belong to the block (the rest is table): survives blur, not fading."""

MAX_HUE_ANGLE = 25.0
"""Degrees between a pixel's and the block's direction on the opponent-colour plane where membership reaches zero."""

MIN_AREA = 5.0
"""Least summed share of the region, in pixels of a 64x64 frame (a whole block covers about 45)."""

MIN_CONTRAST = 20.0
"""Least distance of block and table on the opponent-colour plane, in grey levels (Tabletop's colours: 90 and more)."""

_OPPONENT = np.array([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0]], np.float32)
"""RGB -> (red - green, yellow - blue)."""


def reference_color(frame: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """The colour of the block, read where the block is known to be.

    Args:
        frame: (H, W, 3) uint8 RGB, a real frame.
        pixel: (2,) centroid (u, v) of the block in it, in pixels (right, down), pixel centres at integers.

    Returns:
        (3,) float32 RGB in 0..255, the median of the 3x3 pixels around it.

    Raises:
        ValueError: if the frame is not RGB uint8, the pixel lies outside it, or it shows the table.
    """
    _check_frame(frame)
    u, v = (int(round(float(x))) for x in pixel)
    height, width = frame.shape[:2]
    if not (0 <= u < width and 0 <= v < height):
        raise ValueError(
            f"pixel (u, v) = ({u}, {v}) lies outside the {width}x{height} frame. "
            "Take the colour from a frame in which the block is visible."
        )
    patch = frame[max(v - 1, 0) : v + 2, max(u - 1, 0) : u + 2]
    color, table = np.median(patch.reshape(-1, 3), axis=0), np.median(frame.reshape(-1, 3), axis=0)
    if np.linalg.norm((color - table) @ _OPPONENT) < MIN_CONTRAST:
        raise ValueError(
            f"the colour {color.tolist()} at (u, v) = ({u}, {v}) cannot be told from the table's {table.tolist()}. "
            "Take it from a frame in which the block is in full view."
        )
    return color.astype(np.float32)


def find_block(frame: np.ndarray, color: np.ndarray) -> tuple[float, float] | None:
    """Locate the block in one frame.

    Args:
        frame: (H, W, 3) uint8 RGB, real or imagined.
        color: (3,) RGB in 0..255 of the block, from `reference_color` of a *real* frame of the same episode.

    Returns:
        Centroid (u, v) of its visible part, pixels right and down, or None if it is lost.

    Raises:
        ValueError: if the frame is not RGB uint8.
    """
    _check_frame(frame)
    table = np.median(frame.reshape(-1, 3), axis=0)
    block_chroma = (np.asarray(color, np.float32) - table) @ _OPPONENT
    strength = float(np.linalg.norm(block_chroma))
    if strength < MIN_CONTRAST:  # an imagined frame may have collapsed into the block's colour
        return None
    chroma = (frame.astype(np.float32) - table.astype(np.float32)) @ _OPPONENT / strength
    direction = block_chroma / strength
    along = chroma @ direction
    across = np.abs(chroma @ np.array([-direction[1], direction[0]], np.float32))
    purity = 1.0 - np.degrees(np.arctan2(across, np.maximum(along, 1e-6))) / MAX_HUE_ANGLE
    share = np.clip(along, 0.0, 1.0) * np.clip(2.0 * purity, 0.0, 1.0)
    share[share < MIN_SHARE] = 0.0

    # Two pieces of a block on either side of a finger (4 px wide) belong together.
    reach = 2 * round(2 * frame.shape[0] / 64) + 1
    mask = cv2.dilate((share > 0).astype(np.uint8), np.ones((reach, reach), np.uint8))
    count, regions = cv2.connectedComponents(mask)
    if count == 1:
        return None
    areas = np.bincount(regions.ravel(), weights=share.ravel(), minlength=count)
    best = int(areas[1:].argmax()) + 1
    if areas[best] < MIN_AREA * frame.shape[0] * frame.shape[1] / 64**2:
        return None
    weight = np.where(regions == best, share, 0.0)
    total = weight.sum(dtype=np.float64)
    v = (weight.sum(axis=1, dtype=np.float64) * np.arange(frame.shape[0])).sum() / total
    u = (weight.sum(axis=0, dtype=np.float64) * np.arange(frame.shape[1])).sum() / total
    return float(u), float(v)


def track_block(frames: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Locate the block in every frame, each on its own.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        color: (3,) RGB in 0..255 of the block.

    Returns:
        (T, 2) float64 centroids (u, v) in pixels, nan where the block is lost.
    """
    found = (find_block(frame, color) for frame in frames)
    return np.array([(np.nan, np.nan) if uv is None else uv for uv in found], np.float64).reshape(-1, 2)


def _check_frame(frame: np.ndarray) -> None:
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
        raise ValueError(
            f"frame is {getattr(frame, 'shape', type(frame).__name__)} {getattr(frame, 'dtype', '')}, "
            "expected (H, W, 3) uint8 RGB. Pass one frame of the video: frames[t]."
        )
