"""Image augmentation for judges: what differs between cameras, codecs and world models, not what decides success.

One draw holds for all frames of a rollout (a camera does not move between frames); blur, noise and compression are
those a world model's decoder adds.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["augment"]


def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a changed copy of a few frames of one rollout.

    Shift by up to 2 pixels (edges repeated); gain 0.85-1.15 and offset up to 12 grey levels, each channel a little
    apart; blur of up to 1 pixel, noise of up to 6 grey levels and JPEG at quality 40-90, each in 3 of 10 draws.

    Args:
        frames: (F, H, W, 3) uint8.
        rng: source of all randomness.
    """
    dx, dy = rng.integers(-2, 3, size=2)
    gain = (rng.uniform(0.85, 1.15) + rng.normal(0, 0.02, size=3)).astype(np.float32)
    offset = (rng.uniform(-12, 12) + rng.normal(0, 2, size=3)).astype(np.float32)
    blur, noise, jpeg = rng.random(3) < 0.3
    sigma, grain, quality = rng.uniform(0.3, 1.0), rng.uniform(1, 6), int(rng.integers(40, 91))
    out = np.roll(np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge"), (dy, dx), (1, 2))[:, 2:-2, 2:-2]
    out = out * gain + offset
    if blur:
        out = np.stack([cv2.GaussianBlur(frame, (5, 5), sigma) for frame in out])
    if noise:
        out = out + rng.standard_normal(out.shape, dtype=np.float32) * np.float32(grain)
    out = np.clip(np.rint(out), 0, 255).astype(np.uint8)
    if jpeg:
        encoded = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in out]
        out = np.stack([np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)) for data in encoded])
    return out
