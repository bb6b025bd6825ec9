"""Recorded episodes as arrays that imitation can index: what a policy would have seen, and the commands that followed.

Data flow: episode folders -> ``read_demonstrations`` -> :class:`Demonstrations` -> batches for
``SmallFlowPolicy.imitation_loss``. The state is the one that environments report: integrated from the commands, from
the episode's first pose on (paper 4.1.2), also where a robot measured its poses. Every frame is a sample, not only
those at which a policy of CH commands per call would be asked: it sees all phases of a task, and what comes after
success, because a world model that is judged at the horizon goes on until then.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prophet_gym.actions import ActionSpec, integrate_poses
from prophet_gym.data.episode import Episode
from prophet_gym.errors import nearest
from prophet_gym.observations import make_observation
from prophet_gym.words import build_vocabulary
from prophrl_agents.policies.base import Observation
from prophrl_agents.policies.normalization import PolicyStatistics

__all__ = ["Demonstrations", "read_demonstrations"]


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """E episodes, one after the other; F frames in all, each followed by a command. In memory: 12 kB a frame at 64x64.

    Attributes:
        images: (F, H, W, 3) uint8; the image after an episode's last command is left out.
        states: (F, 8N) float32, as the environments report it.
        actions: (F, 7N) float32 native commands.
        lengths: (E,) int64 commands of each episode.
        instructions: E strings.
        behaviours: E names of what acted, "" where the recording does not say.
        names: E episode names.
        vocabulary: words of all instructions that were read, also of episodes that the filter left out: a policy of a
            few episodes can then be asked everything, though it has learned nothing about the other words.
        action_spec: conventions and bounds of the commands.
    """

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    instructions: tuple[str, ...]
    behaviours: tuple[str, ...]
    names: tuple[str, ...]
    vocabulary: tuple[str, ...]
    action_spec: ActionSpec

    def __len__(self) -> int:
        """Number of frames F."""
        return len(self.images)

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.lengths)

    @property
    def episodes(self) -> np.ndarray:
        """(F,) index of each frame's episode."""
        return np.repeat(np.arange(self.num_episodes), self.lengths)

    @property
    def steps(self) -> np.ndarray:
        """(F,) commands of its episode before each frame."""
        return np.concatenate([np.arange(length) for length in self.lengths])

    def split(self, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Parts the frames by episode.

        Args:
            held_out: episodes of the second part, drawn with ``seed``.
            seed: of the draw.

        Returns:
            Frame indices of training and of held-out episodes, both in order.

        Raises:
            ValueError: no episode would be left to train on.
        """
        if not 0 <= held_out < self.num_episodes:
            raise ValueError(
                f"held_out={held_out} of {self.num_episodes} episodes; expected 0 to {self.num_episodes - 1}: leave "
                "some to train on, or read more"
            )
        chosen = np.random.default_rng(seed).permutation(self.num_episodes)[:held_out]
        out = np.isin(self.episodes, chosen)
        return np.flatnonzero(~out), np.flatnonzero(out)

    def batch(self, frames: np.ndarray, chunk_length: int) -> tuple[Observation, Tensor, Tensor]:
        """Returns what was seen at some frames, and the chunks that followed.

        Args:
            frames: (B,) frame indices.
            chunk_length: CH.

        Returns:
            observations, native commands (B, CH, 7N) float32 with zeros after the episode's end, and the mask (B, CH)
            bool that is False there.
        """
        ends = np.cumsum(self.lengths)
        episodes = np.searchsorted(ends, frames, side="right")
        steps = np.asarray(frames)[:, None] + np.arange(chunk_length)
        mask = steps < ends[episodes, None]
        chunks = np.where(mask[..., None], self.actions[np.where(mask, steps, 0)], np.float32(0))
        observation = {
            "image": torch.from_numpy(self.images[frames]),
            "state": torch.from_numpy(self.states[frames]),
            "instruction": [self.instructions[episode] for episode in episodes],
        }
        return observation, torch.from_numpy(chunks), torch.from_numpy(mask)

    def statistics(self, frames: np.ndarray) -> PolicyStatistics:
        """Returns mean and deviation of the commands and states at some frames, and the commands' bounds."""
        space = self.action_spec.action_space(1)
        return PolicyStatistics.from_data(self.actions[frames], self.states[frames], space.low[0], space.high[0])


def read_demonstrations(
    episodes: Iterable[Episode],
    *,
    only_success: bool = True,
    behaviours: Sequence[str] = (),
    max_episodes: int = 0,
    progress: bool = False,
) -> Demonstrations:
    """Reads the episodes that a policy shall imitate.

    Args:
        episodes: for example an ``EpisodeFolder``, or several chained.
        only_success: leave out failures and episodes whose success is unknown.
        behaviours: keep those whose ``metadata["behaviour"]`` is one of these; empty keeps all.
        max_episodes: the first so many that pass; 0 for all.
        progress: show a bar while the images are decoded (about 5 ms of CPU time for 41 images of 64x64).

    Raises:
        ValueError: no episodes, none left by the filter, a behaviour that no episode has, and among those kept: no
            poses, no instruction, commands out of bounds, different action conventions or image sizes.
    """
    if isinstance(behaviours, str):
        raise ValueError(f"behaviours={behaviours!r}; expected a sequence of names: ({behaviours!r},)")
    kept, recorded, instructions, successes = [], Counter[str](), set[str](), 0
    for episode in episodes:
        instructions.add(episode.instruction)
        behaviour = _behaviour(episode)
        recorded[behaviour] += 1
        successes += episode.success is True
        if (episode.success or not only_success) and (not behaviours or behaviour in behaviours):
            kept.append(episode)
    total = sum(recorded.values())
    if not total:
        raise ValueError("no episodes; expected at least one: record some with `prophet record`")
    for name in behaviours:
        if name not in recorded:
            raise ValueError(f"no episode has behaviour {name!r}; they have {dict(recorded)}.{nearest(name, recorded)}")
    if not kept:
        raise ValueError(
            f"none of {total} episodes is left: {successes} are marked successful, behaviours are {dict(recorded)}, "
            f"asked for only_success={only_success}, behaviours={tuple(behaviours)}; relax one of them"
        )
    kept = kept[: max_episodes or None]
    for episode in kept:
        _check(episode, kept[0])
    lengths = np.array([len(episode) for episode in kept])
    arrays: dict[str, np.ndarray] = {}
    ends = np.cumsum(lengths)
    bar = tqdm(kept, desc="reading demonstrations", disable=None if progress else True)
    for episode, end in zip(bar, ends, strict=True):
        for key, values in _observe(episode).items():
            if key not in arrays:
                arrays[key] = np.empty((ends[-1], *values.shape[1:]), values.dtype)
            if values.shape[1:] != arrays[key].shape[1:]:
                raise ValueError(
                    f"episode {episode.name!r} has {key} of shape {values.shape[1:]}, episode {kept[0].name!r} "
                    f"{arrays[key].shape[1:]}; expected equal: resize the images, or train on one data set at a time"
                )
            arrays[key][end - len(episode) : end] = values
    return Demonstrations(
        images=arrays["image"],
        states=arrays["state"],
        actions=np.concatenate([episode.actions for episode in kept]),
        lengths=lengths,
        instructions=tuple(episode.instruction for episode in kept),
        behaviours=tuple(_behaviour(episode) for episode in kept),
        names=tuple(episode.name for episode in kept),
        vocabulary=build_vocabulary(sorted(instructions)),
        action_spec=kept[0].action_spec,
    )


def _behaviour(episode: Episode) -> str:
    return str(episode.metadata.get("behaviour", ""))


def _check(episode: Episode, first: Episode) -> None:
    where = f"episode {episode.name!r}"
    if episode.eef_pose is None:
        raise ValueError(f"{where} has no eef_pose and gripper, so no state; expected the pose of its first image")
    if not episode.instruction.strip():
        raise ValueError(f"{where} has no instruction; expected what it shows, in words")
    specs = episode.action_spec.to_dict(), first.action_spec.to_dict()
    if specs[0] != specs[1]:
        differing = {key: (specs[0][key], specs[1][key]) for key in specs[0] if specs[0][key] != specs[1][key]}
        raise ValueError(
            f"{where} and episode {first.name!r} have different action specs: {differing}; expected one convention: "
            "train on one robot at a time, or convert the commands"
        )
    try:
        episode.action_spec.check(episode.actions, len(episode))
    except ValueError as error:
        raise ValueError(f"{where}: the environment would refuse its commands: {error}") from error


def _observe(episode: Episode) -> dict[str, np.ndarray]:
    """Image and state before each of the T commands."""
    assert episode.eef_pose is not None and episode.gripper is not None  # _check
    commands = episode.canonical_actions
    poses = integrate_poses(episode.eef_pose[0], commands, episode.action_spec)
    poses = np.concatenate([episode.eef_pose[:1], poses[:-1]])
    gripper = np.concatenate([episode.gripper[:1], commands[:-1, :, 6]])
    frames = dataclasses.replace(episode).frames[:-1]  # of a copy: an episode keeps the frames that it decoded
    return make_observation(frames, poses, gripper)
