"""Training batches: chunks of recorded episodes with the history that a rollout would have where they start.

What is drawn more often, and what weighs more by default, follows from what the model is given, start frame and
commands, not from how the chunk went on. Chunks in which a block moved would be the outcome: a grasp that may succeed
or slip would then be imagined as a success. Positions where a block ended are the outcome too (``presence``): where
they weigh more, a model of one denoising step shows the block in both places, where it would else let it fade in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..actions import pad_chunk
from ..world_model.codec import VideoCodec, to_video
from .clips import ClipArrays, LatentArrays
from .config import ObjectiveConfig

_NEAR = 0.1  # of the image's width: an end-effector that is drawn so near to an object may touch it
_TENT = 1.5  # half width of a tent of coverage in latent positions


@dataclass(frozen=True, eq=False)
class ChunkBatch:
    """One mini-batch: B clips of L commands, T = 1 + ceil(L / 4) latent frames.

    Attributes:
        latents: clean latents (B, z, T, h, w); frame 0 is the start frame.
        history: (B, z, T_hist, h, w), oldest first.
        actions: commands padded to the chunk length, (B, C, N, 7).
        action_frames: drawn actions (B, 3, 1 + 4 (T - 1), h, w) in [-1, 1], for "pooled" their latents, or None.
        coverage: nearness of each latent position to where a labelled object starts, or to where an end-effector is
            commanded to be, (B, T - 1, h, w) in 0 to 1.
        presence: nearness of each latent position to where a labelled object truly is, (B, T - 1, h, w) in 0 to 1.
    """

    latents: Tensor
    history: Tensor
    actions: Tensor
    action_frames: Tensor | None
    coverage: Tensor
    presence: Tensor


class ChunkSampler:
    """Draws batches from recorded clips; batch i is a function of (seed, i)."""

    def __init__(
        self, clips: ClipArrays, latents: LatentArrays, config: ObjectiveConfig, *, chunk_length: int, history: int,
        vae: Any,
    ) -> None:  # fmt: skip
        self.clips, self.latents, self.config, self.vae = clips, latents, config, vae
        self.codec = VideoCodec(vae)
        self.chunk_length, self.groups = chunk_length, history // 4
        self.commands = clips.actions.shape[1]
        if self.commands < chunk_length:
            raise ValueError(f"episodes of {self.commands} commands; chunks of {chunk_length} need at least as many")
        # Full chunks, as (episode, start), in which an end-effector comes near to where a labelled object starts.
        self.eventful = np.concatenate(
            [
                np.stack([found, np.full_like(found, start)], axis=1)
                for start in range(0, self.commands - chunk_length + 1, 2)
                for found in [self._contact(start).nonzero()[0]]
            ]
        )

    def _contact(self, start: int) -> np.ndarray:
        """(E,) bool, whether an end-effector is to come near an object with the full chunk from frame ``start``."""
        hands = self.clips.effector_px[:, start + 1 : start + 1 + self.chunk_length, :, None]
        distance = np.linalg.norm(hands - self.clips.object_px[:, start, None, None], axis=-1)
        return (np.nan_to_num(distance, nan=np.inf) < _NEAR * self.clips.frames.shape[3]).any(axis=(1, 2, 3))

    def __call__(self, step: int, batch_size: int, length: int | None = None) -> ChunkBatch:
        """Batch of a step; ``length`` fixes the number of commands."""
        config = self.config
        rng = np.random.default_rng([config.loop.seed, 1, step])
        if length is None:
            length = self.draw_length(rng)
        episodes, starts, waiting, age = self.place(rng, batch_size, length)
        return self.gather(episodes, starts, length, waiting, age)

    def place(
        self, rng: np.random.Generator, count: int, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Episodes, starts, waiting frames and ages, (count,) each, of clips of ``length`` commands: see ``gather``."""
        episodes, starts = self.draw(rng, count, length)
        waiting = np.minimum(2 * (rng.random(count) < 0.2), starts)
        return episodes, starts, waiting, self.draw_age(rng, (starts - waiting) // 4)

    def draw_length(self, rng: np.random.Generator) -> int:
        """Number of commands of a batch."""
        full = rng.random() < self.config.full_length
        return self.chunk_length if full else int(rng.integers(1, self.chunk_length + 1))

    def draw(self, rng: np.random.Generator, count: int, length: int, lead: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Episodes and even start frames (count,) of clips of ``length`` commands after at least ``lead`` (even)."""
        episodes = rng.integers(len(self.clips), size=count)
        starts = 2 * rng.integers(lead // 2, (self.commands - length) // 2 + 1, size=count)
        chosen = rng.random(count) < self.config.eventful
        slack = (self.chunk_length - length) // 2 * 2
        eventful = self.eventful[self.eventful[:, 1] + slack >= lead]
        if len(eventful):
            picks = eventful[rng.integers(len(eventful), size=count)]
            offset = 2 * rng.integers(np.maximum(lead - picks[:, 1], 0) // 2, slack // 2 + 1)
            episodes = np.where(chosen, picks[:, 0], episodes)
            starts = np.where(chosen, picks[:, 1] + offset, starts)
        return episodes, starts

    def draw_age(self, rng: np.random.Generator, oldest: np.ndarray) -> np.ndarray:
        """Age (B,) of the rollout that leads to a clip, in groups of four frames, at most ``oldest``."""
        return np.where(rng.random(len(oldest)) < self.config.old_rollout, oldest, rng.integers(0, oldest + 1))

    def gather(
        self, episodes: np.ndarray, starts: np.ndarray, length: int, waiting: np.ndarray, age: np.ndarray
    ) -> ChunkBatch:
        """Clips with the history that a rollout would have at their start.

        Args:
            episodes: (B,) indices.
            starts: (B,) even start frames.
            length: commands of each clip.
            waiting: (B,) 0 or 2, frames before the start that wait for their group of four to fill.
            age: (B,) complete groups since the snapshot of the imagined rollout, which is frame
                ``start - waiting - 4 age``; the history before it repeats that frame (Alg. 1, line 1).
        """
        groups = -(-length // 4)
        index = np.minimum(starts[:, None] + np.arange(1 + 4 * groups), (starts + length)[:, None])
        if self.codec.folded:
            latents = self._stored(episodes, starts, length)
        else:  # a causal codec's latents depend on all frames since the start frame
            latents = self._encode(self.clips.frames[episodes[:, None], index])
        newest = (starts - waiting) // 2  # group[i] ends at frame 2 i
        back = np.arange(self.groups)[::-1]
        history = np.where(
            (back < age[:, None])[..., None, None, None],
            self.latents.group[episodes[:, None], np.maximum(newest[:, None] - 2 * back, 0)],
            self.latents.single[episodes, newest - 2 * age][:, None],
        )
        commands = self.clips.actions[episodes[:, None], starts[:, None] + np.arange(length)]
        frames = None
        if self.config.action_frames != "none":
            drawn = self.clips.drawn[episodes[:, None], index]
            pooled = self.config.action_frames == "pooled"
            frames = self._encode(drawn) if pooled else to_video(torch.from_numpy(drawn))
        return ChunkBatch(
            latents,
            torch.from_numpy(history).float().transpose(1, 2),
            torch.from_numpy(pad_chunk(commands, self.chunk_length)),
            frames,
            *self._near(episodes, starts, length),
        )

    def _near(self, episodes: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Coverage by the objects' first centroids and the end-effectors' path, and by the objects' true path."""
        index = np.minimum(starts[:, None] + np.arange(1, 1 + 4 * -(-length // 4)), (starts + length)[:, None])
        hands = self.clips.effector_px[episodes[:, None], index]
        objects = self.clips.object_px[episodes, starts][:, None].repeat(index.shape[1], axis=1)
        commanded = self._tents(np.concatenate([hands, objects], axis=2))
        return commanded, self._tents(self.clips.object_px[episodes[:, None], index])

    def _tents(self, pixels: np.ndarray) -> Tensor:
        """Tents around (u, v) of (B, 4 n, K, 2) pixels, summed, mean over groups of four frames: (B, n, h, w)."""
        centroids, cell = torch.from_numpy(pixels).float(), VideoCodec.spatial_stride
        near = []
        for axis, size in ((1, self.latents.single.shape[-2]), (0, self.latents.single.shape[-1])):
            centres = (torch.arange(size) + 0.5) * cell - 0.5
            near.append((1.0 - (centroids[..., axis, None] - centres).abs() / (_TENT * cell)).clamp(min=0.0))
        covered = torch.nan_to_num(near[0][..., :, None] * near[1][..., None, :]).sum(dim=2).clamp(max=1.0)
        return covered.unflatten(1, (-1, 4)).mean(dim=2)

    @torch.no_grad()
    def _encode(self, frames: np.ndarray) -> Tensor:
        """Latents (B, z, 1 + n, h, w) float32 on the CPU of frames (B, 1 + 4n, H, W, 3) uint8."""
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.codec.encode(torch.from_numpy(frames)).float().cpu()

    def _stored(self, episodes: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
        """Latents (B, z, T, h, w) of clips; an incomplete last group repeats its last frame: the scene holds still."""
        whole, groups = length // 4, -(-length // 4)
        # group[i] codes frames 2 i - 3 ... 2 i, so the j-th group of the clip has 2 i = start + 4 (j + 1).
        columns = starts[:, None] // 2 + 2 * np.arange(1, groups + 1)
        parts = [self.latents.single[episodes, starts // 2][:, None]]
        if whole:
            parts.append(self.latents.group[episodes[:, None], columns[:, :whole]])
        if whole < groups:
            index = np.minimum(starts[:, None] + 4 * whole + np.array([1, 1, 2, 3, 4]), (starts + length)[:, None])
            last = self._encode(self.clips.frames[episodes[:, None], index])[:, :, 1:]
            parts.append(last.transpose(1, 2).half().numpy())
        return torch.from_numpy(np.concatenate(parts, axis=1)).float().transpose(1, 2)
