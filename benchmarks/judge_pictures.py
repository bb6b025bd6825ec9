"""Two pictures of ``benchmarks/judge.py``: where the judge can be set, and on whose rollouts it is right."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prophet_gym.errors import MissingExtraError
from prophet_gym.judges.reliability import draw_curves, draw_reliability

NAMES = {"rule": "pixel rule", "judge": "trained judge"}
COLOURS = {"real": "C0", "imagined": "C1"}


def draw_operating(report: dict[str, Any], path: Path) -> None:
    """Reliability of the scores, precision over recall of both judges, and the trained one over its threshold.

    Args:
        report: of ``measure``.
        path: PNG file.
    """
    figure = _figure(13.5, 4.4)
    reliability, trade, curves = figure.subplots(1, 3)
    draw_reliability(reliability, {frames: report[frames] for frames in COLOURS})
    reliability.set_title("trained judge: does a score mean what it says?", fontsize="medium")
    for frames, colour in COLOURS.items():
        for judge, style in (("judge", "-"), ("rule", ":")):
            rows = [row for row in report[frames]["curves"][judge] if row["precision"]["value"] is not None]
            recall, precision = ([row[rate]["value"] for row in rows] for rate in ("recall", "precision"))
            trade.plot(recall, precision, style, color=colour, label=f"{NAMES[judge]}, {frames}")
        for row in report[frames]["operating"]:
            if row["name"] in ("trained, as packaged", "pixel rule at 0.5"):
                mark = "o" if row["judge"] == "judge" else "s"
                trade.plot(row["recall"]["value"], row["precision"]["value"], mark, color=colour, markeredgecolor="0.2")
    trade.set(xlabel="recall", ylabel="precision", xlim=(0.5, 1.01), ylim=(0.5, 1.01))
    trade.set_title("circles: as packaged; squares: the rule at 0.5", fontsize="medium")
    draw_curves(curves, report["imagined"]["curves"]["judge"], "threshold")
    for point, style in zip(report["points"][3:], ("-", "--", ":"), strict=False):
        label = f"{point['name'].removeprefix('trained, ')}, {point['threshold']:.2f}"
        curves.axvline(point["threshold"], color="0.3", linewidth=1, linestyle=style, label=label)
    curves.set_title("trained judge, imagined frames", fontsize="medium")
    for axes in (reliability, trade, curves):
        axes.grid(alpha=0.3)
    reliability.legend(fontsize="small", loc="upper left")
    trade.legend(fontsize="small", loc="lower left")
    curves.legend(fontsize="small", loc="center", bbox_to_anchor=(0.5, 0.55), ncols=2)  # between recall and FPR
    _save(figure, path)


def draw_sources(report: dict[str, Any], path: Path) -> None:
    """Accuracy of both judges by source, on recorded and on imagined frames, with 95 % intervals.

    Args:
        report: of ``measure``.
        path: PNG file.
    """
    figure = _figure(10, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(report["real"]["sources"])
    for axes, (frames, colour) in zip(panels, COLOURS.items(), strict=True):
        for judge, offset, mark, face in (("judge", -0.14, "o", colour), ("rule", 0.14, "s", "white")):
            rates = [report[frames]["sources"][name][judge]["accuracy"] for name in names]
            values, low, high = (np.array([rate[end] for rate in rates]) for end in ("value", "low", "high"))
            axes.errorbar(values, np.arange(len(names)) + offset, xerr=np.maximum([values - low, high - values], 0),
                          fmt=mark, color=colour, markerfacecolor=face, capsize=3, label=NAMES[judge])  # fmt: skip
        axes.set(xlabel=f"verdicts that are right, {frames} frames", xlim=(0.45, 1.01))
        axes.grid(alpha=0.3, axis="x")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside upper center", ncols=2)
    rows = [report["real"]["sources"][name]["rule"] for name in names]
    labels = [f"{name}\n{row['successes']} of {row['n']} succeed" for name, row in zip(names, rows, strict=True)]
    panels[0].set_yticks(range(len(names)), labels, fontsize="small")
    panels[0].invert_yaxis()
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('the pictures need matplotlib: pip install "prophet-gym[viz]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Writes a PNG of at most 256 colours in one step: a fraction of the size, and nothing of a diagram is lost."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    picture = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(temporary, "png", optimize=True)
    temporary.replace(path)
