"""Random crops and colours of whole episodes: more scenes out of few recordings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.data.episode import Episode

__all__ = ["VARIANT_OF", "augmented"]

VARIANT_OF = "variant_of"
"""Key of the metadata of a variant: the name of the episode that it was made of."""

_SMALLEST = 0.75  # share of height and width that a crop keeps at least
_GAIN, _OFFSET = 0.15, 12.0  # largest change of a channel's contrast (relative) and brightness (grey levels)


def augmented(episode: Episode, rng: np.random.Generator) -> Episode:
    """Return the episode seen through one random crop and with one random colour of light.

    All frames change alike, and calibration and labels in pixels with them; commands, poses and everything else stay:
    what a command does is the same. The frames are smaller; stretch them afterwards.

    Args:
        episode: any episode; its frames are decoded.
        rng: draws the crop, 75 to 100 % of height and width, and per channel a gain within 15 % and an offset within 12
            grey levels.
    """
    height, width = episode.frames.shape[1:3]
    scale = rng.uniform(_SMALLEST, 1.0)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    gain, offset = rng.uniform(1 - _GAIN, 1 + _GAIN, 3), rng.uniform(-_OFFSET, _OFFSET, 3)
    frames = episode.frames[:, top : top + h, left : left + w] * gain + offset
    camera = episode.camera
    if camera is not None:
        K = camera.K.copy()
        K[:2, 2] -= left, top
        camera = Camera(K, camera.E, w, h)
    moved = {key: value - (left, top) if key.endswith("_px") else value for key, value in episode.labels.items()}
    return replace(episode, images=frames.round().clip(0, 255).astype(np.uint8), camera=camera, labels=moved)
