"""What the vision-language judge costs beside the model: ``python benchmarks/vlm_judge.py``.

A hundred rollouts with five votes each go to a scripted chat-completions server in another process, which takes a fixed
time for every answer, once as it is and once behind a proxy that spoils a tenth of the requests. Measured: votes a
second, seconds beyond what the server's own time at this concurrency explains, and what became of the rollouts. With a
real model the answers take longer; the overhead is what this library adds to them.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from prophet_gym.judges import ServerBackend, VLMConfig, VLMJudge
from prophet_gym.judges.pictures import encode_frames
from prophet_gym.strict_json import to_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback import FAULTS, start, stats  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Size of the measurement."""

    out: Path = Path("runs/bench/vlm_judge.json")
    """Result file."""
    rollouts: int = 100
    """Rollouts of a batch."""
    votes: int = 5
    """Answers for each."""
    concurrency: int = 16
    """Requests under way at once."""
    num_frames: int = 20
    """Pictures of each question, 224x224."""
    delay: float = 0.2
    """Seconds the server takes for an answer."""
    every: int = 10
    """One request in so many meets a fault."""
    timeout: float = 2.0
    """Seconds an attempt may take; a slow answer takes twice as long."""
    seed: int = 0
    """Of the frames."""


def measure(config: Config, faulty: bool) -> dict[str, float | int | bool]:
    """Judges the batch once; returns rates and outcomes."""
    rng = np.random.default_rng(config.seed)
    truth = rng.random(config.rollouts) < 0.5
    noise = rng.integers(0, 60, (config.rollouts, 21, 64, 64, 3), dtype=np.uint8)
    frames = [each + np.uint8(190 * bright) for each, bright in zip(noise, truth, strict=True)]
    with ExitStack() as stack:
        url = upstream = stack.enter_context(start("scripted", models=["tiny"], delay=config.delay))
        if faulty:
            options = {"every": config.every, "faults": FAULTS, "seconds": 2 * config.timeout}
            url = stack.enter_context(start("proxy", upstream=upstream, **options))
        backend = ServerBackend("tiny", url, concurrency=config.concurrency, timeout=config.timeout)
        judge = VLMJudge(backend, VLMConfig(votes=config.votes, num_frames=config.num_frames))
        began = time.perf_counter()
        for each in frames:
            encode_frames(each[: config.num_frames], 224, "jpeg")
        encoding = time.perf_counter() - began
        began = time.perf_counter()
        verdicts = judge.judge_batch(frames, ["put the block on the plate"] * config.rollouts)
        seconds = time.perf_counter() - began
        faults = stats(url)["faults"] if faulty else {}
        busiest = stats(upstream)["most_at_once"]
    calls = config.rollouts * config.votes
    labelled = [verdict.valid for verdict in verdicts]
    return {
        "faulty": faulty,
        "faults": sum(faults.values()) - faults.get("none", 0),
        "seconds": seconds,
        "votes_per_second": calls / seconds,
        "rollouts_per_second": config.rollouts / seconds,
        "overhead_ms_per_vote": 1e3 * (seconds - calls * config.delay / config.concurrency) / calls,
        "encoding_ms_per_rollout": 1e3 * encoding / config.rollouts,
        "most_at_once": busiest,
        "labelled": sum(labelled),
        "abstained": config.rollouts - sum(labelled),
        "wrong": sum(v.valid and v.success != bool(t) for v, t in zip(verdicts, truth, strict=True)),
    }


def table(rows: list[dict]) -> str:
    """The figures for the terminal."""
    lines = [
        f"{'faults':>7}{'seconds':>9}{'votes/s':>9}{'overhead a vote':>17}{'labelled':>10}{'abstained':>11}{'wrong':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row['faults']:>7}{row['seconds']:>9.1f}{row['votes_per_second']:>9.0f}"
            f"{row['overhead_ms_per_vote']:>14.1f} ms{row['labelled']:>10}{row['abstained']:>11}{row['wrong']:>7}"
        )
    return "\n".join([*lines, f"pictures: {rows[0]['encoding_ms_per_rollout']:.1f} ms a rollout, part of the overhead"])


def main(config: Config) -> None:
    """Measure, print, write."""
    rows = [measure(config, faulty) for faulty in (False, True)]
    print(table(rows))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(
        to_json({"machine": machine, "config": vars(config) | {"out": str(config.out)}, "runs": rows})
    )
    print(f"written to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
