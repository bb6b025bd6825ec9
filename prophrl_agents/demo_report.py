"""The page and the summary of ``make demo``: everything in one file, no network needed to read it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from prophet_gym.atomic import atomic_text
from prophet_gym.errors import MissingExtraError
from prophrl_agents.evaluate import Comparison, Evaluation

if TYPE_CHECKING:
    from prophrl_agents.demo import DemoConfig

__all__ = ["DemoResult", "write_report"]

_PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the page is about.

    Attributes:
        config: of the demonstration.
        evaluations: of "before" and "after", in the simulator.
        comparison: of the two.
        metrics: lines of the training run's metrics.jsonl.
        world_summary: text of the first part.
        seconds: of everything.
    """

    config: DemoConfig
    evaluations: dict[str, Evaluation]
    comparison: Comparison
    metrics: list[dict[str, Any]]
    world_summary: str
    seconds: float


def write_report(result: DemoResult) -> str:
    """Writes ``report.html`` in one step and returns the summary for the terminal.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    config, gain = result.config, result.comparison
    lead = (
        f"The imitation policy succeeds in {gain.before:.1%} of the scenes. After {config.updates} updates inside "
        f"Prophet, without one step in the simulator, it succeeds in {gain.after:.1%}: {gain.difference:+.1f} points, "
        f"95 % interval [{gain.low:+.1f}, {gain.high:+.1f}]."
    )
    page = Template(_PAGE.read_text()).substitute(
        lead=escape(lead),
        table=_html_table(("policy", "success", "95 % interval", "gain, points", "95 % interval"), _rows(result)),
        starts=config.starts,
        curves=draw_curves(result.metrics),
        before=_data(config.out / "before.mp4", "video/mp4"),
        after=_data(config.out / "after.mp4", "video/mp4"),
        updates=config.updates,
        strips=_data(config.out / "strips.png", "image/png"),
        world=escape(result.world_summary.strip()),
        timings=_html_table(("part", "seconds"), _timings(result)),
    )
    path = config.out / "report.html"
    atomic_text(path, page)
    cells = [f"  {name:<34}{rate:>9}  {interval:<16}{change:>7}  {paired}" for name, rate, interval, change, paired in
             _rows(result)]  # fmt: skip
    return "\n".join(["", lead, "", *cells, "", f"{result.seconds:.0f} s in all", f"report: {path}"])


def draw_curves(metrics: list[dict[str, Any]]) -> str:
    """Returns the learning curves as SVG: judged success of every update, true success where the governor looked.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('curves need matplotlib: pip install "prophet-gym[viz]"') from error
    lines = [line for line in metrics if "success_rate" in line]
    checks = [line["governor"] for line in metrics if "governor" in line and line["governor"]["count"]]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [line["step"] for line in lines], [100 * line["success_rate"] for line in lines], label="judged, imagined"
    )
    if checks:
        steps = [check["update"] + 1 for check in checks]
        rates = [100 * check["true_success"] for check in checks]
        errors = [
            100 * (check["true_success"] * (1 - check["true_success"]) / check["count"]) ** 0.5 for check in checks
        ]
        axes.errorbar(steps, rates, errors, fmt="o", capsize=3, label="true, replayed (standard error)")
    axes.set(xlabel="update", ylabel="success in %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _rows(result: DemoResult) -> list[tuple[str, ...]]:
    labels = {"before": "imitation", "after": f"+ {result.config.updates} updates in Prophet"}
    gain = result.comparison
    cells = {"before": ("", ""), "after": (f"{gain.difference:+.1f}", f"[{gain.low:+.1f}, {gain.high:+.1f}]")}
    rows: list[tuple[str, ...]] = []
    for name, label in labels.items():
        one = result.evaluations[name]
        low, high = one.interval
        rows.append((label, f"{one.success_rate:.1%}", f"[{low:.1%}, {high:.1%}]", *cells[name]))
    return rows


def _timings(result: DemoResult) -> list[tuple[str, ...]]:
    updates = [line for line in result.metrics if "seconds_update" in line]
    parts = {
        "imagined rollouts: world model and judge": sum(line["seconds_env"] for line in updates),
        "imagined rollouts: policy": sum(line["seconds_policy"] for line in updates),
        "policy updates": sum(line["seconds_update"] for line in updates),
        **{
            f"evaluation in the simulator: {name}": evaluation.seconds["total"]
            for name, evaluation in result.evaluations.items()
        },
    }
    rest = result.seconds - sum(parts.values())
    return [(name, f"{seconds:.0f}") for name, seconds in [*parts.items(), ("everything else", max(rest, 0.0))]]


def _html_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
