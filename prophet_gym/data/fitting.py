"""Images come to a card's resolution: stretched, or at the right height padded or cropped (paper 4.1.1)."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.data.cards import DatasetCard, Fit
from prophet_gym.data.episode import Episode


def fit_frames(frames: np.ndarray, resolution: tuple[int, int], fit: Fit | None) -> np.ndarray:
    """Bring frames (T, H, W, 3) uint8 to ``resolution`` (height, width); areas are averaged when shrinking.

    Raises:
        ValueError: If ``fit`` is None and the aspect ratio would change: no source states how.
    """
    (height, width), (old_height, old_width) = resolution, frames.shape[1:3]
    scaled = _scaled_width(old_height, old_width, resolution, fit)
    if (old_height, old_width) != (height, scaled):
        how = cv2.INTER_AREA if height < old_height else cv2.INTER_LINEAR
        frames = np.stack([cv2.resize(frame, (scaled, height), interpolation=how) for frame in frames])
    left = _offset(scaled, width)
    if left > 0:
        frames = np.pad(frames, ((0, 0), (0, 0), (left, width - scaled - left), (0, 0)))
    return np.ascontiguousarray(frames[:, :, max(-left, 0) : max(-left, 0) + width])


def fit_camera(camera: Camera, resolution: tuple[int, int], fit: Fit | None) -> Camera:
    """Return the calibration of images that went through `fit_frames`."""
    height, width = resolution
    scaled = _scaled_width(camera.height, camera.width, resolution, fit)
    resized = camera.resized(scaled, height)
    K = resized.K.copy()
    K[0, 2] += _offset(scaled, width)
    return Camera(K, resized.E, width, height)


def fit_points(points: np.ndarray, old: tuple[int, int], resolution: tuple[int, int], fit: Fit | None) -> np.ndarray:
    """Return where pixels (..., 2), u and v, of images of size ``old`` (height, width) are after `fit_frames`."""
    scaled = _scaled_width(*old, resolution, fit)
    factor = np.array([scaled, resolution[0]]) / np.array([old[1], old[0]])
    return (points + 0.5) * factor - 0.5 + [_offset(scaled, resolution[1]), 0]  # pixel centres are whole numbers


def fit_episode(episode: Episode, card: DatasetCard) -> Episode:
    """Return the episode with images, calibration and labels in pixels at the card's resolution; kept undecoded.

    Raises:
        ValueError: If the card states no resolution, or not how the images come to it.
    """
    size, fit = card.resolution, card.fit
    if size is None:
        raise ValueError(f"card {card.name!r} states no resolution; use dataclasses.replace(card, resolution=(H, W))")
    return _fitted(episode, size, fit)


def stretched(episode: Episode, image_size: tuple[int, int]) -> Episode:
    """Return the episode with images, calibration and labels in pixels stretched to (height, width); kept undecoded."""
    return episode if _size(episode) == tuple(image_size) else _fitted(episode, image_size, "stretch")


def _fitted(episode: Episode, resolution: tuple[int, int], fit: Fit | None) -> Episode:
    labels = dict(episode.labels)
    for key in [key for key in labels if key.endswith("_px")]:
        labels[key] = fit_points(labels[key], _size(episode), resolution, fit)
    camera = None if episode.camera is None else fit_camera(episode.camera, resolution, fit)

    def images() -> np.ndarray:
        return fit_frames(replace(episode).frames, resolution, fit)

    return replace(episode, images=images, camera=camera, labels=labels)


def _size(episode: Episode) -> tuple[int, int]:
    """Height and width of the images: the calibration's, else those of a copy, whose frames are freed."""
    if episode.camera is not None:
        return episode.camera.height, episode.camera.width
    height, width = replace(episode).frames.shape[1:3]
    return height, width


def _scaled_width(old_height: int, old_width: int, resolution: tuple[int, int], fit: Fit | None) -> int:
    """Width after resizing and before padding or cropping."""
    height, width = resolution
    if fit == "pad_or_crop":
        return max(1, round(old_width * height / old_height))
    if fit is None and old_width * height != width * old_height:
        raise ValueError(
            f"images are {old_width}x{old_height} pixels and {width}x{height} are wanted, which changes their aspect "
            "ratio, and the card does not state how: use dataclasses.replace(card, fit='stretch' or 'pad_or_crop')"
        )
    return width


def _offset(scaled: int, width: int) -> int:
    """Columns to the left that padding adds (above 0) or cropping takes away (below 0)."""
    return (width - scaled) // 2
