"""Success on Tabletop by a rule on pixels, the baseline that a trained judge has to beat; nothing in it is learned.

It says in pixels what the simulator's definition says in metres: the named block is seen within the rim of the named
plate, or in the outer quarter of the picture on the named side, in all of the late frames that the classifier looks
at too. Colours are those that the words name. It cannot see whether the block has been let go or hangs above the plate.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from prophet_gym.judges import Verdict
from prophet_gym.judges.base import check_rollout, check_rollouts
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.network import frame_indices
from prophet_gym.metrics.tracking import MAX_HUE_ANGLE, find_block, reference_color

COLOURS = {
    "red": (209, 33, 31), "green": (41, 158, 56), "yellow": (242, 199, 31), "purple": (140, 51, 168),
    "blue": (46, 84, 217),
}  # fmt: skip
"""RGB behind the words; white is told by its brightness."""
LATE_FRAMES = (0, 2, 5)
"""Distances from the last frame, as in the packaged classifier."""
STILL_SHOWN = 0.25
"""Share of the frames in which a pixel has to show the plate: the hand covers it for a while, the block in the end."""


class PixelRule:
    """Judges Tabletop by where the block is seen; a block that is lost in a late frame is a failure.

    ``Verdict.score`` is one half on the rim of the plate, or on the border of the outer quarter of the picture, and
    falls with the distance from the plate's centre (in its radii), or from the edge (in halves of the picture).

    Args:
        threshold: scores at or above it are success.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.rule = DecisionRule(threshold)

    def __call__(self, frames: np.ndarray, instruction: str) -> Verdict:
        """Judges one rollout (T, H, W, 3) uint8; abstains where the instruction is not one of Tabletop's."""
        check_rollout(frames, instruction)
        words = instruction.split()
        block = words[2] if len(words) > 2 else ""
        if block not in COLOURS or words[-1] not in ("plate", "edge"):
            return Verdict.abstain(f"no rule for {instruction!r}")
        color = block_color(frames[0], block)
        seen = [find_block(frames[index], color) for index in frame_indices(len(frames), LATE_FRAMES)[1:]]
        scores = [0.0]
        if words[-1] == "edge":
            side = -1.0 if words[-2] == "left" else 1.0
            half = (frames.shape[2] - 1) / 2
            scores = [0.0 if at is None else 0.5 * (1 + side * (at[0] - half) / half) for at in seen]
            scores = [float(np.clip(score - 0.25, 0.0, 1.0)) for score in scores]
        elif (plate := find_plate(frames, words[-2])) is not None:
            centre, radii = plate
            away = [np.inf if at is None else np.linalg.norm((np.array(at) - centre) / radii) for at in seen]
            scores = [float(np.clip(1 - 0.5 * each, 0.0, 1.0)) for each in away]
        score = min(scores)
        return Verdict(bool(self.rule.success(score)), score)

    def judge_batch(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Verdict]:
        """Judges rollouts one after the other."""
        check_rollouts(frames, instructions)
        return [self(each, instruction) for each, instruction in zip(frames, instructions, strict=True)]


def block_color(frame: np.ndarray, word: str) -> np.ndarray:
    """RGB (3,) of the block of this colour in the first frame; the word's own if it cannot be made out there."""
    nominal = np.array(COLOURS[word], np.float32)
    at = find_block(frame, nominal)
    if at is None:
        return nominal
    try:
        return reference_color(frame, np.array(at))
    except ValueError:  # a finger lies across its middle
        return nominal


def find_plate(frames: np.ndarray, word: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Centre (u, v) and half extents of the plate in pixels, from all frames, as it does not move; None if unseen."""
    table = np.median(frames[0].reshape(-1, 3), axis=0)
    shown = np.mean([_of_plate(frame, word, table) for frame in frames], axis=0) >= STILL_SHOWN
    count, _, boxes, _ = cv2.connectedComponentsWithStats(shown.astype(np.uint8))
    if count == 1:
        return None
    left, top, width, height, _ = boxes[1 + boxes[1:, cv2.CC_STAT_AREA].argmax()]
    half = np.array([width, height]) / 2
    return np.array([left, top]) + half - 0.5, half


def _of_plate(frame: np.ndarray, word: str, table: np.ndarray) -> np.ndarray:
    """Bool (H, W): pixels brighter than halfway from the table to white, or of the plate's hue."""
    if word == "white":
        return frame.min(axis=-1) > (table.min() + 255) / 2
    opponent = np.array([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0]])
    wanted = (np.array(COLOURS[word]) - table) @ opponent
    strength = np.linalg.norm(wanted)
    chroma = (frame - table) @ opponent
    along = chroma @ wanted / strength
    across = np.abs(chroma @ np.array([-wanted[1], wanted[0]]) / strength)
    return (along > 0.5 * strength) & (across < np.tan(np.radians(MAX_HUE_ANGLE)) * along)
