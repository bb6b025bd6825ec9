"""Pixel fidelity of an imagined video against the real one: PSNR, SSIM and tSSIM.

A frame-by-frame comparison of what is seen. It says nothing about whether the right thing moved: read it beside
`prophet_gym.metrics.optical_flow`. The paper names the three figures without defining them; the definitions here are
the ones in the docstrings, and every aggregate is a plain mean over frames.
"""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

PSNR_CAP = 100.0
"""dB given to identical frames, whose PSNR is infinite. One grey level in one value of a 64x64 RGB frame is 89 dB."""

SSIM_WINDOW = 7
"""Side in pixels of the uniform SSIM window (scikit-image's default)."""


def check_video_pair(real: np.ndarray, imagined: np.ndarray, minimum: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Check two videos that are about to be compared.

    Args:
        real: (T, H, W, 3) uint8 RGB frames.
        imagined: (T, H, W, 3) uint8 RGB frames, the same shape.
        minimum: least number of frames T that the metric needs.

    Returns:
        The same two arrays.

    Raises:
        ValueError: if a video is not (T, H, W, 3) uint8, the shapes differ, or there are fewer frames than `minimum`.
    """
    real, imagined = np.asarray(real), np.asarray(imagined)
    for name, video in (("real", real), ("imagined", imagined)):
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(
                f"{name} has shape {video.shape}, expected (T, H, W, 3) RGB frames. "
                "A single frame needs a leading axis: frame[None]."
            )
        if video.dtype != np.uint8:
            raise ValueError(
                f"{name} has dtype {video.dtype}, expected uint8 in 0..255. "
                "Floats in 0..1 convert with (255 * video).round().astype('uint8')."
            )
    if real.shape != imagined.shape:
        raise ValueError(
            f"real {real.shape} and imagined {imagined.shape} differ, expected the same (T, H, W, 3). "
            "Cut both to the same number of frames and resize to the same H, W first."
        )
    if len(real) < minimum:
        raise ValueError(f"the videos have {len(real)} frame(s), expected at least {minimum}. Give longer videos.")
    if min(real.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"the frames are {real.shape[1]}x{real.shape[2]}, expected at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels. "
            "Evaluate at the resolution the model produces."
        )
    return real, imagined


def psnr_per_frame(real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of every frame, 10 log10(255^2 / MSE), MSE over H, W and the three colours.

    Args:
        real: (T, H, W, 3) uint8.
        imagined: (T, H, W, 3) uint8.

    Returns:
        (T,) float64 in dB, at most `PSNR_CAP`, which identical frames get.
    """
    real, imagined = check_video_pair(real, imagined)
    error = real.astype(np.float32) - imagined.astype(np.float32)
    mse = np.square(error).mean(axis=(1, 2, 3), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.minimum(10.0 * np.log10(255.0**2 / mse), PSNR_CAP)


def ssim_per_frame(real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame (scikit-image: uniform 7x7 window, mean over colours, data range 255).

    Args:
        real: (T, H, W, 3) uint8.
        imagined: (T, H, W, 3) uint8.

    Returns:
        (T,) float64 in [-1, 1]; 1 for identical frames.
    """
    real, imagined = check_video_pair(real, imagined)
    return _ssim(real, imagined, data_range=255.0)


def tssim_per_step(real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Temporal SSIM: SSIM between the signed frame differences of the two videos.

    Step t compares real[t+1] - real[t] with imagined[t+1] - imagined[t] (signed, in [-255, 255], hence data range
    510, same window as SSIM). It is 1 where both videos change in the same way, also where both stand still; a
    constant error that does not change in time (a wrong texture) does not lower it. Mind the scale: most pixels of a
    manipulation video are static, so a frozen video already scores high. Compare with the last-frame baseline.

    Args:
        real: (T, H, W, 3) uint8, T >= 2.
        imagined: (T, H, W, 3) uint8.

    Returns:
        (T - 1,) float64 in [-1, 1].
    """
    real, imagined = check_video_pair(real, imagined, minimum=2)
    real_change, imagined_change = (np.diff(video.astype(np.float32), axis=0) for video in (real, imagined))
    return _ssim(real_change, imagined_change, data_range=510.0)


def fidelity_metrics(real: np.ndarray, imagined: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and tSSIM of one video, each the mean over its frames (PSNR: mean of per-frame dB).

    A start frame that both videos share would raise every mean: leave it out for PSNR and SSIM, as
    `prophet_gym.metrics.evaluate` does.

    Args:
        real: (T, H, W, 3) uint8.
        imagined: (T, H, W, 3) uint8.

    Returns:
        `{"psnr": dB, "ssim": [-1, 1], "tssim": [-1, 1]}`; `tssim` is nan for a single frame, which has no difference.

    Raises:
        ValueError: if the videos are not two equal (T, H, W, 3) uint8 arrays.
    """
    real, imagined = check_video_pair(real, imagined)
    return {
        "psnr": float(psnr_per_frame(real, imagined).mean()),
        "ssim": float(ssim_per_frame(real, imagined).mean()),
        "tssim": float(tssim_per_step(real, imagined).mean()) if len(real) > 1 else float("nan"),
    }


def _ssim(real: np.ndarray, imagined: np.ndarray, data_range: float) -> np.ndarray:
    """SSIM of each pair along the first axis."""
    return np.array(
        [
            structural_similarity(x, y, channel_axis=-1, data_range=data_range, win_size=SSIM_WINDOW)
            for x, y in zip(real, imagined, strict=True)
        ],
        dtype=np.float64,
    )
