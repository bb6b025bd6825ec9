"""Rolls a world model over the recorded actions of episodes: the imagined half of domain bridging (paper 3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from prophet_gym.data.episode import Episode
    from prophet_gym.world_model.state import WorldModel

__all__ = ["imagine"]


def imagine(
    world_model: WorldModel,
    episodes: Sequence[Episode],
    *,
    chunk_length: int | None = None,
    batch_size: int = 32,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[np.ndarray]:
    """Imagines each episode from its first frame, open loop, with its own actions.

    Chunk boundaries depend on the episode alone, noise on ``seed`` and the episode's position in the list: the result
    does not depend on ``batch_size`` (to one grey level).

    Args:
        world_model: anything with ``begin`` and ``predict``.
        episodes: what to imagine; only first frame, instruction, pose, camera and actions are used.
        chunk_length: commands per prediction; the model's maximum by default. Use the policy's, if it is shorter.
        batch_size: episodes rolled together.
        num_inference_steps: denoising steps; the model's own number by default.
        seed: of the world model's noise; episode i has seed ``seed + i``.
        progress: show a progress bar, where there is a terminal.

    Returns:
        For each episode (T+1, H, W, 3) uint8, the snapshot's frame first.

    Raises:
        ValueError: if ``chunk_length`` is not in 1 to the model's maximum.
    """
    length = world_model.chunk_length if chunk_length is None else chunk_length
    if not 1 <= length <= world_model.chunk_length:
        raise ValueError(
            f"chunk_length must be in 1 to {world_model.chunk_length} (the model's maximum), got {length}."
        )
    imagined = []
    for start in tqdm(range(0, len(episodes), batch_size), desc="imagine", disable=None if progress else True):
        batch = episodes[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(batch))
        imagined += _imagine_batch(world_model, batch, list(seeds), length, num_inference_steps)
    return imagined


def _imagine_batch(
    world_model: WorldModel, episodes: Sequence[Episode], seeds: list[int], length: int, num_inference_steps: int | None
) -> list[np.ndarray]:
    snapshots = [episode.snapshot() for episode in episodes]
    actions = [episode.action_spec.to_canonical(episode.actions) for episode in episodes]
    frames = [[np.asarray(snapshot.image)[None]] for snapshot in snapshots]
    state, active, done = world_model.begin(snapshots, seeds), np.arange(len(episodes)), 0
    while len(active):
        sizes = np.array([min(length, len(actions[slot]) - done) for slot in active])
        following = state
        for size in np.unique(sizes[sizes > 0]):
            members = np.flatnonzero(sizes == size)
            chunk = np.stack([actions[slot][done : done + size] for slot in active[members]])
            predicted, after = world_model.predict(state.select(members), chunk, num_inference_steps)
            for slot, part in zip(active[members], predicted, strict=True):
                frames[slot].append(part)
            if size == length:
                following = after
        state, active, done = following, active[sizes == length], done + length
    return [np.concatenate(parts) for parts in frames]
