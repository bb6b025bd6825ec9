"""Open-loop evaluation of a world model on held-out episodes: what `prophet eval` runs.

Each episode's start frame and its recorded commands go into the model, chunk by chunk, and nothing else: frame t + 1 is
imagined from imagined frame t. The result is compared with the recorded frames, and never stands alone. Beside it:

- `last_frame`: the start frame repeated. A static background alone scores this much.
- `shuffled_actions`: the same model, start frames and noise, but another episode's commands. What a model that ignores
  its actions would score.

All figures come with 95 % bootstrap intervals over episodes; ratios are paired.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .optical_flow import default_threshold, farneback_flow
from .pictures import Comparison
from .report import group_rows, write_report
from .scores import BlockTruth, EpisodeScores, block_errors, per_frame_means, score_episode, summarise
from .tracking import reference_color

if TYPE_CHECKING:
    from ..data.episode import Episode
    from ..snapshot import Snapshot
    from ..world_model.state import WorldModel

HORIZONS = (8, 20, 40)
"""Frames after which the aggregates are reported (the last one is always `steps`)."""

PREDICTORS = ("model", "last_frame", "shuffled_actions")

MIN_VISIBLE = 8
"""Pixels of the block in view, of about 50, from which it counts as visible."""

HALF_BLOCK = 4.0
"""Pixels of a 64-pixel image by which the centre of a block in view may lie outside; beyond, it is cut off."""

NUM_PICTURES = 6


def evaluate_world_model(
    world_model: WorldModel,
    episodes: Sequence[Episode],
    steps: int = 40,
    num_inference_steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score open-loop rollouts of a world model beside two baselines.

    Args:
        world_model: the model; episode i starts with reset seed `seed + i`.
        episodes: held-out episodes, at least two, each with at least `steps` commands.
        steps: imagined frames per episode.
        num_inference_steps: denoising steps; None takes the model's own number.
        batch_size: episodes predicted at once.
        seed: of the sampling noise, the shuffling and the bootstrap.
        out: folder for `metrics.json`, `report.md`, `strips.png` and `rollouts.mp4`; None writes nothing.
        progress: show a bar with the remaining time.

    Returns:
        What `metrics.json` holds: `checkpoint`, `protocol`, `groups` (all, success, failure, each behaviour; by
        horizon, by predictor; each figure as value, low, high, n), `per_frame` curves, `episodes`, `seconds`.

    Raises:
        ValueError: if there are fewer than two episodes, one is shorter than `steps`, one has other delta semantics
            than the model, or a number is not positive.
    """
    began = time.perf_counter()
    episodes = list(episodes)
    _check(world_model, episodes, steps, batch_size)
    partner = derangement(len(episodes), seed)
    actions = np.stack([episode.canonical_actions[:steps] for episode in episodes])
    scores: dict[str, list[EpisodeScores]] = {name: [] for name in PREDICTORS}
    tracker_errors: list[np.ndarray] = []
    comparisons: list[Comparison] = []
    drawn, model_seconds = _pick(episodes), 0.0
    bar = tqdm(total=len(episodes), desc="evaluate", unit="episode", disable=None if progress else True)
    for batch in np.array_split(np.arange(len(episodes)), range(batch_size, len(episodes), batch_size)):
        recorded = [replace(episodes[i]) for i in batch]  # copies, so that decoded frames are freed with the batch
        snapshots, seeds = [episode.snapshot(0) for episode in recorded], [seed + int(i) for i in batch]
        clock = time.perf_counter()
        imagined = open_loop(world_model, snapshots, seeds, actions[batch], num_inference_steps)
        shuffled = open_loop(world_model, snapshots, seeds, actions[partner[batch]], num_inference_steps)
        model_seconds += time.perf_counter() - clock
        for slot, episode in enumerate(recorded):
            real = episode.frames[: steps + 1]
            frozen = np.repeat(real[:1], steps + 1, axis=0)
            truth, threshold = block_truth(episode, steps), default_threshold(real.shape[1])
            real_flow = farneback_flow(real)
            for name, video in zip(PREDICTORS, (imagined[slot], frozen, shuffled[slot]), strict=True):
                flow = farneback_flow(video)
                scores[name].append(score_episode(real, video, real_flow, flow, threshold=threshold, block=truth))
            tracker_errors.append(block_errors(real, truth))
            if batch[slot] in drawn:
                comparisons.append(Comparison(_title(episode, scores["model"][-1]), real, imagined[slot]))
            bar.update()
    bar.close()

    horizons = sorted({h for h in HORIZONS if h < steps} | {steps})
    tables = {h: {name: summarise(scores[name], h) for name in PREDICTORS} for h in horizons}
    tracker = {h: np.array([errors[h - 1] for errors in tracker_errors]) for h in horizons}
    result = {
        "checkpoint": dict(world_model.checkpoint_info),
        "protocol": {
            "num_episodes": len(episodes),
            "steps": steps,
            "num_inference_steps": num_inference_steps or world_model.num_inference_steps,
            "seed": seed,
            "image_size": [int(side) for side in world_model.image_size],
            "flow_threshold_px": default_threshold(world_model.image_size[0]),
        },
        "groups": {name: group_rows(tables, tracker, mask, seed) for name, mask in group_masks(episodes).items()},
        "per_frame": {
            name: {key: curve.tolist() for key, curve in per_frame_means(scores[name]).items()} for name in PREDICTORS
        },
        "episodes": [
            {"name": e.name, "success": e.success, "instruction": e.instruction, "partner": episodes[partner[i]].name}
            | {key: float(values[i]) for key, values in tables[steps]["model"].items()}
            for i, e in enumerate(episodes)
        ],
        "seconds": {"model": model_seconds, "total": time.perf_counter() - began},
    }
    if out is not None:
        write_report(result, comparisons, Path(out), fps=episodes[0].fps)
    return result


def open_loop(
    world_model: WorldModel,
    snapshots: Sequence[Snapshot],
    seeds: Sequence[int],
    actions: np.ndarray,
    num_inference_steps: int | None = None,
) -> np.ndarray:
    """Imagine whole videos from start frames and commands, in the longest chunks the model takes.

    Args:
        world_model: the model.
        snapshots: B starts.
        seeds: B reset seeds.
        actions: (B, T, N, 7) canonical commands.
        num_inference_steps: denoising steps; None takes the model's own number.

    Returns:
        (B, T + 1, H, W, 3) uint8, the given start frame first.
    """
    state = world_model.begin(snapshots, seeds)
    chunks = [np.stack([snapshot.image for snapshot in snapshots])[:, None]]
    for t in range(0, actions.shape[1], world_model.chunk_length):
        frames, state = world_model.predict(state, actions[:, t : t + world_model.chunk_length], num_inference_steps)
        chunks.append(np.asarray(frames))
    return np.concatenate(chunks, axis=1)


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of 0..n-1 without a fixed point (one random cycle): whose commands episode i is given.

    Args:
        n: number of episodes, at least 2.
        seed: of the draw.

    Returns:
        (n,) int64.
    """
    order = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def block_truth(episode: Episode, steps: int) -> BlockTruth | None:
    """The block's true path from the simulator's labels `block_px` and `block_visible` (pixels in view).

    Args:
        episode: recorded episode; the block's colour is read from the real frame that shows most of it.
        steps: last moment to return.

    Returns:
        The first `steps` + 1 moments, or None for an episode without these labels or whose block is never in view. A
        block beside a cropped frame is not visible, though `block_visible` counts its pixels before the crop.
    """
    if not {"block_px", "block_visible"} <= set(episode.labels):
        return None
    px = np.asarray(episode.labels["block_px"][: steps + 1], np.float64)
    shown = np.asarray(episode.labels["block_visible"][: steps + 1])
    height, width = episode.frames.shape[1:3]
    pixel, margin = px.round(), HALF_BLOCK * height / 64
    beyond = np.maximum(-pixel, pixel - (width - 1, height - 1)).max(axis=1)  # of the frame's border, in pixels
    visible = (shown >= MIN_VISIBLE) & (beyond <= margin)
    inside = visible & (beyond <= 0)
    if not inside.any():
        return None
    best = int(np.where(inside, shown, -1).argmax())
    return BlockTruth(px=px, visible=visible, color=reference_color(episode.frames[best], px[best]))


def group_masks(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Subsets reported separately, as (n,) bool: all, success, failure and each recorded behaviour, if not empty."""
    success = np.array([-1 if e.success is None else int(e.success) for e in episodes])
    behaviour = np.array([str(e.metadata.get("behaviour", "")) for e in episodes])
    masks = {"all": np.ones(len(episodes), bool), "success": success == 1, "failure": success == 0}
    masks |= {name: behaviour == name for name in np.unique(behaviour) if name}
    return {str(name): mask for name, mask in masks.items() if mask.any()}


def _pick(episodes: Sequence[Episode]) -> list[int]:
    """Episodes to draw: the first successes and the first failures, alternating."""
    good = [i for i, e in enumerate(episodes) if e.success]
    bad = [i for i, e in enumerate(episodes) if not e.success]
    half = NUM_PICTURES // 2
    num_good = max(half, NUM_PICTURES - len(bad))
    return sorted(good[:num_good] + bad[: NUM_PICTURES - len(good[:num_good])])


def _title(episode: Episode, scores: EpisodeScores) -> str:
    outcome = {True: "success", False: "failure", None: "not judged"}[episode.success]
    return f"{episode.instruction or episode.name} ({outcome}), {scores.psnr.mean():.1f} dB"


def _check(world_model: WorldModel, episodes: Sequence[Episode], steps: int, batch_size: int) -> None:
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}, expected both to be at least 1.")
    if len(episodes) < 2:
        raise ValueError(
            f"got {len(episodes)} episode(s), expected at least 2: the shuffled-actions baseline takes the commands of "
            "another episode. Record more with `prophet record`."
        )
    for episode in episodes:
        if len(episode.actions) < steps:
            raise ValueError(
                f"episode {episode.name!r} has {len(episode.actions)} commands, expected at least steps={steps}. "
                "Lower steps or leave the episode out."
            )
        if episode.action_spec.delta != world_model.action_spec.delta:
            raise ValueError(
                f"episode {episode.name!r} has {episode.action_spec.delta!r} deltas, the model was trained on "
                f"{world_model.action_spec.delta!r} ones. Evaluate on episodes of the same action convention."
            )
