"""Statistics in the form of LeRobotDataset v3.0, which its users normalise with: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_IMAGES = 100  # images of an episode that are looked at; lerobot samples a similar number
_PIXELS = 150  # and about as many of their rows and columns

Stats = Mapping[str, np.ndarray]


def row_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of rows (T,) or (T, D): min, max, mean, std, quantiles of shape (D,), and count (1,)."""
    return _stats(values.reshape(len(values), -1).astype(np.float64), len(values))


def image_stats(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of frames (T, H, W, 3) uint8 per channel, scaled to [0, 1], of shape (3, 1, 1); count is of images."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _IMAGES)).round().astype(int))]
    stride = max(1, max(frames.shape[1:3]) // _PIXELS)
    stats = _stats(chosen[:, ::stride, ::stride].reshape(-1, 3) / 255.0, len(chosen))
    return {key: value if key == "count" else value.reshape(3, 1, 1) for key, value in stats.items()}


def aggregate(episodes: Sequence[Mapping[str, Stats]]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of a set from those of its episodes; exact but for quantiles, which are averaged as lerobot does."""
    result = {}
    for feature in episodes[0]:
        parts = [episode[feature] for episode in episodes]
        stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        counts = stacked["count"].reshape(-1, *(1,) * (stacked["mean"].ndim - 1))
        total = counts.sum()
        mean = (stacked["mean"] * counts).sum(axis=0) / total
        variance = ((stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2) * counts).sum(axis=0) / total
        result[feature] = {
            "min": stacked["min"].min(axis=0),
            "max": stacked["max"].max(axis=0),
            "mean": mean,
            "std": np.sqrt(variance),
            "count": np.array([total]),
            **{name: (stacked[name] * counts).sum(axis=0) / total for name in _QUANTILES},
        }
    return result


def _stats(rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    quantiles = np.quantile(rows, list(_QUANTILES.values()), axis=0)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "count": np.array([count]),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }
