"""A camera from clicks on the gripper (``prophet calibrate``): for recordings whose calibration nobody kept.

A click says where the end-effector is seen in one image; the recording says where it was in the world. Seven numbers
explain all clicks: one focal length, and rotation and translation of the camera; the principal point is the middle of
the image. Perspective-n-point solutions for several focal lengths begin, a robust nonlinear fit ends. There is no lens
distortion in this camera.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.optimize import least_squares

from prophet_gym.action_frames import NEAR, Camera
from prophet_gym.data.episode import Episode
from prophet_gym.data.sequence import EpisodeSequence

__all__ = ["Calibration", "Click", "calibrate_camera", "clicked_points", "read_clicks"]

MIN_POINTS = 4
"""Clicks below which seven numbers are not determined."""
_SPREAD = 0.01  # metres: points closer together than this say nothing about a direction
_FOCALS = (0.6, 1.0, 1.7, 3.0, 5.0)  # of the first guesses, in units of the larger image side
_USUAL_FOCAL, _FOCAL_SPREAD = 1.2, 0.7  # prior of the focal length in the same units, and its width in logarithm
_PRIOR_WEIGHT = 0.05  # pixels that one prior width weighs: it decides only what clicks leave open
_OUTLIER = 2.0  # pixels of error from which a click counts less


@dataclass(frozen=True)
class Click:
    """Where an end-effector is seen.

    Attributes:
        episode: name of the episode.
        frame: index of the image, from 0.
        u: pixels to the right of the centre of the top left pixel.
        v: pixels down from there.
        effector: which end-effector, from 0.
    """

    episode: str
    frame: int
    u: float
    v: float
    effector: int = 0


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted camera.

    Attributes:
        camera: the camera.
        errors: (P,) distance in pixels between each click and the projected point.
        focal_uncertainty: standard deviation of the focal length in units of it; near 0.7, what is assumed beforehand,
            where the gripper hardly moved towards or away from the camera.
    """

    camera: Camera
    errors: np.ndarray
    focal_uncertainty: float

    @property
    def median(self) -> float:
        """Median error in pixels."""
        return float(np.median(self.errors))

    @property
    def worst(self) -> float:
        """Largest error in pixels."""
        return float(self.errors.max())


def read_clicks(path: str | Path) -> list[Click]:
    """Read clicks from a CSV file with a header line, or from a JSON list of objects.

    Columns or keys: ``episode, frame, u, v`` and, with several end-effectors, ``effector``.

    Raises:
        ValueError: no such file, or a row lacks a column or is no number; the message names it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected a CSV or JSON file of clicks") from error
    clicks = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        try:
            click = Click(
                str(row["episode"]), int(row["frame"]), float(row["u"]), float(row["v"]), int(row.get("effector") or 0)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: click {number} is {row!r} ({type(error).__name__}: {error}); expected episode, frame, u, v"
            ) from error
        if not (np.isfinite(click.u) and np.isfinite(click.v)):
            raise ValueError(f"{path}: click {number} is at ({click.u}, {click.v}); expected finite pixels")
        clicks.append(click)
    return clicks


def clicked_points(
    clicks: Sequence[Click], episodes: EpisodeSequence, offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Look up where the clicked points are in the world.

    Args:
        clicks: the clicks.
        episodes: the recordings, with measured poses.
        offset: of the clicked point from the origin of the end-effector's frame, metres along its axes.

    Returns:
        World points (P, 3) in metres, pixels (P, 2), and (height, width) of the images.

    Raises:
        ValueError: an unknown episode, image or end-effector, an episode without poses, a click outside of the image,
            or images of several sizes.
    """
    opened: dict[str, Episode] = {}
    points, sizes = [], set()
    for click in clicks:
        if click.episode not in opened:
            if click.episode not in episodes.names:
                raise ValueError(
                    f"no episode {click.episode!r}; expected one of {', '.join(episodes.names[:5])}"
                    f"{', ...' if len(episodes) > 5 else ''}"
                )
            opened[click.episode] = episodes[episodes.names.index(click.episode)]
        episode = opened[click.episode]
        if episode.eef_pose is None:
            raise ValueError(f"episode {click.episode!r} has no measured poses; expected recordings with eef_pose")
        if not 0 <= click.frame <= len(episode) or not 0 <= click.effector < episode.eef_pose.shape[1]:
            raise ValueError(
                f"{click}: the episode has images 0 to {len(episode)} and {episode.eef_pose.shape[1]} end-effector(s)"
            )
        height, width = episode.frames.shape[1:3]
        if not (-0.5 <= click.u < width - 0.5 and -0.5 <= click.v < height - 0.5):
            raise ValueError(f"{click}: outside of the image of {width}x{height} pixels; expected u, v in pixels of it")
        sizes.add((height, width))
        pose = episode.eef_pose[click.frame, click.effector]
        points.append(pose[:3, :3] @ np.asarray(offset) + pose[:3, 3])
    if len(sizes) > 1:
        raise ValueError(f"images of several sizes (height, width) {sorted(sizes)}; expected one camera, one size")
    pixels = np.array([[click.u, click.v] for click in clicks], np.float64).reshape(-1, 2)
    return np.array(points, np.float64).reshape(-1, 3), pixels, next(iter(sizes), (0, 0))


def calibrate_camera(
    points: np.ndarray,
    pixels: np.ndarray,
    width: int,
    height: int,
    *,
    principal_point: tuple[float, float] | None = None,
) -> Calibration:
    """Fit a camera to points that are seen at known pixels.

    Args:
        points: (P, 3) world, metres; not all in one place or on one line.
        pixels: (P, 2) where they are seen, from the centre of the top left pixel.
        width: of the image, pixels.
        height: of the image, pixels.
        principal_point: (cx, cy) in pixels; default the middle of the image.

    Raises:
        ValueError: fewer than 4 points, points that determine no camera, or no camera that has them all in front of it.
    """
    points, pixels = np.asarray(points, np.float64), np.asarray(pixels, np.float64)
    if points.ndim != 2 or points.shape[1:] != (3,) or pixels.shape != (len(points), 2):
        raise ValueError(f"points {points.shape} and pixels {pixels.shape}; expected (P, 3) and (P, 2)")
    _require_spread(points, pixels)
    centre = np.array(((width - 1) / 2, (height - 1) / 2) if principal_point is None else principal_point)
    side = max(width, height)
    middle = points.mean(axis=0)  # rotation about the points' middle hardly changes where they are seen
    best, cost = None, np.inf
    for start in _first_guesses(points - middle, pixels, centre, side):
        fit = least_squares(
            _residuals, start, args=(points - middle, pixels, centre, side), loss="soft_l1", f_scale=_OUTLIER,
            x_scale="jac", max_nfev=300,
        )  # fmt: skip
        if fit.cost < cost and (_in_camera(fit.x, points - middle)[:, 2] > NEAR).all():
            best, cost = fit, fit.cost
    if best is None:
        raise ValueError(
            f"no camera has all {len(points)} points in front of it; expected clicks on one end-effector from one "
            "fixed camera: check u, v, frame numbers and the unit of the poses (metres)"
        )
    focal, rotation = float(np.exp(best.x[0])), cv2.Rodrigues(best.x[1:4])[0]
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = rotation, best.x[4:7] - rotation @ middle
    K = np.array([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]])
    errors = np.linalg.norm(_seen(best.x, points - middle, centre) - pixels, axis=1)
    return Calibration(Camera(K, E, width, height), errors, _focal_uncertainty(best.jac, errors))


def _require_spread(points: np.ndarray, pixels: np.ndarray) -> None:
    count = len(points)
    if count < MIN_POINTS:
        raise ValueError(f"{count} points; expected at least {MIN_POINTS}, better 10 or more from several poses")
    for what, values, least in (("world", points, _SPREAD), ("image", pixels, 1.0)):
        spread = np.linalg.svd(values - values.mean(axis=0), compute_uv=False) / np.sqrt(count)
        if spread[0] < least:
            raise ValueError(
                f"all {count} points are at one place of the {what}; expected clicks at several poses of the gripper"
            )
        if spread[1] < max(0.02 * spread[0], 0.2 * least):
            raise ValueError(
                f"all {count} points lie on one line of the {what}; expected poses that differ in other directions: "
                "add clicks where the gripper is to the side, higher, or nearer"
            )


def _first_guesses(points: np.ndarray, pixels: np.ndarray, centre: np.ndarray, side: int) -> list[np.ndarray]:
    """Perspective-n-point solutions, over all points and over those that agree, for a few focal lengths."""
    guesses = []
    for factor in _FOCALS:
        focal = factor * side
        K = np.array([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]])
        poses: list[tuple[np.ndarray, np.ndarray]] = []
        with suppress(cv2.error):  # clicks that fit no camera of this focal length
            solutions = cv2.solvePnPGeneric(points, pixels, K, None, flags=cv2.SOLVEPNP_SQPNP)
            poses += zip(solutions[1], solutions[2], strict=True)
        with suppress(cv2.error):
            found, turn, move, _ = cv2.solvePnPRansac(
                points, pixels, K, None, reprojectionError=2 * _OUTLIER, flags=cv2.SOLVEPNP_SQPNP
            )
            poses += [(turn, move)] if found else []
        guesses += [np.concatenate([[np.log(focal)], turn.ravel(), move.ravel()]) for turn, move in poses]
    return [guess for guess in guesses if np.isfinite(guess).all()]


def _in_camera(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Camera coordinates (P, 3) of world points for (log focal length, rotation vector, translation)."""
    return points @ cv2.Rodrigues(values[1:4])[0].T + values[4:7]


def _seen(values: np.ndarray, points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    local = _in_camera(values, points)
    return np.exp(values[0]) * local[:, :2] / np.maximum(local[:, 2:], NEAR) + centre


def _residuals(values: np.ndarray, points: np.ndarray, pixels: np.ndarray, centre: np.ndarray, side: int) -> np.ndarray:
    prior = _PRIOR_WEIGHT * (values[0] - np.log(_USUAL_FOCAL * side)) / _FOCAL_SPREAD
    return np.append((_seen(values, points, centre) - pixels).ravel(), prior)


def _focal_uncertainty(jacobian: np.ndarray, errors: np.ndarray) -> float:
    """Of the focal length's logarithm: clicks as inexact as the errors, a tenth of a pixel or more, and the prior."""
    noise = max(0.1, float(np.sqrt(np.mean(errors**2) / 2)))
    information = jacobian[:-1].T @ jacobian[:-1] / noise**2
    information[0, 0] += _FOCAL_SPREAD**-2
    return float(np.sqrt(np.linalg.inv(information)[0, 0]))
