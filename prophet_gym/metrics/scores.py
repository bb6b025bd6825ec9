"""Scores of many episodes: per-frame arrays, their aggregates by horizon, bootstrap intervals over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .fidelity import psnr_per_frame, ssim_per_frame, tssim_per_step
from .optical_flow import FlowComparison, compare_flows
from .tracking import track_block

BLOCK_TOLERANCE = 3.0
"""Pixels of a 64-pixel image: the block moved if it went at least this far, and is right if it ends within it."""

BOOTSTRAP_RESAMPLES = 1000

METRICS = (
    "psnr", "ssim", "tssim", "epe_mean", "epe_median", "cos_mean", "cos_median", "cos_defined",
    "block_within", "block_lost", "block_error",
)  # fmt: skip
"""Columns of a table: names of `EpisodeScores.summary`."""


@dataclass(frozen=True, eq=False)
class BlockTruth:
    """Where the block truly was, from the simulator's labels.

    Attributes:
        px: (T + 1, 2) centroid (u, v) in pixels.
        visible: (T + 1,) bool.
        color: (3,) RGB of the block in the real frame that shows most of it.
    """

    px: np.ndarray
    visible: np.ndarray
    color: np.ndarray


@dataclass(frozen=True, eq=False)
class EpisodeScores:
    """One imagined video against the real one, for each of the T imagined frames.

    Attributes:
        psnr: (T,) dB.
        ssim: (T,).
        tssim: (T,) between the changes that command t made.
        epe: (T,) pixels per frame.
        cos: (T,), nan where V_t is empty.
        real_moves: (T,) bool, the real video moves at command t.
        block_error: (T,) distance in pixels of the tracked block from the true centroid, inf where it is lost, nan
            where the question does not arise: no labels, block hidden at the start or at t, or not moved by then.
    """

    psnr: np.ndarray
    ssim: np.ndarray
    tssim: np.ndarray
    epe: np.ndarray
    cos: np.ndarray
    real_moves: np.ndarray
    block_error: np.ndarray

    def summary(self, horizon: int) -> dict[str, float]:
        """The figures of the first `horizon` frames; nan where undefined.

        Fidelity is the mean over the frames; EPE and cosine are mean and median over them (paper 3.2.6), the cosine
        over those where V_t is not empty, whose share among the frames with real motion is `cos_defined`. The block
        figures belong to frame `horizon` alone; `block_error` is nan where the block is lost.
        """
        cos = self.cos[:horizon][~np.isnan(self.cos[:horizon])]
        moving = self.real_moves[:horizon]
        error = self.block_error[horizon - 1]
        return {
            "psnr": self.psnr[:horizon].mean(),
            "ssim": self.ssim[:horizon].mean(),
            "tssim": self.tssim[:horizon].mean(),
            "epe_mean": self.epe[:horizon].mean(),
            "epe_median": np.median(self.epe[:horizon]),
            "cos_mean": cos.mean() if len(cos) else np.nan,
            "cos_median": np.median(cos) if len(cos) else np.nan,
            "cos_defined": (~np.isnan(self.cos[:horizon]))[moving].mean() if moving.any() else np.nan,
            "block_within": np.nan if np.isnan(error) else float(error <= BLOCK_TOLERANCE),
            "block_lost": np.nan if np.isnan(error) else float(np.isinf(error)),
            "block_error": error if np.isfinite(error) else np.nan,
        }


def score_episode(
    real: np.ndarray,
    imagined: np.ndarray,
    real_flow: np.ndarray,
    imagined_flow: np.ndarray,
    *,
    threshold: float,
    block: BlockTruth | None,
) -> EpisodeScores:
    """Compare one imagined video with the real one.

    Args:
        real: (T + 1, H, W, 3) uint8, start frame first.
        imagined: (T + 1, H, W, 3) uint8, the same start frame first; it is not scored.
        real_flow: (T, H, W, 2) of `real`, computed once for all predictions.
        imagined_flow: (T, H, W, 2) of `imagined`.
        threshold: tau of Eq. 13 in pixels per frame.
        block: the block's true path, or None where there is no block to follow.

    Returns:
        The scores of frames 1..T.
    """
    flow: FlowComparison = compare_flows(real_flow, imagined_flow, threshold=threshold)
    return EpisodeScores(
        psnr=psnr_per_frame(real[1:], imagined[1:]),
        ssim=ssim_per_frame(real[1:], imagined[1:]),
        tssim=tssim_per_step(real, imagined),
        epe=flow.epe,
        cos=flow.cos,
        real_moves=flow.real_moves,
        block_error=block_errors(imagined, block),
    )


def block_errors(frames: np.ndarray, block: BlockTruth | None) -> np.ndarray:
    """Distance of the tracked block from the truth wherever the block has moved (see `EpisodeScores.block_error`).

    Args:
        frames: (T + 1, H, W, 3) uint8, start frame first.
        block: the truth, or None.

    Returns:
        (T,) pixels.
    """
    if block is None:
        return np.full(len(frames) - 1, np.nan)
    asked = np.linalg.norm(block.px[1:] - block.px[0], axis=-1) >= BLOCK_TOLERANCE
    asked &= block.visible[1:] & block.visible[0]
    error = np.linalg.norm(track_block(frames[1:], block.color) - block.px[1:], axis=-1)
    return np.where(asked, np.where(np.isnan(error), np.inf, error), np.nan)


def summarise(scores: Sequence[EpisodeScores], horizon: int) -> dict[str, np.ndarray]:
    """`EpisodeScores.summary` of every episode: metric name to (n,) array, nan where undefined for an episode."""
    rows = [score.summary(horizon) for score in scores]
    return {name: np.array([row[name] for row in rows], np.float64) for name in METRICS}


def per_frame_means(scores: Sequence[EpisodeScores]) -> dict[str, np.ndarray]:
    """Mean over episodes at every frame of the horizon: name to (T,) array, nan where no episode defines it."""
    stacked = {f.name: np.stack([getattr(score, f.name) for score in scores]) for f in fields(EpisodeScores)}
    curves = {name: nanmean(stacked[name], axis=0) for name in ("psnr", "ssim", "tssim", "epe", "cos")}
    asked = ~np.isnan(stacked["block_error"])
    curves["block_within"] = nanmean(np.where(asked, stacked["block_error"] <= BLOCK_TOLERANCE, np.nan), axis=0)
    curves["block_lost"] = nanmean(np.where(asked, np.isinf(stacked["block_error"]), np.nan), axis=0)
    return curves


def nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not nan; nan, without a warning, where everything is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


class Bootstrap:
    """Percentile intervals over episodes: the same resamples for every figure, so that ratios are paired.

    Args:
        num_episodes: n.
        seed: of the resampling.
    """

    def __init__(self, num_episodes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.indices = rng.integers(num_episodes, size=(BOOTSTRAP_RESAMPLES, num_episodes))

    def mean(self, values: np.ndarray) -> dict[str, float]:
        """Mean over the episodes that define the value, with a 95 % interval and their number.

        Args:
            values: (n,), nan where an episode does not define it.

        Returns:
            `{"value", "low", "high", "n"}`.
        """
        return _interval(nanmean(values, 0), nanmean(values[self.indices], 1)) | {"n": int((~np.isnan(values)).sum())}

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
        """Ratio of two means over the same (n,) episodes, paired: `{"value", "low", "high", "n"}`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = nanmean(numerator, 0) / nanmean(denominator, 0)
            resampled = nanmean(numerator[self.indices], 1) / nanmean(denominator[self.indices], 1)
        return _interval(value, resampled) | {"n": int((~np.isnan(numerator + denominator)).sum())}


def _interval(value: np.ndarray, resampled: np.ndarray) -> dict[str, float]:
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high)}
