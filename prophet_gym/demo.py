"""``make demo``: Prophet imagines what the simulator then shows, on commands it was never trained on.

Plays scripted episodes, good and bad, in the simulator; gives their first frames and commands to the packaged Prophet;
writes metrics, verdicts against the truth, a picture and a video.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .judges.calibration import evaluate_judge
from .judges.classifier import ClassifierJudge
from .judges.rollouts import labelled_rollouts
from .metrics.evaluate import evaluate_world_model
from .registration import WORLDS, resolve_checkpoint
from .strict_json import to_json
from .training.imagine import imagine
from .world_model.prophet import ProphetWorldModel

FIRST_SEED = 3_000_000
"""Seed of the first demonstration episode; no training, validation or snapshot seed reaches it."""

BEHAVIOURS = ("expert", "half_good", "drop", "expert", "never_close", "half_good", "push_aside", "expert")
"""Scripted behaviours, taken in turn: successes and failures."""


@dataclass(frozen=True)
class DemoConfig:
    """Size and place of the demonstration."""

    out: Path = Path("runs/demo")
    """Folder of the results; files of an earlier demonstration are replaced."""
    episodes: int = 24
    """Simulated episodes of 40 commands."""
    checkpoint: str = "tabletop"
    """Packaged name or folder of the world model."""
    seed: int = 0
    """Added to the seeds of the scenes."""

    def __post_init__(self) -> None:
        if self.episodes < 2:
            raise ValueError(f"episodes={self.episodes}: expected at least 2, the baselines swap commands between them")


def run_demo(config: DemoConfig) -> str:
    """Run the demonstration and return its summary.

    Raises:
        MissingCheckpointError: no weights under that name.
        RenderingUnavailableError: no OpenGL that renders without a screen; the message holds the line to run.
    """
    from .data.record import record_episode
    from .sims.tabletop import TabletopSim

    began = time.perf_counter()
    folder = resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], config.checkpoint)
    world = ProphetWorldModel.from_pretrained(folder, dtype=torch.float32)
    judge = ClassifierJudge.from_pretrained(folder / "judge")
    print(f"world model: {world.checkpoint_info}")
    print(f"playing {config.episodes} episodes of 40 commands in the simulator ...", flush=True)
    sim = TabletopSim()
    episodes = [
        record_episode(sim, FIRST_SEED + config.seed + i, behaviour=BEHAVIOURS[i % len(BEHAVIOURS)])
        for i in range(config.episodes)
    ]
    sim.close()
    print("imagining the same commands, and those of another episode as a check ...", flush=True)
    result = evaluate_world_model(world, episodes, out=config.out, seed=config.seed, progress=True)
    imagined = imagine(world, episodes, seed=config.seed)
    verdicts = evaluate_judge(judge, labelled_rollouts(episodes, imagined))
    (config.out / "verdicts.json").write_text(to_json(verdicts))
    seconds = time.perf_counter() - began
    summary = summarise(result, verdicts, config, seconds)
    (config.out / "summary.txt").write_text(summary + "\n")
    return summary


def summarise(result: dict, verdicts: dict, config: DemoConfig, seconds: float) -> str:
    """A few lines for the terminal from the two reports."""
    horizon = str(result["protocol"]["steps"])
    tables = result["groups"]["all"]["horizons"][horizon]
    model, last, shuffled = (tables["predictors"][k] for k in ("model", "last_frame", "shuffled_actions"))

    def show(figure: dict, spec: str) -> str:
        value = figure["value"]
        return "n/a" if value is None or math.isnan(value) else format(value, spec)

    def row(name: str, key: str, digits: int) -> str:
        return f"  {name:<34}" + "".join(f"{show(r[key], f'.{digits}f'):>12}" for r in (model, last, shuffled))

    return "\n".join(
        [
            "",
            f"{len(result['episodes'])} episodes of {horizon} imagined frames, open loop, in {seconds:.0f} s",
            f"  {'':<34}{'Prophet':>12}{'last frame':>12}{'shuffled':>12}",
            row("PSNR in dB (higher is better)", "psnr", 2),
            row("flow end-point error in px (lower)", "epe_mean", 3),
            row("flow cosine (higher)", "cos_mean", 3),
            f"  where the block moved: within 3 px of the truth at the end {show(model['block_within'], '.0%')}, "
            f"lost {show(model['block_lost'], '.0%')}",
            "  judge on imagined frames against the simulator's truth: "
            f"precision {show(verdicts['precision'], '.2f')}, recall {show(verdicts['recall'], '.2f')} "
            f"({verdicts['successes']} successes)",
            f"pictures: {config.out / 'strips.png'}",
            f"video:    {config.out / 'rollouts.mp4'}",
            f"tables:   {config.out / 'report.md'}",
        ]
    )
