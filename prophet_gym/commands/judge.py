"""The commands ``prophet judge ...``: train, measure, calibrate and compare judges, and label rollouts by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, subcommand

from ..atomic import atomic_text
from ..data.episode import Episode
from ..data.opening import open_dataset
from ..errors import MissingExtraError
from ..judges.calibration import evaluate_verdicts, format_calibration, judge_rollouts
from ..judges.disagreement import compare_verdicts, format_disagreement
from ..judges.human_labels import LABELS, known_labels, merge_labels, read_labels
from ..judges.label_page import write_label_page
from ..judges.label_terminal import label_in_terminal
from ..judges.opening import open_judge
from ..judges.operating_point import Objective, calibrate_judge
from ..judges.operating_report import advice, apply_threshold, calibration_files, format_operating_point
from ..judges.reliability import draw_calibration
from ..judges.rollouts import LabelledRollout, labelled_rollouts
from ..registration import ASSETS, WORLDS, resolve_checkpoint
from ..strict_json import to_json
from ..training.imagine import imagine
from ..training.judge import JudgeTrainingConfig, train_judge
from ..training.vlm_judge import VLMTrainingConfig, train_vlm_judge
from ..world_model.prophet import ProphetWorldModel

__all__ = ["judge"]


@dataclass(frozen=True)
class JudgeTraining(JudgeTrainingConfig):
    """Train the success classifier on real frames and on a world model's frames of the same actions.

    Attributes:
        checkpoint: the world model, a folder or a packaged name; "none" trains on real frames alone.
    """

    checkpoint: str = "tabletop"


@dataclass(frozen=True)
class VLMTraining(VLMTrainingConfig):
    """Fine-tune a vision-language model as a judge, on real frames and on a world model's frames of the same actions.

    Attributes:
        checkpoint: the world model, a folder or a packaged name; "none" trains on real frames alone.
    """

    checkpoint: str = "tabletop"


@dataclass(frozen=True)
class Measurement:
    """A judge and the rollouts on which it is measured: recorded frames, and imagined frames of the same actions.

    Attributes:
        data: held-out episodes, with a simulator's labels or with `labels`.
        judge: folder of a classifier or JSON file of a vision-language judge; the checkpoint's by default.
        checkpoint: the world model that imagines, a folder or a packaged name; "none" measures recorded frames alone.
        episodes: how many, from the first.
        chunk_length: commands of a prediction; the model's maximum by default.
        seed: of the imagination and the bootstrap.
        labels: JSON file of `prophet judge label`; only the episodes that it decides are used.
        card: what the numbers of the data mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera of the data; the card's or the first by default.
    """

    data: Positional[Path]
    judge: Path | None = None
    checkpoint: str = "tabletop"
    episodes: int = 400
    chunk_length: int | None = None
    seed: int = 0
    labels: Path | None = None
    card: str | None = None
    camera: str | None = None


@dataclass(frozen=True)
class JudgeEvaluation(Measurement):
    """Precision, recall, FPR and AUC of a judge on real frames and on imagined frames of the same actions.

    Attributes:
        second: another judge, asked about the same rollouts: how far the two agree, and who is right where they do not.
        out: JSON file for the figures.
    """

    second: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class JudgeCalibration(Measurement):
    """Choose a judge's threshold on labelled rollouts, and show what precision and recall it has at every other.

    Writes calibration.json and calibration.svg (extra `viz`) into the classifier's folder (of the packaged judge into
    runs/calibration); beside the file NAME.json of a vision-language judge NAME.calibration.json and .svg.

    Attributes:
        objective: the highest F-beta, or the highest recall at a precision of at least `target`.
        beta: how many times recall matters as much as precision.
        target: the precision to keep.
        lower_bound: the lower end of precision's 95 % interval has to reach the target.
        select: the rollouts that choose; figures are given for all sources.
        apply: write the threshold into the judge's JSON file.
        out: folder for the two files instead of beside the judge.
    """

    objective: Literal["fbeta", "precision"] = "fbeta"
    beta: float = 1.5
    target: float = 0.9
    lower_bound: bool = False
    select: Literal["all", "real", "imagined"] = "all"
    apply: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Labelling:
    """Say yourself which recorded rollouts succeeded: in the terminal, or with `page` in a browser.

    In the terminal y is success, n failure, u unsure, b goes back, q stops; every answer is kept at once and the next
    call goes on from there.

    Attributes:
        data: the episodes, of any format.
        out: JSON file of the labels.
        episodes: how many, from the first; 0 for all.
        frames: shown of each rollout, evenly spread.
        width: of a frame in the terminal, in columns.
        page: write this HTML file instead of asking here; it downloads its labels as a JSON file for `merge`.
        merge: take the labels of this file into `out`, and ask nothing.
        card: what the numbers of the data mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera of the data; the card's or the first by default.
    """

    data: Positional[Path]
    out: Path = Path("labels.json")
    episodes: int = 0
    frames: int = 6
    width: int = 24
    page: Path | None = None
    merge: Path | None = None
    card: str | None = None
    camera: str | None = None


def judge(
    what: Annotated[JudgeTraining, subcommand("train")]
    | Annotated[VLMTraining, subcommand("train-vlm")]
    | Annotated[JudgeEvaluation, subcommand("eval")]
    | Annotated[JudgeCalibration, subcommand("calibrate")]
    | Annotated[Labelling, subcommand("label")],
) -> None:
    """Train a judge, measure it against the truth, choose its threshold, or label rollouts by hand.

    Args:
        what: one of these.
    """
    if isinstance(what, JudgeEvaluation):
        evaluate(what)
    elif isinstance(what, JudgeCalibration):
        calibrate(what)
    elif isinstance(what, Labelling):
        label(what)
    else:
        world = None if what.checkpoint == "none" else _world(what.checkpoint)
        trained = train_vlm_judge(what, world) if isinstance(what, VLMTraining) else train_judge(what, world)[1]
        print(to_json(trained), end="")


def evaluate(what: JudgeEvaluation) -> None:
    """Print and write the figures of one judge, and of its agreement with a second."""
    path = _judge_path(what)
    names = [path.name, "" if what.second is None else what.second.name]
    if names[0] == names[1]:
        names = ["first", "second"]
    judges = [open_judge(path), *([] if what.second is None else [open_judge(what.second)])]
    reports: dict[str, Any] = {}
    for source, rollouts in _rollouts(what).items():
        verdicts = [judge_rollouts(each, rollouts) for each in judges]
        reports[source] = evaluate_verdicts(verdicts[0], rollouts)
        print(f"\n{source} frames\n{format_calibration(reports[source])}")
        if len(verdicts) == 2:
            second = evaluate_verdicts(verdicts[1], rollouts)
            labels = np.array([rollout.label for rollout in rollouts])
            compared = compare_verdicts(verdicts[0], verdicts[1], labels, seed=what.seed)
            reports[source] |= {"second": second, "disagreement": compared}
            print(f"\n{source} frames, {names[1]}\n{format_calibration(second)}")
            print(f"\n{names[0]} beside {names[1]}, {source} frames\n{format_disagreement(compared, *names)}")
    if what.out is not None:
        atomic_text(what.out, to_json(reports))


def calibrate(what: JudgeCalibration) -> None:
    """Choose and print an operating point; write it, its picture and, if asked to, the threshold."""
    path, out = _judge_path(what), what.out
    if path.resolve().is_relative_to(ASSETS.resolve()):  # the package's own files stay as they are
        if what.apply:
            raise ValueError(f"--apply would change the packaged judge {path}; copy its folder and give --judge COPY.")
        out = out or Path("runs/calibration")
    table, picture = calibration_files(path, out)  # before the work: whether they can be written
    objective = Objective(what.objective, what.beta, what.target, what.lower_bound)
    measured = open_judge(path)
    rollouts = [rollout for part in _rollouts(what).values() for rollout in part]
    report = calibrate_judge(measured, rollouts, objective, select=what.select, seed=what.seed)
    report["advice"] = advice(report)
    # Names, not paths: the file travels with the judge.
    report["data"] = {
        "name": what.data.resolve().name,
        "episodes": len({rollout.name for rollout in rollouts}),
        "labels": "simulator" if what.labels is None else what.labels.name,
        "checkpoint": Path(what.checkpoint).name,
        "chunk_length": what.chunk_length,
    }
    atomic_text(table, to_json(report))
    print(f"{format_operating_point(report)}\n\nwritten: {table}")
    try:
        atomic_text(picture, draw_calibration(report))
        print(f"written: {picture}")
    except MissingExtraError as error:
        print(f"no picture: {error}", file=sys.stderr)
    if what.apply:
        print(f"threshold {report['threshold']:.4f} written into {apply_threshold(path, report['threshold'])}")


def label(what: Labelling) -> None:
    """Ask a person, write the page, or merge what the page gave."""
    if what.merge is not None:
        added, changed = merge_labels(what.out, what.merge)
        print(f"{added} labels added, {changed} changed: {what.out}")
        return
    dataset = open_dataset(what.data, card=what.card, camera=what.camera)
    indices = range(min(len(dataset), what.episodes or len(dataset)))
    episodes = (dataset[index] for index in indices)
    if what.page is not None:
        labels = read_labels(what.out) if what.out.exists() else {}
        write_label_page(episodes, what.page, labels, name=what.data.resolve().name)
        print(f"open {what.page} in a browser, then: prophet judge label {what.data} --out {what.out} --merge DOWNLOAD")
        return
    labels = label_in_terminal(episodes, what.out, total=len(indices), frames=what.frames, width=what.width)
    counts = ", ".join(f"{list(labels.values()).count(kind)} {kind}" for kind in LABELS)
    print(f"{counts}: {what.out}")


def _judge_path(what: Measurement) -> Path:
    if what.judge is not None:
        return what.judge
    if what.checkpoint == "none":
        raise ValueError("--checkpoint none has no judge of its own; name one with --judge.")
    return resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], what.checkpoint) / "judge"


def _rollouts(what: Measurement) -> dict[str, list[LabelledRollout]]:
    """Labelled rollouts by source: "real", and "imagined" where a world model is named."""
    episodes: Sequence[Episode] = open_dataset(what.data, card=what.card, camera=what.camera)[: what.episodes]
    labels = None if what.labels is None else known_labels(read_labels(what.labels))
    if labels is not None:
        count, episodes = len(episodes), [episode for episode in episodes if episode.name in labels]
        print(f"{len(episodes)} of {count} episodes have a label in {what.labels}", file=sys.stderr)
    rollouts = {"real": labelled_rollouts(episodes, labels=labels)}
    if what.checkpoint != "none":
        frames = imagine(
            _world(what.checkpoint),
            episodes,
            chunk_length=what.chunk_length,
            seed=what.seed,
            progress=sys.stderr.isatty(),
        )
        rollouts["imagined"] = labelled_rollouts(episodes, frames, labels=labels)
    return rollouts


def _world(checkpoint: str) -> ProphetWorldModel:
    return ProphetWorldModel.from_pretrained(resolve_checkpoint(WORLDS["Prophet-Tabletop-v0"], checkpoint))
