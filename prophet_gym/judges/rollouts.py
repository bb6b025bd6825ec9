"""Labelled rollouts: what judges are trained and measured on.

Labels come from the simulator: success after every command, of which the last one is the rollout's label. Frames are
the simulator's own or a world model's imagination of the same actions (paper 3.4.1, domain bridging).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prophet_gym.judges.base import check_rollout

if TYPE_CHECKING:
    from prophet_gym.data.episode import Episode

__all__ = ["LabelledRollout", "labelled_rollouts"]


@dataclass(frozen=True, eq=False)
class LabelledRollout:
    """Frames, instruction and the truth about them.

    Attributes:
        frames: (T, H, W, 3) uint8, the snapshot's frame first.
        instruction: the goal in words.
        success: (T,) bool, the simulator's success at each frame.
        name: the episode's name; rollouts of the same episode share it.
        behaviour: who acted, such as "expert" or "random"; empty if unknown.
        source: "real" (simulator frames) or "imagined" (world-model frames).
    """

    frames: np.ndarray
    instruction: str
    success: np.ndarray
    name: str
    behaviour: str = ""
    source: str = "real"

    def __post_init__(self) -> None:
        check_rollout(self.frames, self.instruction)
        if self.success.dtype != np.bool_ or self.success.shape != (len(self.frames),):
            raise ValueError(
                f"Rollout {self.name!r}: success must be bool of shape ({len(self.frames)},), one per frame, "
                f"got {self.success.dtype} {self.success.shape}."
            )

    @property
    def label(self) -> bool:
        """Success after the last command."""
        return bool(self.success[-1])


def labelled_rollouts(
    episodes: Iterable[Episode], imagined: Iterable[np.ndarray] | None = None
) -> list[LabelledRollout]:
    """Reads episodes that carry simulator success into memory.

    Args:
        episodes: with ``labels["success"]`` (T+1,); ``metadata["behaviour"]`` is kept if present.
        imagined: for each episode, a world model's frames (T+1, H, W, 3) uint8 of its actions, used in place of the
            episode's own.

    Raises:
        ValueError: if an episode has no success labels.
    """
    rollouts = []
    source = "real" if imagined is None else "imagined"
    episodes = list(episodes)
    for episode, frames in zip(episodes, [None] * len(episodes) if imagined is None else imagined, strict=True):
        if "success" not in episode.labels:
            raise ValueError(
                f"Episode {episode.name!r} has no labels['success']; judges learn from simulator labels. "
                f"It has {sorted(episode.labels)}. Record episodes with `prophet record`."
            )
        behaviour = str(episode.metadata.get("behaviour", ""))
        success = np.asarray(episode.labels["success"]).astype(bool)
        frames = episode.frames if frames is None else frames
        rollouts.append(
            LabelledRollout(np.asarray(frames), episode.instruction, success, episode.name, behaviour, source)
        )
    return rollouts
