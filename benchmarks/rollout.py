"""Speed of imagined rollouts: ``python benchmarks/rollout.py`` (``make bench``).

Measures, in one run on one machine: milliseconds per full chunk and frames per second at several batch sizes, where the
time goes, cost and memory against the horizon, and the ratio to the naive pipeline that this library replaces: the
history re-encoded from pixels for every chunk, conditions and memory recomputed at every denoising step, 35 steps.
Writes a table to the terminal and everything to a JSON file.
"""

from __future__ import annotations

import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from prophet_gym.actions import integrate_poses
from prophet_gym.registration import WORLDS, resolve_checkpoint
from prophet_gym.snapshot import SnapshotSet
from prophet_gym.strict_json import to_json
from prophet_gym.world_model.codec import VideoCodec
from prophet_gym.world_model.prophet import ProphetWorldModel
from prophet_gym.world_model.sampler import integrate, karras_schedule, slot_noise
from prophet_gym.world_model.state import RolloutState


@dataclass(frozen=True)
class Config:
    """What is measured."""

    checkpoint: str = "tabletop"
    """Packaged name or folder."""
    out: Path = Path("runs/bench/rollout.json")
    """Result file."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Number formats of the networks."""
    repeats: int = 5
    """Timed chunks per figure, after one to warm up; the median is reported."""
    horizon: int = 20
    """Chunks of the longest rollout."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Of snapshots' noise and commands."""


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``call`` after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def random_commands(world: ProphetWorldModel, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Moderate canonical commands (B, C, N, 7)."""
    commands = rng.uniform(-0.02, 0.02, (batch, world.chunk_length, world.num_effectors, 7)).astype(np.float32)
    commands[..., 6] = rng.uniform(0, 1, commands.shape[:-1])
    return commands


class Stages:
    """Wall time by stage, collected by wrapping the world model's own methods while the block is active."""

    def __init__(self, world: ProphetWorldModel) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.targets = {
            "draw actions": (world, "draw_actions"),
            "encode": (world.codec, "encode"),
            "condition": (world.transformer, "condition"),
            "denoise": (world.transformer, "forward"),
            "decode": (world.codec, "decode"),
        }

    def __enter__(self) -> Stages:
        for name, (owner, method) in self.targets.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, method in self.targets.values():
            delattr(owner, method)

    def _timed(self, name: str, function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            return result

        return wrapped


@torch.no_grad()
def naive_chunk(
    world: ProphetWorldModel, state: RolloutState, history: torch.Tensor, commands: np.ndarray, num_steps: int = 35
) -> np.ndarray:
    """One chunk the naive way; ``history`` (B, T_h, H, W, 3) uint8 are the last frames in pixels."""
    latents = world.codec.encode(torch.cat([history[:, :1], history], dim=1))[:, :, 1:]
    start = world.codec.encode(state.frames[:, None])
    poses = integrate_poses(state.poses.numpy(), commands, world.action_spec)
    batch, z, _, h, w = start.shape
    groups = commands.shape[1] // VideoCodec.temporal_stride
    mask = start.new_zeros(batch, 1, 1 + groups, h, w)
    mask[:, :, 0] = 1

    padded, drawn = world.chunk_inputs(start, commands, poses, state)

    def velocity(z_t: torch.Tensor, t: float) -> torch.Tensor:
        condition = world.transformer.condition(padded, drawn, latents)
        times = start.new_full((batch, 1 + groups), t)
        times[:, 0] = 0
        return world.transformer(torch.cat([start, z_t], dim=2), mask, times, condition)[:, :, 1:]

    noise = slot_noise(state.seeds, state.env_step, (z, groups, h, w))
    times = karras_schedule(num_steps)
    chunk = integrate(velocity, times[0] * noise, times, "ab2")
    return world.codec.decode(torch.cat([start, chunk], dim=2)).numpy()


def measure(config: Config) -> dict:
    """All figures as a plain dict."""
    torch.set_num_threads(config.threads)
    folder = resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], config.checkpoint)
    snapshots = list(SnapshotSet.load(folder / "snapshots"))
    rng = np.random.default_rng(config.seed)
    result: dict = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": config.threads,
            "torch": torch.__version__,
        },
        "config": {"checkpoint": config.checkpoint, "repeats": config.repeats, "seed": config.seed},
        "chunks": [],
    }
    for dtype in config.dtypes:
        world = ProphetWorldModel.from_pretrained(folder, dtype=getattr(torch, dtype))
        for batch in config.batches:
            state = world.begin([snapshots[i % len(snapshots)] for i in range(batch)], range(batch))
            commands = random_commands(world, batch, rng)
            seconds = median_seconds(partial(world.predict, state, commands), config.repeats)
            with Stages(world) as stages:
                for _ in range(config.repeats):
                    world.predict(state, commands)
            row = {
                "dtype": dtype,
                "batch": batch,
                "steps": world.num_inference_steps,
                "ms_per_chunk": 1e3 * seconds,
                "frames_per_second": batch * world.chunk_length / seconds,
                "stage_ms": {k: 1e3 * v / config.repeats for k, v in stages.seconds.items()},
            }
            if dtype == "float32" and batch in (1, 8):
                history = state.frames[:, None].expand(-1, world.config.history_frames, -1, -1, -1)
                naive = median_seconds(partial(naive_chunk, world, state, history, commands), 2)
                steps = world.num_inference_steps
                few = median_seconds(partial(naive_chunk, world, state, history, commands, steps), 2)
                row |= {
                    "naive_ms_per_chunk": 1e3 * naive,
                    "ratio_to_naive": naive / seconds,
                    "ratio_to_naive_at_equal_steps": few / seconds,
                }
            result["chunks"].append(row)
        result.setdefault("horizon", {})[dtype] = against_horizon(world, snapshots[0], config, rng)
    return result


def against_horizon(world: ProphetWorldModel, snapshot: object, config: Config, rng: np.random.Generator) -> dict:
    """Milliseconds of each chunk of one long rollout, bytes of its state, memory of the process after it."""
    state = world.begin([snapshot], [0])
    commands = random_commands(world, 1, rng)
    world.predict(state, commands)
    times, sizes, resident = [], [], []
    for _ in range(config.horizon):
        start = time.perf_counter()
        _, state = world.predict(state, commands)
        times.append(1e3 * (time.perf_counter() - start))
        sizes.append(sum(t.nbytes for t in state.state_dict().values()))
        resident.append(resident_mb())
    return {"ms_by_chunk": times, "state_bytes_by_chunk": sizes, "resident_mb_by_chunk": resident}


def resident_mb() -> float:
    """Memory of this process now, in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def table(result: dict) -> str:
    """The figures for the terminal."""
    lines = [f"{'dtype':<10}{'batch':>6}{'steps':>6}{'ms/chunk':>10}{'frames/s':>10}{'vs naive':>16}  stages (ms)"]
    for row in result["chunks"]:
        ratio = f"{row['ratio_to_naive']:.1f}x" if "ratio_to_naive" in row else "-"
        if "ratio_to_naive_at_equal_steps" in row:
            ratio += f" ({row['ratio_to_naive_at_equal_steps']:.1f}x)"
        stages = ", ".join(f"{k} {v:.0f}" for k, v in row["stage_ms"].items())
        lines.append(
            f"{row['dtype']:<10}{row['batch']:>6}{row['steps']:>6}{row['ms_per_chunk']:>10.0f}"
            f"{row['frames_per_second']:>10.0f}{ratio:>16}  {stages}"
        )
    for dtype, horizon in result["horizon"].items():
        times = horizon["ms_by_chunk"]
        half = len(times) // 2
        lines.append(
            f"{dtype}: chunks 1-{half} {np.median(times[:half]):.0f} ms, {half + 1}-{len(times)} "
            f"{np.median(times[half:]):.0f} ms; state {min(horizon['state_bytes_by_chunk']) / 1e6:.2f} to "
            f"{max(horizon['state_bytes_by_chunk']) / 1e6:.2f} MB; process {horizon['resident_mb_by_chunk'][0]:.0f} MB "
            f"after the first chunk, {horizon['resident_mb_by_chunk'][-1]:.0f} MB after the last"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measure, print, write."""
    result = measure(config)
    print(table(result))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(to_json(result))
    print(f"written to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
