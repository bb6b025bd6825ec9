"""What adaptation buys: imagined flow against the number of episodes in a new look, and against training from scratch.

``python benchmarks/adaptation.py`` records Tabletop in its second look (another camera, other colours), adapts the
packaged world to 10, 50 and 200 episodes as ``prophet adapt`` does (with and without ``--decoder-steps``), trains the
same architecture from scratch and the packaged weights in full on the same clips with the same number of steps and
samples, and scores 20-frame rollouts on held-out episodes. All arms share the packaged codec ("decoder" trains half of
it), hold out the same tenth of their episodes and keep the weights that do best on it. Finished runs are kept,
interrupted ones continue, and the table is written anew after each, so it can grow over several calls (``--arms``,
``--episodes``, ``--seeds``). A step takes about 0.3 s on one quiet core, the whole table about an hour.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from prophet_gym.atomic import atomic_folder, atomic_text
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import record
from prophet_gym.data.windows import EpisodeWindows
from prophet_gym.errors import MissingExtraError
from prophet_gym.metrics.evaluate import evaluate_world_model
from prophet_gym.metrics.scores import Bootstrap
from prophet_gym.registration import ASSETS
from prophet_gym.strict_json import to_json
from prophet_gym.training.adapt import adapt
from prophet_gym.training.adapt_codec import codec_limits
from prophet_gym.training.adapt_config import AdaptConfig, adaptation_loop
from prophet_gym.training.adapt_data import evaluation_windows, split_data
from prophet_gym.training.world_model import WorldModelConfig, train_world_model, validation_numbers
from prophet_gym.world_model.prophet import ProphetWorldModel

BASE = ASSETS / "tabletop"
LOOK, TRAINING_SEED, HELD_OUT_SEED = "second", 6_000_000, 1_500_000
ARMS = {
    "adapt": "adapted: LoRA, new parameters in full",
    "scratch": "from scratch",
    "decoder": "adapted, the decoder first",
    "full": "fine-tuned in full",
}
METRICS = {"epe_mean": "EPE px", "psnr": "PSNR dB", "cos_mean": "flow cosine"}
BATCH = 8


@dataclass(frozen=True)
class Config:
    """What is run, with which budget."""

    out: Path = Path("runs/adaptation")
    """Data, runs, table and curve."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Ways to a world of the new look."""
    episodes: tuple[int, ...] = (10, 50, 200)
    """Sizes of the nested training sets; a tenth of each is held out to choose the weights."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    steps: int = 600
    """Optimiser steps of 8 samples, the same for every arm."""
    decoder_steps: int = 300
    """Steps of the arm that trains the decoder first, beside those."""
    held_out: int = 64
    """Episodes that no run sees, on which all are scored."""
    frames: int = 20
    """Imagined frames of a rollout."""
    jobs: int = 1
    """Runs at a time, one CPU thread each."""


@dataclass(frozen=True)
class Run:
    """One cell and seed of the table; zero episodes is the packaged world as it is."""

    arm: str
    episodes: int
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.arm}-{self.episodes}-{self.seed}"


UNADAPTED = Run("base", 0, 0)


def adaptation(config: Config, run: Run) -> AdaptConfig:
    """Returns what ``prophet adapt`` gets; the other arms take data, split and evaluations from it."""
    folder = config.out / run.name
    usual = adaptation_loop()
    loop = replace(
        usual,
        steps=config.steps,
        batch_size=BATCH,
        warmup_steps=min(usual.warmup_steps, config.steps // 4),
        eval_every=max(config.steps // 4, 1),
        seed=run.seed,
    )
    return AdaptConfig(
        data=training_data(config, run.episodes),
        base=str(BASE),
        out=folder / "world",
        evaluation_frames=config.frames,
        decoder_steps=config.decoder_steps if run.arm == "decoder" else 0,
        resume=(folder / "world-run" / "checkpoints" / "last.pt").exists(),
        loop=loop,
    )


def training_data(config: Config, episodes: int) -> Path:
    """Returns the folder of a training set."""
    return config.out / f"train-{episodes}"


def train_all_weights(config: Config, run: Run) -> ProphetWorldModel:
    """Trains every weight of the denoiser, from the packaged ones ("full") or from fresh ones ("scratch")."""
    folder, like = config.out / run.name, adaptation(config, run)
    base = ProphetWorldModel.from_pretrained(BASE)
    split = split_data(like, base.image_size, base.chunk_length, base.config.history_frames)
    keep_better = best_keeper(folder, evaluation_windows(like, split, base.image_size), run.seed)
    network = base.transformer.config
    fresh = run.arm == "scratch"
    if not fresh:
        keep_better(base, 0)  # as `prophet adapt` does
    train_world_model(
        WorldModelConfig(
            data=like.data,
            vae=BASE / "vae",
            run=folder / "run",
            cache=config.out / f"cache-{run.episodes}",
            init=None if fresh else BASE,
            source=split.source,
            name=run.name,
            num_attention_heads=network.num_attention_heads,
            num_layers=network.num_layers,
            adaln_lora_dim=network.adaln_lora_dim,
            action_frames=network.action_frames,
            residual=network.residual,
            first_step=0.5,  # as `prophet adapt` sets it for a world of one denoising step
            num_inference_steps=base.num_inference_steps,
            # Fresh weights get the optimisation that the packaged ones were trained with.
            loop=replace(like.loop, learning_rate=1e-3, muon_learning_rate=1e-3) if fresh else like.loop,
            resume=(folder / "run" / "checkpoints" / "last.pt").exists(),
        ),
        evaluate=keep_better,
    )
    return ProphetWorldModel.from_pretrained(folder / "best")


def best_keeper(
    folder: Path, windows: list[Episode], seed: int
) -> Callable[[ProphetWorldModel, int], dict[str, float]]:
    """Returns an evaluation that saves the world with the lowest EPE on held-out windows to ``best/``."""
    record_file = folder / "best.json"

    def evaluate(world: ProphetWorldModel, step: int) -> dict[str, float]:
        numbers = validation_numbers(evaluate_world_model(world, windows, len(windows[0]), seed=seed))
        error = numbers["validation_epe_mean"]
        if not record_file.exists() or error < json.loads(record_file.read_text())["error"]:
            with atomic_folder(folder / "best", overwrite=True) as work:
                world.save_pretrained(work)
            atomic_text(record_file, to_json({"step": step, "error": error}))
        return numbers

    return evaluate


def play(config: Config, run: Run) -> dict[str, Any]:
    """Trains and scores one run, as far as that is not done."""
    torch.set_num_threads(1)
    kept = config.out / run.name / "result.json"
    if not kept.exists():
        began = time.perf_counter()
        if run == UNADAPTED:
            world = ProphetWorldModel.from_pretrained(BASE)
        elif run.arm in ("adapt", "decoder"):
            settings = adaptation(config, run)
            if not settings.out.exists():
                adapt(settings)
            world = ProphetWorldModel.from_pretrained(settings.out)
        else:
            world = train_all_weights(config, run)
        seconds = time.perf_counter() - began
        episodes = EpisodeFolder(config.out / "held_out")[: config.held_out]
        report = evaluate_world_model(world, episodes, config.frames, out=config.out / run.name / "evaluation")
        table = report["groups"]["all"]["horizons"][str(config.frames)]
        scores = {key: [episode[key] for episode in report["episodes"]] for key in METRICS}
        result = {"run": run.name, "steps": config.steps, "seconds": seconds, "table": table, "scores": scores}
        atomic_text(kept, to_json(result))
    result = json.loads(kept.read_text())
    made = {"steps": result["steps"], "held_out": len(result["scores"]["psnr"])}
    if made["held_out"] != config.held_out or (run != UNADAPTED and made["steps"] != config.steps):
        raise ValueError(f"{kept} is of {made}; delete {run.name} to run it anew, or give another --out")
    return result


def figure(results: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Returns a figure of one cell: mean over seeds of every episode, then mean and interval over episodes."""
    values = np.array([result["scores"][key] for result in results], float)  # None, a cosine without motion, is nan
    return Bootstrap(values.shape[1], 0).mean(values.mean(0))


def summary(config: Config, results: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of all cells, the baselines and the limits of the codec."""
    first = results[UNADAPTED]
    windows = EpisodeWindows(EpisodeFolder(config.out / "held_out"), config.frames, stride=10**6)
    starts = [windows[i] for i, name in enumerate(windows.names) if name.endswith("@0")][: config.held_out]
    kept = config.out / "codec.json"
    if not kept.exists():
        atomic_text(kept, to_json(codec_limits(ProphetWorldModel.from_pretrained(BASE).codec, starts)))
    rows = []
    order = ["base", *ARMS]
    for arm, episodes in sorted({(run.arm, run.episodes) for run in results}, key=lambda c: (order.index(c[0]), c[1])):
        cell = [result for run, result in results.items() if (run.arm, run.episodes) == (arm, episodes)]
        shuffled = [result["table"]["predictors"]["shuffled_actions"]["epe_mean"]["value"] for result in cell]
        rows.append(
            {"arm": arm, "episodes": episodes, "seeds": len(cell)}
            | {key: figure(cell, key) for key in METRICS}
            | {"shuffled_epe": float(np.mean(shuffled)), "seconds": float(np.mean([one["seconds"] for one in cell]))}
        )
    return {
        "steps": config.steps,
        "held_out": config.held_out,
        "frames": config.frames,
        "last_frame": {key: first["table"]["predictors"]["last_frame"][key] for key in METRICS},
        "codec": json.loads(kept.read_text()),
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """Returns the Markdown table."""
    last, codec = found["last_frame"], found["codec"]
    lines = [
        "| world | episodes | " + " | ".join(METRICS.values()) + " | EPE, shuffled actions |",
        "|---" * (3 + len(METRICS)) + "|",
        f"| codec alone, on real frames | | {codec['epe']:.3f} | {codec['psnr']:.2f} | {codec['cos']:.3f} | |",
        "| last frame repeated | | " + " | ".join(cell(last[key]) for key in METRICS) + " | |",
    ]
    for row in found["rows"]:
        name = ARMS.get(row["arm"], "packaged, as it is")
        cells = " | ".join(cell(row[key]) for key in METRICS)
        lines.append(f"| {name} | {row['episodes']} | {cells} | {row['shuffled_epe']:.3f} |")
    note = (
        f"{found['steps']} steps of {BATCH} samples; {found['frames']} frames open loop on {found['held_out']} "
        "held-out episodes; brackets: 95 % bootstrap interval over episodes."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def cell(one: dict[str, Any]) -> str:
    """Returns one figure with its interval."""
    if one["value"] is None or not np.isfinite(one["value"]):
        return "-"
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws EPE against the number of episodes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('the curve needs matplotlib: pip install "prophet-gym[viz]"') from error
    page = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = page.subplots()
    for arm, label in ARMS.items():
        rows = sorted((row for row in found["rows"] if row["arm"] == arm), key=lambda row: row["episodes"])
        if rows:
            values, low, high = (np.array([row["epe_mean"][key] for row in rows]) for key in ("value", "low", "high"))
            places = [row["episodes"] for row in rows]
            axes.errorbar(places, values, (values - low, high - values), marker="o", capsize=3, label=label)
    lines = {
        "packaged, as it is": (found["rows"][0]["epe_mean"]["value"], "dotted"),
        "last frame repeated": (found["last_frame"]["epe_mean"]["value"], "dashed"),
        "codec alone": (found["codec"]["epe"], "dashdot"),
    }
    for label, (value, style) in lines.items():
        axes.axhline(value, color="grey", linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_xticks(sorted({row["episodes"] for row in found["rows"]} - {0}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_xlabel("episodes of the new look")
    axes.set_ylabel("flow EPE on held-out episodes, px")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    page.savefig(path, dpi=110, pil_kwargs={"optimize": True})


def results_of(config: Config, runs: list[Run]) -> Iterator[dict[Run, dict[str, Any]]]:
    """Yields the results so far after every run, those of earlier calls with other arms among them."""
    found = {UNADAPTED: play(config, UNADAPTED)}
    for run in (Run(arm, count, seed) for seed in config.seeds for count in config.episodes for arm in ARMS):
        if (config.out / run.name / "result.json").exists():
            found[run] = play(config, run)
    yield found
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        for run, result in zip(runs, pool.map(play, [config] * len(runs), runs), strict=True):
            found = {**found, run: result}
            yield found


def main(config: Config) -> None:
    """Runs what is missing and writes ``adaptation.md``, ``adaptation.json`` and ``adaptation.png``."""
    unknown = [arm for arm in config.arms if arm not in ARMS]
    if unknown or min(config.episodes, default=0) < 2:
        raise ValueError(
            f"arms {unknown}, episodes {config.episodes}: expected arms of {list(ARMS)} and two episodes or more"
        )
    record(config.out / "held_out", config.held_out, HELD_OUT_SEED, workers=0, look=LOOK)
    for count in config.episodes:  # an episode is a function of its seed, so the sets are nested
        record(training_data(config, count), count, TRAINING_SEED, workers=0, look=LOOK)
    runs = [Run(arm, count, seed) for seed in config.seeds for count in config.episodes for arm in config.arms]
    for results in results_of(config, runs):
        found = summary(config, results)
        atomic_text(config.out / "adaptation.json", to_json(found))
        atomic_text(config.out / "adaptation.md", table(found))
        draw(found, config.out / "adaptation.png")
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
