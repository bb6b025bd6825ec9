"""``prophrl eval``: one or two policies in the world model and in the simulator, from the same snapshots.

The simulator is set to the evaluation seeds, and the snapshots it gives start both worlds: what differs between the
columns of the table is the world, not the task. Writes ``evaluation.json`` and a grid video per policy and world.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import VectorEnv

from prophet_gym.atomic import atomic_text
from prophet_gym.data.video import write_video
from prophet_gym.registration import find_environment
from prophet_gym.simulators import SIMULATORS
from prophet_gym.strict_json import to_json
from prophrl_agents.batch import Start
from prophrl_agents.config import WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import Comparison, Evaluation, agreement, compare, evaluate_policy, evaluate_starts
from prophrl_agents.policies.base import SampleMode
from prophrl_agents.policies.small import SmallFlowPolicy

__all__ = ["EvalConfig", "run_eval", "simulator_starts", "write_grid", "write_json"]

GREEN, RED, GREY = (40, 170, 70), (215, 50, 45), (150, 150, 150)
_TILE, _BORDER, _GAP = 128, 6, 4  # pixels
_GRID = 48  # rollouts of a grid video


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, where, and on how many starts."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of the policy."""
    against: Path | None = None
    """Folder of another policy, on the same starts and noise: the table tells how much POLICY gains over it."""
    env: str | None = "Prophet-Tabletop-v0"
    """World model's environment id; None leaves it out."""
    checkpoint: str | None = None
    """World model: a folder, a packaged name or a hub id; by default the environment's."""
    judge: str | None = None
    """Folder of the judge in the world model; by default the checkpoint's."""
    simulator: str | None = "Tabletop-v0"
    """Simulator that gives the snapshots and the truth; None where there is none: then the seeds choose among the
    environment's own snapshots."""
    n: int = 200
    """Starts."""
    seed: int = 0
    """Which set of starts; sets share none, and training reaches none."""
    noise_seed: int = 0
    """First seed of the policy's noise."""
    num_noise_seeds: int = 1
    """Rollouts per start, each with its own noise."""
    mode: SampleMode = "ode"
    """"ode" as deployed, or "sde" as in learning."""
    num_envs: int = 32
    """Rollouts side by side; the results do not depend on it."""
    device: str = "cpu"
    """Of the policy and the world model, as in torch."""
    task: str | None = None
    """Task of a simulator that has several (LIBERO, SimplerEnv): number or name; None: the seeds choose."""
    horizon: int | None = None
    """Commands after which a rollout ends; by default the environment's."""
    out: Path = Path("runs/eval")
    """Folder of evaluation.json and the videos; files of an earlier evaluation are replaced."""

    def __post_init__(self) -> None:
        """Checks that there is something to do."""
        if self.env is None and self.simulator is None:
            raise ValueError("env and simulator are both None; expected at least one place to evaluate in")
        if self.env is None and (self.checkpoint or self.judge):
            raise ValueError("checkpoint and judge are of the world model, but env is None; leave them out or name env")
        for name, least in (("num_envs", 1), ("num_noise_seeds", 1), ("noise_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


def run_eval(config: EvalConfig) -> str:
    """Evaluates, writes the results to ``config.out`` and returns the table.

    Raises:
        ValueError: a folder without a policy, an unknown environment, a simulator without snapshots, or what the
            environments refuse.
    """
    for env_id in (config.env, config.simulator):
        if env_id is not None:
            find_environment(env_id)
    folders = {"policy": config.policy} | ({} if config.against is None else {"against": config.against})
    policies = {name: SmallFlowPolicy.from_pretrained(path, device=config.device) for name, path in folders.items()}
    starts = evaluate_starts(config.n, config.seed)
    if config.simulator is not None:
        starts = simulator_starts(config.simulator, starts, **_options(config, policies["policy"]))
    chunk_length = max(policy.chunk_length for policy in policies.values())
    config.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Evaluation]] = {name: {} for name in policies}
    horizon = config.horizon
    for place, env_id in (("world", config.env), ("simulator", config.simulator)):
        if env_id is None:
            continue
        world = WorldConfig(
            num_envs=min(config.num_envs, config.n),
            horizon=horizon,
            task=config.task,
            checkpoint=config.checkpoint,
            judge=config.judge,
        )
        size = policies["policy"].config.image_size
        env = make_environment(env_id, world, chunk_length=chunk_length, image_size=size, device=config.device)
        if place == "world":
            horizon = horizon or getattr(env.unwrapped, "horizon", None)  # a simulator's own is its longest task's
            if config.simulator is None:
                starts = _own_starts(env, starts)
        for name, policy in policies.items():
            results[name][place] = _evaluate(policy, env, starts, config, config.out / f"{name}_{place}.mp4")
        env.close()
    comparisons = {
        place: compare(results["against"][place], evaluation)
        for place, evaluation in results["policy"].items()
        if "against" in results
    }
    agreements = {
        name: agreement(places["world"], places["simulator"]) for name, places in results.items() if len(places) == 2
    }
    report = {
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in _fields(config).items()},
        "evaluations": {
            name: {place: evaluation.to_dict() for place, evaluation in places.items()}
            for name, places in results.items()
        },
        "comparisons": {place: comparison.to_dict() for place, comparison in comparisons.items()},
        "agreement": agreements,
    }
    write_json(report, config.out / "evaluation.json")
    return _table(config, results, comparisons, agreements)


def simulator_starts(simulator: str, starts: Sequence[Start], **options: Any) -> list[Start]:
    """Returns the starts with the snapshots that a simulator, made with these options, gives at their seeds.

    Raises:
        ValueError: an unknown simulator, one that does not take these options, or one without ``snapshot(name)``.
    """
    find_environment(simulator)
    try:
        env: Any = gym.make(simulator, **options)
    except TypeError as error:
        raise ValueError(f"{simulator!r} does not take the settings {options} ({error}); leave them out") from error
    if not hasattr(env.unwrapped, "snapshot"):
        raise ValueError(
            f"simulator {simulator!r} has no snapshot(name) to start a world model from; give None instead"
        )
    taken = []
    for start in starts:
        env.reset(seed=start.seed)
        taken.append(Start(start.seed, env.unwrapped.snapshot(f"{simulator} seed {start.seed}")))
    env.close()
    return taken


def _own_starts(world: Any, starts: Sequence[Start]) -> list[Start]:
    """Returns the starts with the snapshots of the world that their seeds choose, so that repeated ones are known."""
    found = getattr(world.unwrapped, "snapshots", None)
    if not found:
        return list(starts)
    chosen = [int(np.random.default_rng(start.seed).integers(len(found))) for start in starts]
    return [Start(start.seed, found[i]) for start, i in zip(starts, chosen, strict=True)]


def write_json(value: Any, path: Path) -> None:
    """Writes strict JSON in one step: a reader sees the old file or the new one."""
    atomic_text(path, to_json(value))


def write_grid(
    frames: Sequence[np.ndarray],
    path: Path,
    *,
    success: np.ndarray,
    valid: np.ndarray | None = None,
    columns: int = 8,
    fps: float = 10.0,
) -> None:
    """Writes rollouts as one MP4, framed in green (success), red (failure) or grey (the judge abstained).

    Args:
        frames: videos (T, H, W, 3) uint8 of equal H and W; those that end early stay at their last frame.
        path: file to write, replaced in one step.
        success: bool, one per video.
        valid: bool, one per video; None if every verdict counts.
        columns: tiles in a row.
        fps: frames per second.

    Raises:
        ValueError: no videos, another number of outcomes than videos, or sizes that differ.
    """
    valid = np.ones(len(frames), bool) if valid is None else valid
    sizes = {video.shape[1:] for video in frames}
    if len(sizes) != 1 or not len(frames) == len(success) == len(valid):
        raise ValueError(
            f"{len(frames)} videos of sizes {sorted(sizes)}, {len(success)} outcomes, {len(valid)} validities; "
            "expected at least one video, one (H, W, 3), and one outcome and validity each"
        )
    length, height = max(len(video) for video in frames), frames[0].shape[1]
    factor = max(1, round(_TILE / height))  # small frames are enlarged by a whole factor, unsmoothed
    columns = min(columns, len(frames))
    cell = tuple(side * factor + 2 * _BORDER + _GAP for side in frames[0].shape[1:3])
    rows = -(-len(frames) // columns)
    shape = rows * cell[0] + _GAP, columns * cell[1] + _GAP
    canvas = np.full((length, *(side + side % 2 for side in shape), 3), 255, np.uint8)
    for i, video in enumerate(frames):
        colour = GREY if not valid[i] else GREEN if success[i] else RED
        top, left = (_GAP + place * side for place, side in zip(divmod(i, columns), cell, strict=True))
        canvas[:, top : top + cell[0] - _GAP, left : left + cell[1] - _GAP] = colour
        moments = np.minimum(np.arange(length), len(video) - 1)
        inner = video[moments].repeat(factor, axis=1).repeat(factor, axis=2)
        top, left = top + _BORDER, left + _BORDER
        canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    write_video(partial, canvas, fps, lossless=False)
    partial.replace(path)


def _evaluate(
    policy: SmallFlowPolicy, env: VectorEnv, starts: Sequence[Start], config: EvalConfig, video: Path
) -> Evaluation:
    """Evaluates one policy in one place, writes the grid video and forgets the frames."""
    evaluation = evaluate_policy(
        policy,
        env,
        starts,
        noise_seed=config.noise_seed,
        num_noise_seeds=config.num_noise_seeds,
        mode=config.mode,
        keep_frames=_GRID,
        progress=True,
    )
    shown = slice(min(len(starts), _GRID))
    fps = float(env.metadata.get("render_fps", 10.0))
    write_grid(
        evaluation.frames[shown], video, success=evaluation.success[shown], valid=evaluation.valid[shown], fps=fps
    )
    return dataclasses.replace(evaluation, frames=())


def _options(config: EvalConfig, policy: SmallFlowPolicy) -> dict[str, Any]:
    """Settings of the simulator; one with tasks shows images of the policy's size."""
    options: dict[str, Any] = {"horizon": config.horizon}
    if config.simulator in SIMULATORS:
        size = policy.config.image_size if SIMULATORS[config.simulator].has_tasks else None
        options |= {"task": config.task, "image_size": size}
    return {name: value for name, value in options.items() if value is not None}


def _fields(config: EvalConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _table(
    config: EvalConfig,
    results: dict[str, dict[str, Evaluation]],
    comparisons: dict[str, Comparison],
    agreements: dict[str, dict[str, Any]],
) -> str:
    ids = {"world": config.env, "simulator": config.simulator}
    lines = [
        f"{config.n} starts (set {config.seed}), {config.num_noise_seeds} noise seed(s), mode {config.mode}",
        "",
        f"{'':9}{'':24}{'success':>9}  {'95 % interval':<17}{'abstained':>10}{'s per rollout':>15}",
    ]
    for name, places in results.items():
        for place, one in places.items():
            low, high = one.interval
            interval = f"[{100 * low:.1f}, {100 * high:.1f}] %"
            seconds = one.seconds["total"] / len(one)
            lines.append(
                f"{name:9}{ids[place]!s:24}{100 * one.success_rate:7.1f} %  {interval:<17}{int((~one.valid).sum()):>10}"
                f"{seconds:>15.3f}"
            )
    if comparisons:
        lines += ["", "policy minus against, paired on the same starts and noise:"]
    for place, change in comparisons.items():
        lines.append(
            f"{'':9}{ids[place]!s:24}{change.difference:+7.1f} points  [{change.low:+.1f}, {change.high:+.1f}]  "
            f"starts gained {change.gained}, lost {change.lost}, p = {change.p_value:.2g}"
        )
    if agreements:
        lines += ["", "outcome in the world model against the simulator's, same starts, the policy acting in each:"]
    for name, report in agreements.items():
        cells = []
        for key in ("agree", "precision", "recall", "fpr"):
            rate = report[key]
            cells.append(f"{key} -" if rate["value"] is None else f"{key} {rate['value']:.2f}")
        lines.append(f"{name:9}" + ", ".join(cells))
    lines += ["", f"written to {config.out}"]
    return "\n".join(lines)
