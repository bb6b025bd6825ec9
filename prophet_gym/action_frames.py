"""Actions drawn as images: a calibrated camera, projection (Eqs 4-7) and rendering (Eqs 8-9).

An action frame shows, on black, where each end-effector is commanded to be: a disk whose radius falls with depth and
whose colour is the gripper's open ratio, a white point at the origin, and red, green and blue segments along the x, y
and z axes of the end-effector. The disk is drawn on an overlay that is alpha-blended with the line drawing.

The paper gives its sizes in pixels for images of height 256 (LIBERO, BRIDGE); here they scale with ``height / 256``.
Line width, opacity and colour map are not in the paper and are fixed below. All drawing is anti-aliased with sub-pixel
coordinates (disks land within 0.02 pixels), because at 64x64 a command often moves the end-effector by less than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

AXIS_LENGTH = 0.15
"""l of Eq. 4, metres."""
REFERENCE_RADIUS, REFERENCE_DEPTH = 40.0, 1.0
"""r_ref (pixels at height 256) and z_ref (metres) of Eq. 8."""
MIN_RADIUS, MAX_RADIUS = 8.0, 140.0
"""r_min and r_max of Eq. 8, pixels at height 256."""
REFERENCE_HEIGHT = 256
"""Image height, pixels, for which the sizes above hold."""
NEAR = 0.01
"""Depth, metres, from which a point counts as in front of the camera."""

_DISK_OPACITY = 0.5
_LINE_WIDTH = 3.0  # pixels at height 256; never less than 1
_POINT_RADIUS = 4.0  # pixels at height 256; never less than 1
_AXIS_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
# CM of Eq. 9: matplotlib's plasma from 0.25 (closed, violet) to 1 (open, yellow): lightness rises with the open ratio
# and no value is near black, white or a pure axis colour.
_COLOUR_STOPS = np.array([[126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], np.float64)
_SHIFT = 6  # fractional bits of cv2 coordinates: 1/64 pixel
_FAR_PIXELS = 2.0**20  # beyond this, coordinates would overflow cv2's fixed point; nothing there is visible


@dataclass(frozen=True, eq=False)
class Camera:
    """A calibrated pinhole camera without distortion.

    Pixel coordinates have (0, 0) at the *centre* of the top left pixel (OpenCV), so a principal point in the middle of
    the image is ``((width - 1) / 2, (height - 1) / 2)``. Subtract 0.5 from cx, cy of tools that count from its corner.

    Attributes:
        K: (3, 3) intrinsics, pixels; read-only float64.
        E: (4, 4) rigid transform from world to camera, metres, OpenCV axes (x right, y down, z forward); read-only.
        width: Image width, pixels.
        height: Image height, pixels.

    Raises:
        ValueError: If a shape, the last row of K or E, the focal lengths or the rotation of E are not as above.
    """

    K: np.ndarray
    E: np.ndarray
    width: int
    height: int

    def __post_init__(self) -> None:
        """Check the calibration and make it immutable."""
        for name, shape in (("K", (3, 3)), ("E", (4, 4))):
            matrix = np.array(getattr(self, name), np.float64)
            if matrix.shape != shape or not np.isfinite(matrix).all():
                raise ValueError(f"camera {name} has shape {matrix.shape}; expected {shape} of finite numbers")
            matrix.setflags(write=False)
            object.__setattr__(self, name, matrix)
        if self.K[0, 0] <= 0 or self.K[1, 1] <= 0 or self.K[1, 0] != 0 or not np.array_equal(self.K[2], [0, 0, 1]):
            raise ValueError(f"camera K is {self.K.tolist()}; expected [[fx, s, cx], [0, fy, cy], [0, 0, 1]]")
        rotation = self.E[:3, :3]
        rigid = np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-4 and np.linalg.det(rotation) > 0
        if not rigid or not np.array_equal(self.E[3], [0, 0, 0, 1]):
            raise ValueError(
                f"camera E is {self.E.tolist()}; expected a rigid transform from world to camera, last row "
                "[0, 0, 0, 1]. A camera with OpenGL axes needs its y and z rows negated first"
            )
        for name in ("width", "height"):
            if getattr(self, name) != int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"camera {name} is {getattr(self, name)!r}; expected a whole number of pixels above 0")
            object.__setattr__(self, name, int(getattr(self, name)))

    def resized(self, width: int, height: int) -> Camera:
        """Return the camera of the same image resized to `width` x `height` pixels."""
        scale_x, scale_y = width / self.width, height / self.height
        K = self.K.copy()
        K[0] *= scale_x
        K[1] *= scale_y
        K[0, 2] += 0.5 * scale_x - 0.5  # pixel centres are at integers: (u + 1/2) scales, not u
        K[1, 2] += 0.5 * scale_y - 0.5
        return Camera(K, self.E, width, height)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {"K": self.K.tolist(), "E": self.E.tolist(), "width": self.width, "height": self.height}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Camera:
        """Build a camera from `to_dict`'s result.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        if set(values) != {"K", "E", "width", "height"}:
            raise ValueError(f"camera has keys {sorted(values)}; expected ['E', 'K', 'height', 'width']")
        return cls(**values)


def project(points: np.ndarray, camera: Camera) -> np.ndarray:
    """Project points onto the image plane (Eqs 6 and 7).

    Args:
        points: (..., 3) world, metres.
        camera: The camera.

    Returns:
        (..., 2) pixels (u, v), right and down from the centre of the top left pixel; may lie outside of the image.
        NaN for points less than `NEAR` in front of the camera.

    Raises:
        ValueError: If the last dimension is not 3.
    """
    points = np.asarray(points, np.float64)
    if points.ndim < 1 or points.shape[-1] != 3:
        raise ValueError(f"points have shape {points.shape}; expected (..., 3) world coordinates in metres")
    return _to_pixels(_to_camera(points, camera), camera)


def open_ratio_colour(gripper: np.ndarray) -> np.ndarray:
    """Map open ratios (...) to RGB (..., 3) in [0, 255] (CM of Eq. 9), violet to yellow; clipped to [0, 1]."""
    position = np.clip(np.asarray(gripper, np.float64), 0.0, 1.0) * (len(_COLOUR_STOPS) - 1)
    stops = np.arange(len(_COLOUR_STOPS))
    return np.stack([np.interp(position, stops, _COLOUR_STOPS[:, channel]) for channel in range(3)], axis=-1)


def render_action_frames(poses: np.ndarray, gripper: np.ndarray, camera: Camera) -> np.ndarray:
    """Draw one action frame per time step (Eqs 4-9). Frames are independent: fold a batch into T.

    An end-effector behind the camera is not drawn, nor is one whose gripper is flagged as padding (`PAD_GRIPPER`, any
    value below -0.5): a padded command has no target.

    Args:
        poses: (T, N, 4, 4) commanded poses, end-effector to world, metres.
        gripper: (T, N) open ratio.
        camera: Camera of the image the action frames belong to; its size is the size of the frames.

    Returns:
        (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: If the shapes do not match or a value is not finite.
    """
    poses, gripper = np.asarray(poses, np.float64), np.asarray(gripper, np.float64)
    if poses.ndim != 4 or poses.shape[2:] != (4, 4) or gripper.shape != poses.shape[:2]:
        raise ValueError(f"poses {poses.shape} and gripper {gripper.shape}; expected (T, N, 4, 4) and (T, N)")
    if not (np.isfinite(poses).all() and np.isfinite(gripper).all()):
        raise ValueError("poses or gripper hold NaN or infinity; expected finite metres and open ratios")
    scale = camera.height / REFERENCE_HEIGHT
    origin = poses[..., None, :3, 3]  # p^0, Eq. 5
    tips = origin + AXIS_LENGTH * np.swapaxes(poses[..., :3, :3], -1, -2)  # p^k: columns of R are the axes
    points = _to_camera(np.concatenate([origin, tips], axis=-2), camera)  # (T, N, 4, 3)
    depth = points[..., 0, 2]
    drawn = (depth >= NEAR) & (gripper > -0.5)
    points[~drawn] = (0.0, 0.0, 1.0)
    points = _clip_to_near(points)
    pixels = _to_pixels(points, camera)
    drawn &= (np.abs(pixels) < _FAR_PIXELS).all(axis=(-1, -2))
    radius = np.clip(REFERENCE_RADIUS * REFERENCE_DEPTH / np.where(drawn, depth, 1.0), MIN_RADIUS, MAX_RADIUS) * scale
    colours = open_ratio_colour(gripper)

    one = 1 << _SHIFT
    fixed = np.rint(np.where(drawn[..., None, None], pixels, 0.0) * one).astype(np.int64).tolist()
    radii = np.rint((radius - 0.5) * one).astype(np.int64).tolist()  # cv2 fills half a pixel further than it is told
    colours, visible = colours.tolist(), drawn.tolist()
    width, point = max(1, round(_LINE_WIDTH * scale)), round(max(1.0, _POINT_RADIUS * scale) * one)
    frames = np.zeros((len(poses), camera.height, camera.width, 3), np.uint8)
    for t, canvas in enumerate(frames):
        effectors = [n for n, shown in enumerate(visible[t]) if shown]
        for n in effectors:
            start = fixed[t][n][0]
            for end, colour in zip(fixed[t][n][1:], _AXIS_COLOURS, strict=True):
                cv2.line(canvas, start, end, colour, width, cv2.LINE_AA, _SHIFT)
            cv2.circle(canvas, start, point, (255, 255, 255), -1, cv2.LINE_AA, _SHIFT)
        if effectors:
            overlay = canvas.copy()
            for n in effectors:
                cv2.circle(overlay, fixed[t][n][0], radii[t][n], colours[t][n], -1, cv2.LINE_AA, _SHIFT)
            cv2.addWeighted(overlay, _DISK_OPACITY, canvas, 1.0 - _DISK_OPACITY, 0.0, dst=canvas)
    return frames


def _to_camera(points: np.ndarray, camera: Camera) -> np.ndarray:
    """World points (..., 3) to camera coordinates (..., 3), Eq. 6."""
    return points @ camera.E[:3, :3].T + camera.E[:3, 3]


def _to_pixels(points: np.ndarray, camera: Camera) -> np.ndarray:
    """Camera points (..., 3) to pixels (..., 2), Eq. 7; NaN behind the near plane."""
    homogeneous = points @ camera.K.T
    depth = np.where(points[..., 2] >= NEAR * (1 - 1e-9), points[..., 2], np.nan)
    return homogeneous[..., :2] / depth[..., None]


def _clip_to_near(points: np.ndarray) -> np.ndarray:
    """Shorten the axes of (T, N, 4, 3) camera points that reach behind the near plane to end on it."""
    origin, depth = points[..., :1, :], points[..., 2]
    fraction = (origin[..., 2] - NEAR) / np.maximum(origin[..., 2] - depth, 1e-12)
    return np.where((depth < NEAR)[..., None], origin + (points - origin) * fraction[..., None], points)
