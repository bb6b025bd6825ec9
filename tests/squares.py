"""Made-up demonstrations: a square follows the commands, and instruction, state and image all tell where to."""

import numpy as np

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.data.episode import Episode

SPEC = ACTION_SPECS["tabletop"]


def square_episode(index, length=9, **changes):
    """Odd indices move right, even ones left; every third was played by behaviour half_good."""
    rng = np.random.default_rng(index)
    sign = 1.0 if index % 2 else -1.0
    actions = np.zeros((length, 7), np.float32)
    actions[:, 0] = sign * rng.uniform(0.02, 0.03, length)
    actions[:, 6] = np.arange(length) < 5
    pose = np.tile(np.eye(4), (length + 1, 1, 1, 1))
    pose[0, 0, :3, 3] = 0.0, 0.0, 0.1
    images = np.full((length + 1, 16, 16, 3), 60, np.uint8)
    for t, x in enumerate(np.concatenate([[0], np.cumsum(actions[:, 0])])):
        column = int(np.clip(7 + 20 * x, 0, 12))
        images[t, 6:10, column : column + 4] = 60 + index, 200, t
    values = dict(
        images=images,
        actions=actions,
        action_spec=SPEC,
        instruction="move right" if sign > 0 else "move left",
        fps=10.0,
        eef_pose=pose,
        gripper=np.ones((length + 1, 1)),
        success=True,
        name=f"episode_{index}",
        metadata={"behaviour": "expert" if index % 3 else "half_good"},
    )
    return Episode(**{**values, **changes})
