"""What an adaptation makes of a data set: clips to train on, held-out clips to measure on, frames to start from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..actions import ActionSpec
from ..data.episode import Episode
from ..data.fitting import fit_camera, fit_frames
from ..data.opening import open_dataset
from ..data.sequence import EpisodeRange, EpisodeSequence
from ..data.variants import VARIANT_OF
from ..data.windows import EpisodeWindows
from ..snapshot import Snapshot, SnapshotSet
from .adapt_config import AdaptConfig
from .clips import ClipSource

MAX_SNAPSHOTS = 64


@dataclass(frozen=True, eq=False)
class Split:
    """A data set, divided.

    Attributes:
        episodes: all of them.
        held_out: the last ones, which are not trained on.
        source: how the others become training clips.
        action_spec: conventions of the commands.
        drawable: episodes with calibrated camera and poses.
        posed: held-out episodes with measured poses.
    """

    episodes: EpisodeSequence
    held_out: EpisodeSequence
    source: ClipSource
    action_spec: ActionSpec
    drawable: int
    posed: int

    @property
    def num_training(self) -> int:
        """Episodes that are trained on."""
        return len(self.episodes) - len(self.held_out)


def split_data(config: AdaptConfig, image_size: tuple[int, int], chunk_length: int, history_frames: int) -> Split:
    """Divide a data set; no image is decoded.

    Args:
        config: the run.
        image_size: (H, W) of the base, to which images are stretched.
        chunk_length: commands of a chunk of the base.
        history_frames: frames of its history.

    Raises:
        ValueError: the set cannot be opened, has too few episodes, held-out ones are variants of what is trained on, or
            none is as long as a chunk.
    """
    episodes = open_dataset(config.data, card=config.card, camera=config.camera)
    count = len(episodes)
    held_out = max(1, count // 10) if config.held_out is None else config.held_out
    if held_out >= count:
        raise ValueError(
            f"{config.data}: {count} episode(s), of which {held_out} would be held out; expected at least one to train "
            "on: record more, or hold out fewer"
        )
    lengths, spec = [], episodes[0].action_spec
    recordings: tuple[set[str], set[str]] = (set(), set())  # trained on, held out
    drawable = posed = 0
    for i in range(count):
        episode = episodes[i]
        drawable += episode.camera is not None and episode.eef_pose is not None
        recordings[i >= count - held_out].add(episode.metadata.get(VARIANT_OF, episode.name))
        if i < count - held_out:
            lengths.append(len(episode))
        else:
            posed += episode.eef_pose is not None
    shared = sorted(recordings[0] & recordings[1])
    if shared:
        raise ValueError(
            f"{config.data}: the last {held_out} episodes, which are to be held out, and those that are trained on are "
            f"variants of the same recordings ({', '.join(shared[:3])}); expected no recording in both: let "
            "--held-out cover all variants of the last ones, or convert without --variants"
        )
    length = config.clip_length
    if length is None:
        # Nine of ten episodes are as long; less than a chunk cannot be trained, more than chunk and history is no use.
        length = int(np.clip(np.percentile(lengths, 10), chunk_length, chunk_length + history_frames))
    if length < chunk_length or max(lengths) < length:
        raise ValueError(
            f"{config.data}: clips of {length} commands from episodes of {min(lengths)} to {max(lengths)}; expected at "
            f"least {chunk_length}, a chunk of the base, and episodes as long: record longer ones, or give clip_length"
        )
    source = ClipSource(config.card, config.camera, length, image_size, (0, count - held_out))
    return Split(episodes, EpisodeRange(episodes, count - held_out, count), source, spec, drawable, posed)


def draws_actions(config: AdaptConfig, split: Split, base_draws: bool) -> bool:
    """Whether the new world draws action frames.

    Raises:
        ValueError: cameras or poses are known of some episodes only.
    """
    if not base_draws or config.draw_actions == "never" or not split.drawable:
        return False
    if split.drawable < len(split.episodes):
        raise ValueError(
            f"{config.data}: camera and poses are known of {split.drawable} of {len(split.episodes)} episodes; "
            "expected all or none: calibrate the others (`prophet calibrate`), or give --draw-actions never"
        )
    return True


def evaluation_windows(config: AdaptConfig, split: Split, image_size: tuple[int, int]) -> list[Episode]:
    """At least two clips of equal length from the held-out episodes, evenly spread over them; decoded at first use.

    They do not overlap: one clip's actions are the other's shuffled ones.
    """
    shortest = min(len(split.held_out[i]) for i in range(len(split.held_out)))
    length = min(config.evaluation_frames, shortest)
    windows = EpisodeWindows(split.held_out, length, stride=length, image_size=image_size, cover=False)
    if len(windows) < 2:  # one episode gives its two halves
        half = max(1, length // 2)
        windows = EpisodeWindows(split.held_out, half, stride=half, image_size=image_size, cover=False)
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), config.evaluation_windows)).round().astype(int)
    return [windows[i].with_poses() for i in chosen]


def first_frames(split: Split, image_size: tuple[int, int]) -> SnapshotSet:
    """Starts of the held-out episodes: of those with measured poses, of all where none has them."""
    snapshots: list[Snapshot] = []
    for i in range(len(split.held_out)):
        episode = split.held_out[i]
        if episode.eef_pose is None and split.posed:
            continue
        start = episode.with_poses().snapshot()
        snapshots.append(
            replace(
                start,
                image=fit_frames(start.image[None], image_size, "stretch")[0],
                camera=None if start.camera is None else fit_camera(start.camera, image_size, "stretch"),
            )
        )
        if len(snapshots) == MAX_SNAPSHOTS:
            break
    return SnapshotSet(snapshots)
