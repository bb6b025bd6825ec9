"""Measurements behind the convention audit: how images and measured poses answer to commands. Pure functions.

Everything is compared over delays: image t + 1 should show what command t did, or, on a robot that lags, what a command
up to 0.45 s before did. Rows of all episodes are joined, and the same steps are used for every delay, so that scores
compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from prophet_gym.actions import ActionSpec
from prophet_gym.data.columns import actions_from_poses
from prophet_gym.data.episode import Episode
from prophet_gym.metrics.optical_flow import farneback_flow

LATEST = 0.45
"""Seconds by which the images of real robots follow their commands at most: 2 steps of BridgeData's 5 Hz."""
_HEIGHT = 96  # images are reduced to this height: flow of 256 pixels costs seven times as much and says the same
_MOVES = 0.5 / 256  # of the height: pixels that move more than this per step count


@dataclass(frozen=True, eq=False)
class Signals:
    """One episode, reduced to numbers.

    Attributes:
        name: Name of the episode.
        fps: Steps per second.
        commands: (T, N, 7) canonical commands.
        image_motion: (T, 2) flow (right, down) summed over the moving pixels, in image areas times pixels per step.
        same_image: (T,) whether the image equals the one before.
        motion: (T, N, 7) the same as `commands` but derived from the measured poses, or None.
        predicted: (T, 2) image heights that the projected end-effectors move on average, NaN where all of them are
            behind the camera; None without camera and poses.
        behind: Images in which all end-effectors are behind the camera.
    """

    name: str
    fps: float
    commands: np.ndarray
    image_motion: np.ndarray
    same_image: np.ndarray
    motion: np.ndarray | None
    predicted: np.ndarray | None
    behind: int = 0


def latest_delay(fps: float) -> int:
    """Return `LATEST` in steps, at least 2."""
    return max(2, int(LATEST * fps))


def delays_at(fps: float) -> range:
    """Return the delays that are tried, in steps, -4 to 6 at 5 Hz; below 0 the image would know the future."""
    return range(-2 * latest_delay(fps), 3 * latest_delay(fps) + 1)


def measure(episode: Episode) -> Signals:
    """Reduce an episode; decodes its images.

    Raises:
        ValueError: If the images cannot be decoded or do not fit the actions.
    """
    from prophet_gym.action_frames import project

    frames, spec = episode.frames, episode.action_spec
    motion = predicted = None
    behind = 0
    if episode.eef_pose is not None and episode.gripper is not None:
        motion = measured_motion(episode, spec)
        if episode.camera is not None:
            pixels = project(episode.eef_pose[..., :3, 3], episode.camera)[..., :2]
            predicted = projected_motion(pixels) / episode.camera.height
            behind = int((~np.isfinite(pixels).all(axis=-1)).all(axis=1).sum())
    same = (frames[1:] == frames[:-1]).reshape(len(frames) - 1, -1).all(axis=1)
    flow = image_motion(frames)
    return Signals(episode.name, episode.fps, episode.canonical_actions, flow, same, motion, predicted, behind)


def measured_motion(episode: Episode, spec: ActionSpec) -> np.ndarray:
    """Return the canonical commands (T, N, 7) that would have led through the measured poses, read by ``spec``."""
    assert episode.eef_pose is not None and episode.gripper is not None
    return spec.to_canonical(actions_from_poses(episode.eef_pose, episode.gripper, spec))


def projected_motion(pixels: np.ndarray) -> np.ndarray:
    """Mean step (T, 2) of the end-effectors at pixels (T + 1, N, 2) that are finite; NaN where none is."""
    steps = np.diff(pixels, axis=0)
    seen = np.isfinite(steps).all(axis=-1, keepdims=True)
    count = seen.sum(axis=1)
    total = np.where(seen, steps, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def image_motion(frames: np.ndarray) -> np.ndarray:
    """Sum the optical flow of the moving pixels of (T + 1, H, W, 3) uint8; (T, 2), right and down."""
    height, width = frames.shape[1:3]
    if height > _HEIGHT:
        size = max(1, round(width * _HEIGHT / height)), _HEIGHT
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    flow = farneback_flow(frames)
    moves = np.linalg.norm(flow, axis=-1, keepdims=True) > _MOVES * frames.shape[1]
    return (flow * moves).sum(axis=(1, 2)) / (frames.shape[1] * frames.shape[2])


def joined(
    targets: Sequence[np.ndarray], inputs: Sequence[np.ndarray], delay: int, delays: range
) -> tuple[np.ndarray, np.ndarray]:
    """Pair targets[t] with inputs[t - delay] of every episode, at steps where every one of `delays` has a partner.

    Episodes too short for that use the steps that this delay leaves, which may be none.
    """
    kept_targets, kept_inputs = [], []
    for target, given in zip(targets, inputs, strict=True):
        length = len(target)
        first, last = max(delays), length + min(delays)
        if last - first < length // 2:
            first = max(0, delay)
            last = max(first, length + min(0, delay))  # no negative index, which would count from the end
        kept_targets.append(target[first:last])
        kept_inputs.append(given[first - delay : last - delay])
    return np.concatenate(kept_targets), np.concatenate(kept_inputs)


def explained(targets: np.ndarray, inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of the targets' (R, M) variance that a linear map of the inputs (R, D) explains, and the map (D, M).

    The share is corrected for the number of inputs, so that it is about 0 for unrelated ones.
    """
    weights = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    rows, width = inputs.shape
    if rows <= width + 1:
        return 0.0, weights
    total = ((targets - targets.mean(axis=0)) ** 2).sum()
    if total == 0:
        return 0.0, weights
    rest = ((targets - inputs @ weights) ** 2).sum() / total
    return float(1 - rest * (rows - 1) / (rows - width - 1)), weights


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of every column of a (R, A) with every column of b (R, B): (A, B); 0 where a column is constant."""
    if len(a) == 0:
        return np.zeros((a.shape[1], b.shape[1]))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norms = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)[None]
    return np.divide(a.T @ b, norms, out=np.zeros_like(norms), where=norms > 1e-12)


def moves(column: np.ndarray, least: float) -> bool:
    """Whether a column of commands varies enough to say something about it."""
    return bool(np.std(column) > least)
