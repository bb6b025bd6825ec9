"""Tables 1 to 4 in miniature, on real recordings: what history, pretraining and action frames give a world model.

``python benchmarks/real.py --runs runs/real`` takes data and codec that ``scripts/make_real.sh`` left there, scores the
packaged Bridge and DROID worlds, and trains four variants of each with one small budget: the recipe, without the
Tabletop weights it starts from, without history, without action frames. All are scored on the same windows of held-out
recordings, beside the last frame repeated and shuffled actions, and drawn by frame of the rollout. Finished runs are
kept and interrupted ones continue, so the tables can grow over several calls (``--sets``, ``--arms``, ``--seeds``). A
run of 1,400 steps takes about fifteen minutes of one CPU core; after 300 of 8 samples nothing moves yet in any of them.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from prophet_gym.atomic import atomic_text
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.windows import EpisodeWindows
from prophet_gym.errors import MissingExtraError
from prophet_gym.metrics.evaluate import PREDICTORS, evaluate_world_model
from prophet_gym.registration import ASSETS
from prophet_gym.strict_json import to_json
from prophet_gym.training.clips import ClipSource
from prophet_gym.training.presets import WORLD_MODEL_TINY
from prophet_gym.training.world_model import train_world_model
from prophet_gym.world_model.prophet import ProphetWorldModel

# Commands of a training clip, imagined frames of a rollout, and commands from one window to the next. Bridge's
# recordings are short: only DROID's rollouts go over two chunks, and only there a history can be seen.
SETS = {"bridge": (22, 20, 4), "droid": (40, 40, 20)}
SHIPPED, BATCH = "packaged", 16
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("history, pretraining, action frames", {}),
    "no_pretraining": ("without pretraining", {"init": None}),
    "no_history": ("without history", {"history": False}),
    "no_action_frames": ("without action frames", {"action_frames": "none"}),
}
METRICS = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "tssim": "tSSIM",
    "epe_mean": "EPE mean",
    "epe_median": "EPE median",
    "cos_mean": "cosine mean",
    "cos_median": "cosine median",
}
NAMES = {"model": "", "last_frame": "last frame repeated", "shuffled_actions": "shuffled actions"}


@dataclass(frozen=True)
class Config:
    """What is run, with which budget."""

    runs: Path = Path("runs/real")
    """Folder of ``make_real.sh``: ``data/`` and ``vae/vae``."""
    out: Path = Path("runs/real-tables")
    """Runs, tables and curves."""
    sets: tuple[str, ...] = tuple(SETS)
    """Robots."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Variants that are trained; the packaged worlds are always scored."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    steps: int = 1400
    """Optimiser steps of 16 samples, the same for every variant."""
    jobs: int = 2
    """Runs at a time, one CPU thread each."""


@dataclass(frozen=True)
class Run:
    """One cell and seed."""

    robot: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.robot}-{self.arm}-{self.seed}"


def held_out(config: Config, robot: str) -> list[Episode]:
    """Returns the windows that everything is scored on."""
    _, frames, stride = SETS[robot]
    windows = EpisodeWindows(EpisodeFolder(config.runs / "data" / f"{robot}-val"), frames, stride=stride)
    return [windows[i] for i in range(len(windows))]


def train(config: Config, run: Run) -> ProphetWorldModel:
    """Trains one variant, or goes on where it was interrupted."""
    folder = config.out / run.name / "run"
    settings = replace(
        WORLD_MODEL_TINY,
        data=config.runs / "data" / run.robot,
        vae=config.runs / "vae" / "vae",
        run=folder,
        cache=config.out / "cache",
        init=ASSETS / "tabletop",
        source=ClipSource(clip_length=SETS[run.robot][0]),
        name=run.name,
        residual=True,
        still_below=12.0,
        self_rollout=0.0,
        motion_weight=1.0,
        timestep_shift=4.0,
        condition_noise=0.1,
        loop=replace(
            WORLD_MODEL_TINY.loop,
            steps=config.steps,
            batch_size=BATCH,
            weight_decay=0.05,
            decay_fraction=0.5,
            save_every=250,
            eval_every=0,
            seed=run.seed,
        ),
        resume=(folder / "checkpoints" / "last.pt").exists(),
    )
    return train_world_model(replace(settings, **ARMS[run.arm][1]))


def play(config: Config, run: Run) -> dict[str, Any]:
    """Trains and scores one run, as far as that is not done."""
    torch.set_num_threads(1)
    folder = config.out / run.name
    kept = folder / "result.json"
    if not kept.exists():
        done = folder / "run" / "prophet"
        if run.arm == SHIPPED:
            done = ASSETS / run.robot
        world = ProphetWorldModel.from_pretrained(done) if (done / "prophet.json").exists() else train(config, run)
        windows = held_out(config, run.robot)
        report = evaluate_world_model(world, windows, SETS[run.robot][1], out=folder / "evaluation")
        table = report["groups"]["all"]["horizons"][str(SETS[run.robot][1])]
        steps = None if run.arm == SHIPPED else config.steps
        found = {"steps": steps, "windows": len(windows), "table": table, "per_frame": report["per_frame"]}
        atomic_text(kept, to_json(found))
    found = json.loads(kept.read_text())
    if run.arm != SHIPPED and found["steps"] != config.steps:
        raise ValueError(
            f"{kept} is of {found['steps']} steps; delete {run.name} to run it anew, or give another --out"
        )
    return found


def table(config: Config, results: dict[Run, dict[str, Any]], robot: str) -> str:
    """Returns the Markdown table of one robot."""
    first = results[Run(robot, SHIPPED, 0)]
    lines = ["| world | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]

    def row(name: str, cells: list[dict[str, dict[str, float]]]) -> None:
        lines.append(f"| {name} | " + " | ".join(cell([one[key] for one in cells]) for key in METRICS) + " |")

    row(NAMES["last_frame"], [first["table"]["predictors"]["last_frame"]])
    for arm in (SHIPPED, *ARMS):
        found = [
            result["table"]["predictors"] for run, result in results.items() if (run.robot, run.arm) == (robot, arm)
        ]
        if found:
            label = SHIPPED if arm == SHIPPED else ARMS[arm][0]
            row(label, [predictors["model"] for predictors in found])
            if arm in (SHIPPED, "full"):
                row(f"{label}, {NAMES['shuffled_actions']}", [predictors["shuffled_actions"] for predictors in found])
    note = (
        f"{SETS[robot][1]} frames open loop, {first['windows']} windows that overlap, of recordings that no run saw. "
        "Brackets: 95 % bootstrap interval over windows, of the first seed."
    )
    if config.arms:
        note += f" Trained variants: {config.steps} steps of {BATCH} samples, mean over {len(config.seeds)} seed(s)."
    return f"### {robot}\n\n" + "\n".join(lines) + f"\n\n{note}\n"


def cell(seeds: list[dict[str, float]]) -> str:
    """Returns one figure: mean over seeds, and the interval of the first."""
    values = [one["value"] for one in seeds]
    if any(value is None or not np.isfinite(value) for value in values):
        return "-"
    return f"{np.mean(values):.3f} [{seeds[0]['low']:.3f}, {seeds[0]['high']:.3f}]"


def draw(results: dict[Run, dict[str, Any]], sets: tuple[str, ...], path: Path) -> None:
    """Draws PSNR and EPE by frame of the rollout.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('the curves need matplotlib: pip install "prophet-gym[viz]"') from error
    page = Figure(figsize=(9.0, 3.2 * len(sets)), layout="constrained")
    for axes, robot in zip(page.subplots(len(sets), 2, squeeze=False), sets, strict=True):
        for axis, key, label in zip(axes, ("psnr", "epe"), ("PSNR, dB", "flow EPE, px"), strict=True):
            curves = results[Run(robot, SHIPPED, 0)]["per_frame"]
            for predictor, style in zip(PREDICTORS, ("-", "--", ":"), strict=True):
                values = curves[predictor][key]
                name = NAMES[predictor] or SHIPPED
                axis.plot(range(1, 1 + len(values)), values, style, color="black", label=name)
            for arm, (name, _) in ARMS.items():
                if Run(robot, arm, 0) in results:
                    values = results[Run(robot, arm, 0)]["per_frame"]["model"][key]
                    axis.plot(range(1, 1 + len(values)), values, label=name, linewidth=1)
            axis.set_title(f"{robot}: {label}", fontsize="medium")
            axis.set_xlabel("frame of the rollout")
    page.axes[0].legend(fontsize="x-small")
    page.savefig(path, dpi=110, pil_kwargs={"optimize": True})


def main(config: Config) -> None:
    """Runs what is missing and writes ``real.md``, ``real.json`` and ``real.png``."""
    for given, known in ((config.sets, SETS), (config.arms, ARMS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown}: expected some of {list(known)}")
    if missing := [robot for robot in config.sets if not (config.runs / "data" / robot).is_dir()]:
        raise ValueError(f"{config.runs}/data lacks {missing}: run scripts/make_real.sh first, or give its RUNS")
    runs = [Run(robot, SHIPPED, 0) for robot in config.sets]
    runs += [Run(robot, arm, seed) for seed in config.seeds for robot in config.sets for arm in config.arms]
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(zip(runs, pool.map(play, [config] * len(runs), runs), strict=True))
    page = "\n".join(table(config, results, robot) for robot in config.sets)
    atomic_text(config.out / "real.json", to_json({run.name: result for run, result in results.items()}))
    atomic_text(config.out / "real.md", page)
    draw(results, config.sets, config.out / "real.png")
    print(page)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
