"""How far the packaged judge of Tabletop can be trusted, and whether training it was worth it.

``python benchmarks/judge.py`` records scripted behaviours and packaged policies that explore, in equal shares and from
seeds that nothing was trained on, imagines the same actions in the packaged Prophet, and asks two judges about recorded
and imagined frames: the packaged classifier, and a rule on pixels that learned nothing (``pixel_rule.py``). Policies
act on what the simulator shows and, as they do while they learn, on what the world imagines (``-in-world``): one that
sees its block slip tries again, one that imagines holding it goes on. Thresholds are chosen on the imagined rollouts of
a calibration split; every figure comes from the other episodes. Writes ``judge.json``, ``judge.md`` and two pictures.
Recorded episodes and scores are kept, so that a second call only counts and draws.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import binomtest
from tqdm import tqdm

from prophet_gym.atomic import atomic_text
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import record
from prophet_gym.judges import Judge, Objective, choose_threshold, labelled_rollouts, open_judge
from prophet_gym.judges.calibration import auc, auc_interval, judge_rollouts, ratio, show_rate
from prophet_gym.judges.decision import DecisionRule
from prophet_gym.judges.operating_point import GRID, point_figures
from prophet_gym.judges.reliability import expected_calibration_error, reliability_bins
from prophet_gym.registration import WORLDS, resolve_checkpoint
from prophet_gym.sims.expert import FAILURES
from prophet_gym.strict_json import to_json
from prophet_gym.training.imagine import imagine
from prophet_gym.weights import locate_weights
from prophet_gym.world_model.prophet import ProphetWorldModel
from prophrl_agents.policies.small import ASSETS
from prophrl_agents.record import record_policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.judge_pictures import NAMES, draw_operating, draw_sources  # noqa: E402
from benchmarks.pixel_rule import PixelRule  # noqa: E402

SCRIPTS: dict[str, dict[str, float]] = {
    "expert": {"expert": 1.0},
    "half-good": {"half_good": 1.0},
    "failures": dict.fromkeys((*FAILURES, "random"), 1.0),
}
POLICIES = ("tabletop-sft", "tabletop-reinforced")
IN_WORLD = "-in-world"
SOURCES = (*SCRIPTS, *POLICIES, *(policy + IN_WORLD for policy in POLICIES))
FIRST_SEED, SEEDS_PER_SET = 2_500_000, 5_000
"""Inside the range that is held out of all training; every source and split has seeds of its own."""
FRAMES = ("real", "imagined")
BETA, CLEAN = 1.5, 0.85
"""Of F-beta; the precision that paper 4.4 saw next to a recall of 0.98."""

Row = dict[str, Any]
"""One episode: split, source, episode, label, and a score "JUDGE_FRAMES" of either judge on either frames."""


@dataclass(frozen=True)
class Config:
    """What is measured, on how much."""

    out: Path = Path("runs/judge_benchmark")
    """Episodes, scores, tables and pictures."""
    episodes: int = 120
    """Measured episodes of each source."""
    calibration: int = 60
    """Further episodes of each source, which only choose thresholds."""
    checkpoint: str = "tabletop"
    """World model."""
    judge: Path | None = None
    """Folder of the trained judge; the checkpoint's by default."""
    chunk_length: int = 8
    """Commands of a prediction: the packaged policies'."""
    workers: int = 1
    """Processes that record; 0: this one."""
    bootstrap: int = 2000
    """Resamplings of episodes behind intervals."""
    seed: int = 0
    """Of the imagination and the resampling."""


@dataclass(frozen=True)
class Point:
    """A judge at a threshold."""

    name: str
    judge: str
    threshold: float


# --- scores ---


def score_all(config: Config, judges: dict[str, Judge]) -> list[Row]:
    """Records, imagines and judges every episode; one set at a time is in memory."""
    world = ProphetWorldModel.from_pretrained(_world(config))
    rows = []
    for split, folder, seed, count in tqdm(list(_sets(config)), desc="sets", disable=None):
        if folder.name in SCRIPTS:
            record(folder, count, seed, workers=config.workers, mix=SCRIPTS[folder.name])
        else:
            acting: dict[str, str] = {}
            if folder.name.endswith(IN_WORLD):
                acting = {"world": "Prophet-Tabletop-v0", "checkpoint": str(_world(config))}
            policy = folder.name.removesuffix(IN_WORLD)
            record_policy(folder, policy, count, seed, noisy_share=1.0, workers=config.workers, **acting)
        episodes = list(EpisodeFolder(folder))[:count]
        frames = imagine(world, episodes, chunk_length=config.chunk_length, seed=config.seed + seed)
        shown = {"real": labelled_rollouts(episodes), "imagined": labelled_rollouts(episodes, frames)}
        scores = {
            f"{name}_{frames}": [verdict.score for verdict in judge_rollouts(judge, rollouts)]
            for frames, rollouts in shown.items()
            for name, judge in judges.items()
        }
        for index, rollout in enumerate(shown["real"]):
            about = {"split": split, "source": folder.name, "episode": rollout.name, "label": rollout.label}
            rows.append({**about, **{name: values[index] for name, values in scores.items()}})
    return rows


def _sets(config: Config) -> Iterator[tuple[str, Path, int, int]]:
    """Split, folder, first seed and size of every set."""
    folder = config.out / f"data-{_digest(_acting(config))[:8]}"  # other weights act otherwise
    for index, source in enumerate(SOURCES):
        for part, (split, count) in enumerate((("calibration", config.calibration), ("test", config.episodes))):
            if not 1 <= count <= SEEDS_PER_SET:
                raise ValueError(f"{count} episodes of {source} for {split}: expected 1 to {SEEDS_PER_SET}.")
            yield split, folder / split / source, FIRST_SEED + (2 * index + part) * SEEDS_PER_SET, count


def _acting(config: Config) -> list[Path]:
    """Files that decide what policies do in the world."""
    world, policies = _world(config), [locate_weights(policy, ASSETS, "config.json") for policy in POLICIES]
    networks = [path for folder in ("transformer", "vae") for path in sorted((world / folder).glob("*.*"))]
    return [world / "prophet.json", *networks, *(path / "model.safetensors" for path in policies)]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _world(config: Config) -> Path:
    return resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], config.checkpoint)


def column(rows: list[Row], name: str) -> np.ndarray:
    """One field of all rows."""
    return np.array([row[name] for row in rows])


# --- figures ---


def choose_points(rows: list[Row], packaged: float) -> list[Point]:
    """Untrained, packaged and calibrated thresholds; the last from imagined rollouts, where judges give rewards."""
    labels = column(rows, "label")

    def best(judge: str, objective: Objective) -> float:
        return choose_threshold(column(rows, f"{judge}_imagined"), labels, objective)

    points = [
        Point("pixel rule at 0.5", "rule", 0.5),
        Point(f"pixel rule, best F-{BETA:g}", "rule", best("rule", Objective(beta=BETA))),
        Point("trained, at 0.5", "judge", 0.5),
        Point("trained, as packaged", "judge", packaged),
        Point(f"trained, best F-{BETA:g}", "judge", best("judge", Objective(beta=BETA))),
    ]
    try:
        clean = best("judge", Objective("precision", target=CLEAN))
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
        return points
    return [*points, Point(f"trained, precision {CLEAN:g}", "judge", clean)]


def figures(rows: list[Row], frames: str, point: Point, config: Config) -> dict[str, Any]:
    """Precision, recall, FPR and accuracy of a point with Wilson intervals, and the AUC with a bootstrap one."""
    scores, labels = column(rows, f"{point.judge}_{frames}"), column(rows, "label")
    rule = DecisionRule(point.threshold)
    right = int((rule.success(scores) == labels).sum())
    return {
        "successes": int(labels.sum()),
        **point_figures(scores, labels, rule, beta=BETA),
        "accuracy": ratio(right, len(rows)),
        "auc": auc_interval(scores, labels, config.bootstrap, config.seed),
    }


def compare(rows: list[Row], frames: str, first: Point, second: Point, config: Config) -> dict[str, Any]:
    """First minus second on the same episodes, with bootstrap intervals over them; McNemar's exact test."""
    labels = column(rows, "label")
    scores = [column(rows, f"{point.judge}_{frames}") for point in (first, second)]
    said = [scores[i] >= point.threshold for i, point in enumerate((first, second))]
    right = [each == labels for each in said]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    statistics: dict[str, Callable[[int, np.ndarray], float]] = {
        "accuracy": lambda i, pick: right[i][pick].mean(),
        "f_beta": lambda i, pick: _f_beta(said[i][pick], labels[pick]),
        "auc": lambda i, pick: auc(scores[i][pick], labels[pick]),
    }
    picks = np.random.default_rng(config.seed).integers(len(rows), size=(config.bootstrap, len(rows)))
    report: dict[str, Any] = {"first_only_right": only[0], "second_only_right": only[1]}
    report["mcnemar_p"] = binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    for name, value in statistics.items():
        drawn = np.array([value(0, pick) - value(1, pick) for pick in picks])
        low, high = np.nanquantile(drawn, (0.025, 0.975)).tolist()
        everything = np.arange(len(rows))
        report[name] = {"value": float(value(0, everything) - value(1, everything)), "low": low, "high": high}
    return report


def _f_beta(said: np.ndarray, labels: np.ndarray) -> float:
    weight = said.sum() + BETA**2 * labels.sum()
    return float((1 + BETA**2) * (said & labels).sum() / weight) if weight else 0.0


def blame(rows: list[Row], packaged: Point) -> dict[str, int]:
    """Wrong verdicts on imagined frames: in how many the frames mislead, rather than the judge."""
    labels = column(rows, "label")
    said = {f: column(rows, f"judge_{f}") >= packaged.threshold for f in FRAMES}
    wrong = said["imagined"] != labels
    also = (column(rows, "rule_imagined") >= 0.5) != labels
    return {
        "wrong": int(wrong.sum()),
        "right_on_recorded_frames": int((wrong & (said["real"] == labels)).sum()),
        "pixel_rule_is_wrong_too": int((wrong & also).sum()),
    }


def measure(rows: list[Row], packaged: float, config: Config) -> dict[str, Any]:
    """Everything that is reported, JSON-ready."""
    test = [row for row in rows if row["split"] == "test"]
    points = choose_points([row for row in rows if row["split"] == "calibration"], packaged)
    rule, rule_best, plain, as_packaged, best = points[:5]
    sources = {"all": test, **{name: [row for row in test if row["source"] == name] for name in SOURCES}}
    labels = column(test, "label")
    pairs = ((as_packaged, rule), (best, rule_best), (best, plain))
    report: dict[str, Any] = {"points": [asdict(point) for point in points], "n": len(test)}
    for frames in FRAMES:
        scores = column(test, f"judge_{frames}")
        report[frames] = {
            "operating": [{**asdict(point), **figures(test, frames, point, config)} for point in points],
            "sources": {
                name: {point.judge: figures(part, frames, point, config) for point in (rule, as_packaged)}
                for name, part in sources.items()
            },
            "paired": [
                {"first": one.name, "second": other.name, **compare(test, frames, one, other, config)}
                for one, other in pairs
            ],
            "curves": {
                judge: [{"threshold": t, **point_figures(column(test, f"{judge}_{frames}"), labels, DecisionRule(t))}
                        for t in GRID]
                for judge in NAMES
            },
            "n": len(test),
            "ece": expected_calibration_error(scores, labels),
            "reliability": reliability_bins(scores, labels),
        }  # fmt: skip
    report["blame"] = blame(test, as_packaged)
    return report


def tables(report: dict[str, Any]) -> str:
    """Markdown: operating points, sources, paired differences."""
    rates = ("precision", "recall", "fpr", "auc")
    operating, sources, paired = [], [], []
    for frames in FRAMES:
        for row in report[frames]["operating"]:
            cells = [show_rate(row[rate]) for rate in (*rates, "accuracy")]
            operating.append([frames, f"{row['name']} ({row['threshold']:.2f})", *cells])
        for row in report[frames]["paired"]:
            accuracy = _difference({key: 100 * value for key, value in row["accuracy"].items()}, 1)
            counts = [str(row["first_only_right"]), str(row["second_only_right"]), f"{row['mcnemar_p']:.2g}"]
            cells = [accuracy, _difference(row["f_beta"], 3), _difference(row["auc"], 3), *counts]
            paired.append([frames, f"{row['first']} − {row['second']}", *cells])
    for source in SOURCES:
        for frames in FRAMES:
            for judge, row in report[frames]["sources"][source].items():
                cells = [source, f"{row['successes']} of {row['n']}", frames, NAMES[judge]]
                sources.append([*cells, *(show_rate(row[rate]) for rate in rates)])
    wrong = report["blame"]
    return "\n\n".join(
        [
            _table(["frames", "judge, threshold", "precision", "recall", "FPR", "AUC", "accuracy"], operating),
            _table(["source", "successes", "frames", "judge", "precision", "recall", "FPR", "AUC"], sources),
            _table(["frames", "first − second", "accuracy, points", f"F-{BETA:g}", "AUC", "only first right",
                    "only second right", "McNemar p"], paired),
            f"Of {wrong['wrong']} wrong verdicts on imagined frames, {wrong['right_on_recorded_frames']} are right on "
            f"recorded frames of the same actions; in {wrong['pixel_rule_is_wrong_too']} the pixel rule is wrong too.",
        ]
    )  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _difference(rate: dict[str, float], digits: int) -> str:
    return f"{rate['value']:+.{digits}f} [{rate['low']:+.{digits}f}, {rate['high']:+.{digits}f}]"


def main(config: Config) -> None:
    """Scores what is not scored yet, and writes figures, tables and pictures."""
    path = config.judge or _world(config) / "judge"
    trained = open_judge(path)
    deciding = {name: value for name, value in asdict(config).items() if name not in ("out", "workers", "bootstrap")}
    settings = {
        **deciding,
        "judge": None if config.judge is None else str(config.judge),
        "sha256": [_digest(_acting(config)), _digest(sorted(path.glob("judge.*")) if path.is_dir() else [path])],
    }
    kept = config.out / "scores.json"
    scored = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if scored.get("settings") != settings:
        scored = {"settings": settings, "rows": score_all(config, {"rule": PixelRule(), "judge": trained})}
        atomic_text(kept, to_json(scored))
    report = measure(scored["rows"], trained.rule.threshold, config)
    atomic_text(config.out / "judge.json", to_json({"settings": settings, **report}))
    atomic_text(config.out / "judge.md", tables(report) + "\n")
    draw_operating(report, config.out / "judge_operating.png")
    draw_sources(report, config.out / "judge_sources.png")
    print(tables(report))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
