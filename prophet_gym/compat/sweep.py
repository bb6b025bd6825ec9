"""Does the imagined arm go where it is sent? A sweep of single motions, judged by the pictures alone.

Each motion (+x, -x, ... -yaw) is commanded from several snapshots. Points around the end-effector are moved as the
commands say and projected by the snapshot's camera; the optical flow of the frames is sampled where they are. The score
is the cosine between the two fields, over all points and frames. The gripper is commanded away from its start and back:
the picture around it must change, then change back.

Swapped axes, signs and units' signs, the wrong frame, the wrong camera and an inverted gripper fail. What one camera
cannot tell apart (on Tabletop, y and z both move the hand up the picture) passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..action_frames import project
from ..actions import ActionSpec, integrate_poses
from ..metrics.optical_flow import farneback_flow
from ..snapshot import Snapshot
from .commands import convert_commands

__all__ = ["MOTIONS", "Motion", "check_motion", "motion_sweep"]

STEPS = 4
"""Commands of one motion."""
MIN_COSINE = 0.2
"""Measured on Tabletop: the right motion 0.89 to 0.97 (yaw, which only the jaws show: simulator 0.51, Prophet 0.27),
another axis at most 0.14, the opposite motion below -0.25."""
MIN_CHANGE = 0.1
"""Of the gripper's score: 1 where nothing else changes (simulator), 0.38 to 0.50 on Prophet-Tabletop, 0 where the
command makes no difference, -0.50 and below where it is inverted."""
_STEP_M, _STEP_RAD = 0.02, 0.2  # per command, if the world's bounds allow it
_RING_M, _HEIGHTS_M = 0.05, (0.0, 0.06)  # where the points lie about the end-effector
_BASE = ActionSpec(delta="servo", low=(-1.0,) * 3 + (-math.pi,) * 3 + (0.0,), high=(1.0,) * 3 + (math.pi,) * 3 + (1.0,))

MOTIONS: dict[str, tuple[int, float]] = {
    f"{sign}{name}": (axis, _STEP_RAD * side if name == "yaw" else _STEP_M * side)
    for axis, name in ((0, "x"), (1, "y"), (2, "z"), (5, "yaw"))
    for sign, side in (("+", 1.0), ("-", -1.0))
}
"""Number that is commanded, in the robot's base frame, and its value per command in metres or radians."""


@dataclass(frozen=True)
class Motion:
    """The outcome of one motion.

    Attributes:
        name: "+x", ... "-yaw", "close" or "open".
        score: -1 to 1, mean over the starts: 1 is what was commanded, 0 unrelated, -1 the opposite.
        limit: what the score must exceed.
    """

    name: str
    score: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the picture moved as commanded."""
        return self.score > self.limit


def motion_sweep(env: Any, snapshots: Sequence[Snapshot], *, seed: int = 0) -> list[Motion]:
    """Commands every motion from every snapshot.

    Args:
        env: a world or simulator with the chunk interface and one end-effector; wrappers may change the commands.
        snapshots: starts with a calibrated camera, the arm in view and free to move 8 cm.
        seed: of the noise.

    Returns:
        One :class:`Motion` per entry of :data:`MOTIONS`, then the gripper's two.

    Raises:
        ValueError: no snapshots, or one without a camera.
    """
    if len(snapshots) == 0 or any(snapshot.camera is None for snapshot in snapshots):
        raise ValueError(
            f"got {len(snapshots)} snapshots, with a camera: {[s.camera is not None for s in snapshots]}; expected at "
            "least one, each with the calibrated camera that says where a motion shows."
        )
    spec = getattr(env.unwrapped, "world_model", env.unwrapped).action_spec
    steps = min(STEPS, env.action_space.shape[0])
    scores: dict[str, list[float]] = {}
    for snapshot in snapshots:
        for name, (axis, value) in MOTIONS.items():
            command = np.zeros(7)
            command[axis], command[6] = value, snapshot.gripper[0]
            chunk, poses = _plan(snapshot, [command] * steps, spec)
            frames = _play(env, snapshot, [chunk], seed)
            scores.setdefault(name, []).append(_agreement(frames, poses, snapshot))
        for name, score in _gripper_scores(env, snapshot, steps, spec, seed).items():
            scores.setdefault(name, []).append(score)
    limits = {name: MIN_COSINE if name in MOTIONS else MIN_CHANGE for name in scores}
    return [Motion(name, float(np.mean(values)), limits[name]) for name, values in scores.items()]


def check_motion(env: Any, snapshots: Sequence[Snapshot], *, seed: int = 0) -> list[Motion]:
    """Runs :func:`motion_sweep` and requires that every motion goes the right way.

    Raises:
        AssertionError: one does not; the message shows all scores.
        ValueError: as :func:`motion_sweep`.
    """
    motions = motion_sweep(env, snapshots, seed=seed)
    wrong = [motion.name for motion in motions if not motion.passed]
    if wrong:
        table = ", ".join(f"{m.name} {m.score:+.2f} (> {m.limit:g})" for m in motions)
        raise AssertionError(
            f"The picture does not move as commanded on {wrong}. Scores: {table}. Likely cause: swapped axes, a sign, "
            "the frame of the commands, the camera, or for 'close' and 'open' the gripper's polarity."
        )
    return motions


def _plan(snapshot: Snapshot, commands: list[np.ndarray], spec: ActionSpec) -> tuple[np.ndarray, np.ndarray]:
    """Native chunk (T, 7) and the poses (T + 1, 4, 4) that it commands."""
    poses, chunk = [snapshot.eef_pose], []
    for command in commands:
        native, _ = convert_commands(command[None], _BASE, spec, poses[-1][None])
        chunk.append(native[0])
        poses.append(integrate_poses(poses[-1], spec.to_canonical(native), spec)[0])
    return np.stack(chunk), np.stack(poses)[:, 0]


def _play(env: Any, snapshot: Snapshot, chunks: list[np.ndarray], seed: int) -> np.ndarray:
    """Frames (1 + T, H, W, 3), the snapshot's first."""
    observation, _ = env.reset(seed=seed, options={"snapshot": snapshot})
    frames = [observation["image"][None]]
    for chunk in chunks:
        *_, info = env.step(chunk)
        frames.append(info["frames"])
    return np.concatenate(frames)


def _agreement(frames: np.ndarray, poses: np.ndarray, snapshot: Snapshot) -> float:
    """Cosine between commanded and seen motion of points about the end-effector."""
    angles = np.arange(8) * np.pi / 4
    ring = np.concatenate(
        [np.stack([_RING_M * np.cos(angles), _RING_M * np.sin(angles), 0 * angles + z], axis=1) for z in _HEIGHTS_M]
    )
    attached = ring @ poses[0, :3, :3]  # upright about the first pose, in the end-effector's frame
    points = np.einsum("tij,kj->tki", poses[:, :3, :3], attached) + poses[:, None, :3, 3]
    assert snapshot.camera is not None
    pixels = project(points, snapshot.camera)
    commanded = np.diff(pixels, axis=0)
    seen = np.stack([_sample(flow, at) for flow, at in zip(farneback_flow(frames), pixels[:-1], strict=True)])
    visible = np.isfinite(commanded) & np.isfinite(pixels[:-1])
    commanded = np.where(visible, commanded, 0.0)
    norms = np.linalg.norm(commanded) * np.linalg.norm(seen)
    return float((commanded * seen).sum() / norms) if norms > 0 else 0.0


def _sample(flow: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Mean flow (K, 2) around pixels (K, 2); zero outside of the image."""
    height, width = flow.shape[:2]
    reach = max(1, round(height / 32))
    result = np.zeros((len(pixels), 2))
    for k, (u, v) in enumerate(np.nan_to_num(pixels, nan=-1.0).round().astype(int)):
        if 0 <= u < width and 0 <= v < height:
            window = flow[max(0, v - reach) : v + reach + 1, max(0, u - reach) : u + reach + 1]
            result[k] = window.mean(axis=(0, 1))
    return result


def _gripper_scores(env: Any, snapshot: Snapshot, steps: int, spec: ActionSpec, seed: int) -> dict[str, float]:
    """Commanded away from its start, the gripper must look different; commanded back, as before."""
    is_open = bool(snapshot.gripper[0] > 0.5)
    stay, leave = np.zeros(7), np.zeros(7)
    (stay if is_open else leave)[6] = 1.0
    hold, _ = _plan(snapshot, [stay] * steps, spec)
    away, _ = _plan(snapshot, [leave] * steps, spec)
    held = _play(env, snapshot, [hold, hold], seed)
    moved = _play(env, snapshot, [away, hold], seed)
    assert snapshot.camera is not None
    u, v = project(snapshot.eef_pose[0, :3, 3], snapshot.camera).round().astype(int)
    reach = held.shape[1] // 6
    area = np.s_[max(0, v - reach) : v + reach + 1, max(0, u - reach) : u + reach + 1]

    def change(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one[area].astype(float) - other[area]).mean())

    start, left, back = held[0], moved[steps], moved[-1]
    gone = change(left, start)
    first = _contrast(gone, change(held[steps], start))
    second = _contrast(gone, change(back, start))
    return {"close": first, "open": second} if is_open else {"close": second, "open": first}


def _contrast(much: float, little: float) -> float:
    return (much - little) / (much + little) if much + little > 0 else 0.0
