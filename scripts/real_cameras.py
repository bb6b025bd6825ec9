"""Cameras for the Bridge and DROID recordings, which come without: copies of the episodes with calibration and poses.

``python scripts/real_cameras.py RECORDINGS OUT`` reads ``bridge/`` and ``droid/`` and writes ``OUT/bridge`` (8
episodes) and ``OUT/droid`` (10 episodes of one rig from two cameras). ``scripts/real/`` holds what was clicked by hand.

DROID's poses are measured, so ordinary calibration would do (``prophet calibrate``), but its cameras were moved between
episodes: clicks on the finger tips and on the corners of the table are fitted together, with one focal length and one
pose of the camera for each placement. Bridge has commands and nothing else. They explain how the gripper moves in the
image over a second or so and drift over an episode, so a scaled orthographic camera is fitted to the *steps* between
clicks, and the pose of every image is put where the gripper was clicked.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from tyro.conf import Positional

from prophet_gym.action_frames import Camera
from prophet_gym.calibrate import Click, read_clicks
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.data.opening import open_dataset

HERE = Path(__file__).parent / "real"
BRIDGE_FOCAL, BRIDGE_SCALE, BRIDGE_LAG = 300.0, 480.0, 1  # pixels, pixels a metre, images behind the command
# The arm of this episode hangs at its highest point from here on and is commanded further up, half a metre in all.
BRIDGE_ENDS = {"train_008": 27}
# Where the cameras of most episodes look: over the robot's left shoulder. Found without a prior on four of them.
BRIDGE_VIEW = Rotation.from_matrix([[0.49, -0.87, 0.03], [-0.45, -0.29, -0.84], [0.75, 0.39, -0.54]])
BRIDGE_FREE = {"train_004": 0.6}  # radians of freedom around that view; this one looks from elsewhere
DROID_FOCAL = 135.0  # pixels: of these cameras at a width of 320


def soft(residuals: np.ndarray) -> np.ndarray:
    """Returns residuals (P, 2) that count less the larger they are."""
    return residuals / np.sqrt(1 + np.linalg.norm(residuals, axis=1, keepdims=True) / 2)


def matrix(rotation: Rotation, translation: np.ndarray | tuple[float, ...] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """Returns the (4, 4) transform."""
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = rotation.as_matrix(), translation
    return E


def intrinsics(focal: float, width: int, height: int) -> np.ndarray:
    """Returns K with the principal point in the middle."""
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def posed_bridge(episode: Episode, clicks: list[Click]) -> Episode:
    """Returns a Bridge episode with a camera, and with poses that follow the clicks."""
    end = BRIDGE_ENDS.get(episode.name, len(episode))
    episode = episode.with_poses()
    clicks = [click for click in clicks if click.frame <= end]
    frames = np.array([click.frame for click in clicks])
    pixels = np.array([[click.u, click.v] for click in clicks])
    commanded = episode.eef_pose[:, 0, :3, 3]
    moved = np.diff(commanded[np.maximum(frames - BRIDGE_LAG, 0)], axis=0)
    seen, free = np.diff(pixels, axis=0), BRIDGE_FREE.get(episode.name, 0.25)

    def residuals(x: np.ndarray) -> np.ndarray:
        view = Rotation.from_rotvec(x[:3])
        steps = soft((np.exp(x[3]) * moved @ view.as_matrix()[:2].T - seen) / 6)
        prior = (view * BRIDGE_VIEW.inv()).as_rotvec() / free
        return np.concatenate([steps.ravel(), prior, [(x[3] - np.log(BRIDGE_SCALE)) / 0.2]])

    x = least_squares(residuals, [*BRIDGE_VIEW.as_rotvec(), np.log(BRIDGE_SCALE)]).x
    view, depth = Rotation.from_rotvec(x[:3]), BRIDGE_FOCAL / np.exp(x[3])
    drawn = np.exp(x[3]) * commanded[np.maximum(frames - BRIDGE_LAG, 0)] @ view.as_matrix()[:2].T
    pairs = [(i, j) for j in range(len(frames)) for i in range(j) if frames[j] - frames[i] <= 20]
    moves = np.array([pixels[j] - pixels[i] for i, j in pairs])
    drift = moves - [drawn[j] - drawn[i] for i, j in pairs]
    lengths = (np.linalg.norm(part, axis=1).mean() for part in (drift, moves))
    print("{}: {:.0f} of {:.0f} px of motion within 20 commands unexplained (mean)".format(episode.name, *lengths))
    height, width = episode.frames.shape[1:3]
    camera = Camera(intrinsics(BRIDGE_FOCAL, width, height), matrix(view), width, height)
    where = np.stack([np.interp(np.arange(end + 1), frames, pixels[:, k]) for k in (0, 1)], axis=1)
    rays = np.concatenate([(where - camera.K[:2, 2]) / BRIDGE_FOCAL, np.ones((end + 1, 1))], axis=1)
    poses = episode.eef_pose[: end + 1].copy()
    poses[:, 0, :3, 3] = view.inv().apply(depth * rays)
    kept = {key: value[: end + 1] for key, value in episode.labels.items()}
    return replace(
        episode,
        images=episode.frames[: end + 1],
        actions=episode.actions[:end],
        eef_pose=poses,
        gripper=episode.gripper[: end + 1],
        labels=kept,
        camera=camera,
    )


def rows(name: str, camera: str) -> list[dict[str, str]]:
    """Returns the lines of a CSV file in `HERE` that are about one camera."""
    with open(HERE / name, newline="") as file:
        return [row for row in csv.DictReader(file) if row["camera"] == camera]


def droid_cameras(episodes: dict[str, Episode], name: str) -> tuple[float, Callable[[str], np.ndarray]]:
    """Fits one camera of the rig.

    Args:
        episodes: the rig's episodes by name.
        name: of the camera.

    Returns:
        The focal length in pixels, and the function from an episode's name to E (4, 4). E takes the end-effector's
        origin, which is at the flange, to where the finger tips are seen: the hand points down throughout.
    """
    clicks, corners = rows("droid_clicks.csv", name), rows("droid_corners.csv", name)
    placement = {row["episode"]: int(row["placement"]) for row in rows("droid_placements.csv", name)}
    count, names = 1 + max(placement.values()), sorted({row["corner"] for row in corners})
    poses = np.stack([episodes[row["episode"]].eef_pose[int(row["frame"]), 0] for row in clicks])
    at = np.array([placement[row["episode"]] for row in clicks])
    pixels = np.array([[float(row["u"]), float(row["v"])] for row in clicks])
    corner = np.array([names.index(row["corner"]) for row in corners])
    corner_at = np.array([int(row["placement"]) for row in corners])
    corner_pixels = np.array([[float(row["u"]), float(row["v"])] for row in corners])
    middle = intrinsics(1.0, 320, 192)[:2, 2]

    def parts(x: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray, np.ndarray]:
        moves = x[8 : 8 + 6 * count].reshape(count, 6)
        table = np.column_stack([x[9 + 6 * count :].reshape(-1, 2), np.full(len(names), x[8 + 6 * count])])
        return float(np.exp(x[0])), float(x[1]), x[2:8], moves, table

    def seen(points: np.ndarray, where: np.ndarray, focal: float, base: np.ndarray, moves: np.ndarray) -> np.ndarray:
        turned = (Rotation.from_rotvec(moves[where, :3]) * Rotation.from_rotvec(base[:3])).apply(points)
        local = turned + base[3:] + moves[where, 3:]
        return focal * local[:, :2] / np.maximum(local[:, 2:], 0.05) + middle

    def residuals(x: np.ndarray) -> np.ndarray:
        focal, tool, base, moves, table = parts(x)
        tips = poses[:, :3, 3] + tool * poses[:, :3, 2]
        return np.concatenate(
            [
                soft((seen(tips, at, focal, base, moves) - pixels) / 3).ravel(),
                (seen(table[corner], corner_at, focal, base, moves) - corner_pixels).ravel() / 1.5,
                (moves / [*[np.radians(5)] * 3, *[0.06] * 3]).ravel() / 2,
                [(x[0] - np.log(DROID_FOCAL)) / 0.25, (tool - 0.05) / 0.08, (table[0, 2] - 0.02) / 0.1],
                0.3 * (table[:, :2] - [0.5, 0.0]).ravel(),
            ]
        )

    best, rng = None, np.random.default_rng(0)
    for _ in range(40):  # from anywhere around the table
        angle = rng.uniform(0, 2 * np.pi)
        centre = np.array([0.5 + 0.7 * np.cos(angle), 0.7 * np.sin(angle), 0.55])
        forward = np.array([0.5, 0.0, 0.15]) - centre
        right = np.cross(forward, [0, 0, 1])
        axes = np.stack([right, np.cross(forward, right), forward])
        view = Rotation.from_matrix(np.stack([axis / np.linalg.norm(axis) for axis in axes]))
        corners_guess = np.tile([0.5, 0.0], len(names)) + 0.2 * rng.normal(size=2 * len(names))
        start = [np.log(DROID_FOCAL), 0.05, *view.as_rotvec(), *-view.apply(centre), *np.zeros(6 * count), 0.02]
        fit = least_squares(residuals, [*start, *corners_guess], max_nfev=400)
        best = fit if best is None or fit.cost < best.cost else best
    focal, tool, base, moves, _ = parts(best.x)
    tips = poses[:, :3, 3] + tool * poses[:, :3, 2]
    errors = np.linalg.norm(seen(tips, at, focal, base, moves) - pixels, axis=1)
    print(f"{name}: focal length {focal:.0f} px, clicks within {np.median(errors):.1f} px (median)")

    def extrinsics(episode: str) -> np.ndarray:
        move = moves[placement[episode]]
        view = Rotation.from_rotvec(move[:3]) * Rotation.from_rotvec(base[:3])
        return matrix(view, base[3:] + move[3:] + view.apply([0, 0, -tool]))

    return focal, extrinsics


def main(recordings: Positional[Path], out: Positional[Path]) -> None:
    """Writes the copies.

    Args:
        recordings: folder with bridge/ and droid/.
        out: where bridge/ and droid/ go.
    """
    clicks: dict[str, list[Click]] = defaultdict(list)
    for click in read_clicks(HERE / "bridge_clicks.csv"):
        clicks[click.episode].append(click)
    for episode in open_dataset(recordings / "bridge"):
        write_episode(out / "bridge" / episode.name, posed_bridge(episode, clicks[episode.name]))
    for name in ("exterior_1", "exterior_2"):
        source = open_dataset(recordings / "droid", camera=name)
        rig = {row["episode"] for row in rows("droid_placements.csv", name)}
        episodes = {episode.name: episode for episode in source if episode.name in rig}
        focal, extrinsics = droid_cameras(episodes, name)
        for episode in episodes.values():
            camera = Camera(intrinsics(focal, 320, 192), extrinsics(episode.name), 320, 192)
            copy = replace(episode, name=f"{name}_{episode.name}", camera=camera)
            write_episode(out / "droid" / copy.name, copy)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
