"""The observation shared by world models and simulators: one RGB image and the proprioceptive state."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from .actions import ActionSpec, state_vector

__all__ = ["make_observation", "observation_space"]

# Per end-effector: position (m), axis-angle (rad), open ratio, pad. Poses integrate unbounded commands, so the bounds
# are only a sanity range, wide enough for any arm; finite, because learners and checkers dislike infinite boxes.
_STATE_HIGH = (100.0, 100.0, 100.0, 4.0, 4.0, 4.0, 1.01, 1.0)
_STATE_LOW = (-100.0, -100.0, -100.0, -4.0, -4.0, -4.0, -0.01, 0.0)


def observation_space(action_spec: ActionSpec, image_size: tuple[int, int]) -> spaces.Dict:
    """Returns ``Dict(image (H, W, 3) uint8 RGB, state (8 N,) float32)``.

    ``state`` is, per end-effector, the commanded position in metres (3), its axis-angle in radians (3), the gripper's
    open ratio (1) and a zero (1), in the frame of the snapshot's poses.
    """
    n = action_spec.num_effectors
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, (*image_size, 3), np.uint8),
            "state": spaces.Box(
                np.array(_STATE_LOW * n, np.float32), np.array(_STATE_HIGH * n, np.float32), dtype=np.float32
            ),
        }
    )


def make_observation(frames: np.ndarray, poses: np.ndarray, gripper: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a fresh observation.

    Args:
        frames: (..., H, W, 3) uint8.
        poses: commanded end-effector poses, (..., N, 4, 4), metres.
        gripper: open ratios, (..., N).

    Returns:
        ``{"image": (..., H, W, 3) uint8, "state": (..., 8 N) float32}``.
    """
    state = state_vector(poses, gripper)
    return {"image": np.array(frames, dtype=np.uint8), "state": np.array(state, dtype=np.float32)}
