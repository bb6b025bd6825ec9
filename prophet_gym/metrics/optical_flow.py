"""Motion fidelity of an imagined video: the optical-flow protocol of the paper (3.2.6, Eqs 12-13).

Both videos become grey, Farneback's dense flow is computed between consecutive frames, and the two motion fields are
compared: end-point error (EPE, Eq. 12) for magnitude, cosine (Eq. 13) for direction. Appearance does not enter, so this
measures whether the commanded motion happened.

The paper gives neither Farneback's parameters nor the threshold; both are fixed here as constants. One departure: the
frames are padded by replication before the flow and the flow is cropped, because OpenCV's implementation reports up to
half a pixel of motion along the right and bottom border of two *identical* frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from prophet_gym.metrics.fidelity import check_video_pair

PYRAMID_SCALE = 0.5
PYRAMID_LEVELS = 3
ITERATIONS = 3
POLY_N = 5
POLY_SIGMA = 1.1
EPSILON = 1e-6
"""The epsilon of Eq. 13, px^2."""


def window_size(height: int) -> int:
    """Side in pixels of Farneback's averaging window: odd, 9 at 64 pixels, growing with the image, never below 9.

    At 256 pixels this is 15, OpenCV's usual choice. At 64 it is the window with the least error on moving pixels,
    against the exact motion of rendered Tabletop scenes (`docs/metrics.md` has the measurement).
    """
    return max(9, 2 * (round(15 * height / 256) // 2) + 1)


def default_threshold(height: int) -> float:
    """The tau of Eq. 13 in pixels per frame: 1/256 of the image height (1 px at 256, 0.25 px at 64)."""
    return height / 256


@dataclass(frozen=True, eq=False)
class FlowComparison:
    """Eqs 12-13 for every pair of consecutive frames; index t is the motion from frame t to frame t + 1.

    Attributes:
        epe: (T - 1,) mean end-point error over all pixels, in pixels per frame.
        cos: (T - 1,) mean cosine over V_t; nan where V_t is empty (one of the two videos stands still).
        real_moves: (T - 1,) bool, some pixel of the real video moves faster than the threshold.
    """

    epe: np.ndarray
    cos: np.ndarray
    real_moves: np.ndarray


def farneback_flow(frames: np.ndarray) -> np.ndarray:
    """Dense optical flow between consecutive frames.

    Args:
        frames: (T, H, W, 3) uint8 RGB, T >= 2.

    Returns:
        (T - 1, H, W, 2) float32, motion (right, down) in pixels per frame of the content at each pixel of frame t;
        exactly zero between identical frames.

    Raises:
        ValueError: if `frames` is not (T >= 2, H, W, 3) uint8.
    """
    frames, _ = check_video_pair(frames, frames, minimum=2)
    height, width = frames.shape[1:3]
    window = window_size(height)
    pad = window // 2 + 4
    grey = [
        cv2.copyMakeBorder(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        for frame in frames
    ]
    flow = np.empty((len(frames) - 1, height, width, 2), np.float32)
    for t in range(len(flow)):
        if np.array_equal(grey[t], grey[t + 1]):
            flow[t] = 0.0
            continue
        padded = cv2.calcOpticalFlowFarneback(
            grey[t], grey[t + 1], None, PYRAMID_SCALE, PYRAMID_LEVELS, window, ITERATIONS, POLY_N, POLY_SIGMA, 0
        )
        flow[t] = padded[pad : pad + height, pad : pad + width]
    return flow


def compare_flows(real_flow: np.ndarray, imagined_flow: np.ndarray, *, threshold: float) -> FlowComparison:
    """Eqs 12-13 from two motion fields.

    Args:
        real_flow: (T - 1, H, W, 2) pixels per frame.
        imagined_flow: (T - 1, H, W, 2) pixels per frame.
        threshold: tau of Eq. 13 in pixels per frame: V_t holds the pixels where *both* fields are faster.

    Returns:
        The per-frame figures.

    Raises:
        ValueError: if the shapes differ or the threshold is negative.
    """
    if real_flow.shape != imagined_flow.shape or real_flow.ndim != 4 or real_flow.shape[-1] != 2:
        raise ValueError(
            f"the flows have shapes {real_flow.shape} and {imagined_flow.shape}, expected two equal (T - 1, H, W, 2). "
            "Compute both with farneback_flow from videos of the same shape."
        )
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}, expected a number of pixels per frame >= 0, such as 0.25.")
    real_speed = np.linalg.norm(real_flow, axis=-1)
    imagined_speed = np.linalg.norm(imagined_flow, axis=-1)
    epe = np.linalg.norm(real_flow - imagined_flow, axis=-1).mean(axis=(1, 2), dtype=np.float64)
    both_move = (real_speed > threshold) & (imagined_speed > threshold)
    cosine = (real_flow * imagined_flow).sum(axis=-1) / (real_speed * imagined_speed + EPSILON)
    count = both_move.sum(axis=(1, 2))
    total = np.where(both_move, cosine, 0.0).sum(axis=(1, 2), dtype=np.float64)
    cos = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return FlowComparison(epe=epe, cos=cos, real_moves=(real_speed > threshold).any(axis=(1, 2)))


def flow_per_frame(real: np.ndarray, imagined: np.ndarray, *, threshold: float | None = None) -> FlowComparison:
    """Eqs 12-13 at every step of two videos; arguments and errors as `flow_metrics`."""
    real, imagined = check_video_pair(real, imagined, minimum=2)
    threshold = default_threshold(real.shape[1]) if threshold is None else threshold
    return compare_flows(farneback_flow(real), farneback_flow(imagined), threshold=threshold)


def flow_metrics(real: np.ndarray, imagined: np.ndarray, *, threshold: float | None = None) -> dict[str, float]:
    """The paper's four motion figures of one video (3.2.6): mean and median over t of Eqs 12 and 13.

    Give both videos *with* the start frame they share, so that the motion of the first command counts.

    Args:
        real: (T, H, W, 3) uint8 RGB, T >= 2.
        imagined: (T, H, W, 3) uint8 RGB.
        threshold: tau of Eq. 13 in pixels per frame; None takes `default_threshold(H)`.

    Returns:
        `{"epe_mean", "epe_median", "cos_mean", "cos_median"}`, EPE in pixels per frame. Frames whose V_t is empty are
        left out of the two cosines; if V_t is empty in every frame (a static video), both cosines are nan.

    Raises:
        ValueError: if the videos are not two equal (T >= 2, H, W, 3) uint8 arrays or the threshold is negative.
    """
    comparison = flow_per_frame(real, imagined, threshold=threshold)
    cos = comparison.cos[~np.isnan(comparison.cos)]
    return {
        "epe_mean": float(comparison.epe.mean()),
        "epe_median": float(np.median(comparison.epe)),
        "cos_mean": float(cos.mean()) if len(cos) else float("nan"),
        "cos_median": float(np.median(cos)) if len(cos) else float("nan"),
    }
