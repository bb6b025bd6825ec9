"""The page of an audit: findings, what each command does in the picture, and frames to look at; one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np
from PIL import Image

from prophet_gym.action_frames import project
from prophet_gym.audit import AuditReport
from prophet_gym.data.episode import Episode
from prophet_gym.errors import MissingExtraError

__all__ = ["write_audit_page"]

_MOMENTS, _TILE = 8, 120  # frames of a strip, and about their height in pixels
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>audit of $name</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td:first-child { white-space: nowrap; } .fault td:first-child { color: #b00020; font-weight: bold; }
.warning td:first-child { color: #9a6700; } img, svg { max-width: 100%; height: auto; } .note { color: #555; }
</style></head><body>
<h1>$verdict in $name</h1>
<p>$episodes episodes audited.</p>
<table><tr><th>level</th><th>check</th><th>finding</th></tr>$findings</table>
<h2>When the picture answers, and how</h2>
$charts
<p class="note">Left: share of the image's motion that the commands explain, if it follows them by so many steps.
Right: where the picture moves when a dimension is commanded, for a typical command each; up is up in the image.</p>
<h2>Commanded against measured</h2>
$response
<p class="note">Slope 1 and correlation 1: the measured poses do what is commanded.</p>
<h2>Frames</h2>
$strips
<p class="note">A circle marks the measured end-effector where the camera is calibrated: it has to sit on the hand.
The bar below a frame is the commanded gripper: full is open.</p>
</body></html>
""")


def write_audit_page(
    report: AuditReport, episodes: Sequence[Episode], path: Path, *, name: str, strips: int = 3
) -> None:
    """Writes the page in one step.

    Args:
        report: of the audit.
        episodes: what was audited; frames of the first ``strips`` readable ones are shown.
        path: the HTML file.
        name: of the data set.
        strips: episodes shown.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    faults = sum(finding.level == "fault" for finding in report.findings)
    rows = "".join(
        f'<tr class="{f.level}"><td>{f.level}</td><td>{escape(f.check)}</td><td>{escape(f.message)}</td></tr>'
        for f in report.findings
    )
    measured = {axis: values for axis, values in report.response.items() if values["slope"] is not None}
    cells = "".join(
        f"<tr><td>{escape(axis)}</td><td>{v['slope']:.3f}</td><td>{v['correlation']:.2f}</td></tr>"
        for axis, v in measured.items()
    )
    pictures: list[tuple[str, np.ndarray]] = []
    for i in range(len(episodes)):
        if len(pictures) == strips:
            break
        try:
            pictures.append((episodes[i].instruction, _strip(episodes[i])))
        except ValueError:
            continue  # listed among the findings
    page = _PAGE.substitute(
        name=escape(name),
        verdict=f"{faults} fault(s)" if faults else "No faults",
        episodes=report.episodes,
        findings=rows,
        charts=_charts(report),
        response=f"<table><tr><th>dimension</th><th>slope</th><th>correlation</th></tr>{cells}</table>"
        if cells
        else "<p>No measured poses.</p>",
        strips="".join(f"<p>{escape(text) or 'no instruction'}</p>{_image(strip)}" for text, strip in pictures),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _charts(report: AuditReport) -> str:
    """Delays and image responses side by side, SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('the page needs matplotlib: pip install "prophet-gym[viz]"') from error
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    delays = list(report.followed)
    colours = ["tab:blue" if delay == report.delay else "lightgrey" for delay in delays]
    left.bar(delays, [100 * max(0.0, report.followed[delay]) for delay in delays], color=colours)
    ticks = [delay for delay in delays if delay % max(1, len(delays) // 11) == 0]
    left.set(xlabel="steps by which images follow commands", ylabel="% of the motion", xticks=ticks, ylim=(0, 100))
    arrows = {
        axis: np.multiply(values["image"], values["typical"])
        for axis, values in report.response.items()
        if values["image"] is not None and values["typical"] > 0
    }
    reach = max((float(np.abs(arrow).max()) for arrow in arrows.values()), default=0.0) or 1.0
    for k, (axis, arrow) in enumerate(arrows.items()):
        style = {"arrowstyle": "->", "color": f"C{k % 10}", "lw": 2}
        right.annotate("", tuple(arrow / reach), (0, 0), arrowprops=style)
        right.plot([], [], color=f"C{k % 10}", label=axis)
    right.set(xlim=(-1.1, 1.1), ylim=(1.1, -1.1), xticks=[], yticks=[], aspect="equal")
    if arrows:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _strip(episode: Episode) -> np.ndarray:
    """Frames over time (H, W, 3), the end-effectors marked, the commanded gripper as a bar below."""
    frames = episode.frames
    moments = np.unique(np.linspace(0, len(frames) - 1, _MOMENTS).round().astype(int))
    height, width = frames.shape[1:3]
    factor = round(_TILE / height) if height <= _TILE else _TILE / height
    size, how = (round(width * factor), round(height * factor)), cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    tiles = []
    for t in moments:
        tile = cv2.resize(frames[t], size, interpolation=how)
        if episode.camera is not None and episode.eef_pose is not None:
            for u, v in np.atleast_2d(project(episode.eef_pose[t, :, :3, 3], episode.camera)[..., :2]):
                if np.isfinite([u, v]).all():
                    centre = (round((u + 0.5) * factor), round((v + 0.5) * factor))
                    cv2.circle(tile, centre, max(4, tile.shape[0] // 20), (255, 0, 200), 2, cv2.LINE_AA)
        bar = np.full((8, tile.shape[1], 3), 230, np.uint8)
        opened = float(episode.canonical_actions[min(t, len(episode) - 1), 0, 6])
        bar[2:, : round(np.clip(opened, 0, 1) * tile.shape[1])] = (40, 120, 200)
        tiles.append(np.pad(np.concatenate([tile, bar]), ((0, 0), (0, 4), (0, 0)), constant_values=255))
    return np.concatenate(tiles, axis=1)


def _image(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return f'<img alt="frames over time" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
