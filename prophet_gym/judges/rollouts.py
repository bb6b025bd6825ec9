"""Labelled rollouts: what judges are trained and measured on.

Labels come from the simulator: success after every command, of which the last one is the rollout's label. Where there
is no simulator a person gives the last one (``human_labels``). Frames are the simulator's or camera's own or a world
model's imagination of the same actions (paper 3.4.1, domain bridging).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        success: (T,) bool, the simulator's success at each frame; of a person's label only the last is meant.
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
    episodes: Iterable[Episode],
    imagined: Iterable[np.ndarray] | None = None,
    *,
    labels: Mapping[str, bool] | None = None,
) -> list[LabelledRollout]:
    """Reads episodes whose success is known into memory.

    Args:
        episodes: with ``labels["success"]`` (T+1,); ``metadata["behaviour"]`` is kept if present.
        imagined: for each episode, a world model's frames (T+1, H, W, 3) uint8 of its actions, used in place of the
            episode's own.
        labels: a person's verdicts by episode name (:func:`prophet_gym.judges.human_labels.known_labels`), used instead
            of the episodes' own; they say how a rollout ends, so measure judges on them, do not train on prefixes.

    Raises:
        ValueError: if an episode has no success labels, or no person's label where ``labels`` is given.
    """
    rollouts = []
    source = "real" if imagined is None else "imagined"
    episodes = list(episodes)
    for episode, frames in zip(episodes, [None] * len(episodes) if imagined is None else imagined, strict=True):
        if labels is not None:
            if episode.name not in labels:
                raise ValueError(f"Episode {episode.name!r} has no label among the {len(labels)} given; leave it out.")
            success = np.zeros(len(episode) + 1, bool)
            success[-1] = labels[episode.name]
        elif "success" in episode.labels:
            success = np.asarray(episode.labels["success"]).astype(bool)
        else:
            raise ValueError(
                f"Episode {episode.name!r} has no labels['success']; judges learn from simulator labels. "
                f"It has {sorted(episode.labels)}. Record episodes with `prophet record`, or say yourself what "
                "succeeded with `prophet judge label`."
            )
        behaviour = str(episode.metadata.get("behaviour", ""))
        frames = episode.frames if frames is None else frames
        rollouts.append(
            LabelledRollout(np.asarray(frames), episode.instruction, success, episode.name, behaviour, source)
        )
    return rollouts
