"""Tables of an evaluation (JSON and Markdown) and the folder that `prophet eval` leaves behind."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..strict_json import to_json
from .pictures import Comparison, draw_side_by_side, draw_strips, save_mp4, save_png
from .scores import BLOCK_TOLERANCE, Bootstrap

LABELS = {
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "tssim": ("tSSIM", ".3f"),
    "epe_mean": ("EPE px", ".3f"),
    "epe_median": ("EPE median", ".3f"),
    "cos_mean": ("cos", ".3f"),
    "cos_median": ("cos median", ".3f"),
    "cos_defined": ("cos defined", ".0%"),
    "block_within": (f"block within {BLOCK_TOLERANCE:.0f} px", ".0%"),
    "block_lost": ("block lost", ".0%"),
    "block_error": ("block error px", ".1f"),
}

ROWS = {
    "model": "**model**",
    "last_frame": "last frame repeated",
    "shuffled_actions": "shuffled actions",
    "real": "real frames (tracker check)",
}

AGAINST = {
    "psnr_over_last_frame": ("PSNR above last frame, dB", "+.2f"),
    "epe_ratio_to_last_frame": ("EPE relative to last frame", ".3f"),
    "psnr_over_shuffled": ("PSNR above shuffled actions, dB", "+.2f"),
    "epe_ratio_of_shuffled": ("EPE of shuffled actions relative to true ones", ".2f"),
}


def group_rows(
    tables: Mapping[int, Mapping[str, Mapping[str, np.ndarray]]],
    tracker_check: Mapping[int, np.ndarray],
    mask: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Aggregate one subset of episodes.

    Args:
        tables: horizon to predictor to metric to (n,) values.
        tracker_check: horizon to (n,) block errors on the real frames, inf where lost.
        mask: (n,) bool, the subset.
        seed: of the bootstrap.

    Returns:
        `{"n", "horizons": {h: {"predictors": {name: {metric: {value, low, high, n}}}, "against": {...}}}}`.
    """
    bootstrap = Bootstrap(int(mask.sum()), seed)
    horizons = {}
    for horizon, predictors in tables.items():
        subset = {name: {key: values[mask] for key, values in row.items()} for name, row in predictors.items()}
        rows = {name: {key: bootstrap.mean(values) for key, values in row.items()} for name, row in subset.items()}
        check = tracker_check[horizon][mask]
        asked = ~np.isnan(check)
        rows["real"] = {
            "block_within": bootstrap.mean(np.where(asked, check <= BLOCK_TOLERANCE, np.nan)),
            "block_lost": bootstrap.mean(np.where(asked, np.isinf(check), np.nan)),
            "block_error": bootstrap.mean(np.where(np.isfinite(check), check, np.nan)),
        }
        model, last, shuffled = (subset[name] for name in ("model", "last_frame", "shuffled_actions"))
        against = {
            "psnr_over_last_frame": bootstrap.mean(model["psnr"] - last["psnr"]),
            "epe_ratio_to_last_frame": bootstrap.ratio(model["epe_mean"], last["epe_mean"]),
            "psnr_over_shuffled": bootstrap.mean(model["psnr"] - shuffled["psnr"]),
            "epe_ratio_of_shuffled": bootstrap.ratio(shuffled["epe_mean"], model["epe_mean"]),
        }
        horizons[str(horizon)] = {"predictors": rows, "against": against}
    return {"n": int(mask.sum()), "horizons": horizons}


def markdown(result: Mapping[str, Any]) -> str:
    """The report of `evaluate_world_model` as a Markdown page."""
    protocol, groups = result["protocol"], result["groups"]
    last = str(protocol["steps"])
    lines = [
        "# World model evaluation",
        "",
        f"Checkpoint: {result['checkpoint'].get('name', 'unnamed')}. Open-loop rollouts of {protocol['num_episodes']} "
        f"episodes, {last} frames of {protocol['image_size'][0]}x{protocol['image_size'][1]}, "
        f"{protocol['num_inference_steps']} denoising steps, seed {protocol['seed']}. Brackets: 95 % bootstrap "
        "interval over episodes. Block figures: at the last frame, over the episodes in which the block truly moved. "
        "Definitions: `docs/metrics.md`.",
    ]
    for horizon, tables in groups["all"]["horizons"].items():
        lines += ["", f"## First {horizon} frames", "", *_table(tables["predictors"])]
    labels = {name: f"{name} (n = {group['n']})" for name, group in groups.items()}
    lines += ["", f"## Against the baselines ({last} frames)", ""]
    lines += ["| | " + " | ".join(label for label, _ in AGAINST.values()) + " |", "|---|" + "---|" * len(AGAINST)]
    for name, group in groups.items():
        cells = [_cell(group["horizons"][last]["against"][key], spec) for key, (_, spec) in AGAINST.items()]
        lines += [f"| {labels[name]} | " + " | ".join(cells) + " |"]
    lines += ["", f"## By kind of episode (model, {last} frames)", ""]
    models = {labels[name]: group["horizons"][last]["predictors"]["model"] for name, group in groups.items()}
    lines += _table(models, intervals=False)
    return "\n".join(lines) + "\n"


def write_report(result: Mapping[str, Any], comparisons: Sequence[Comparison], out: Path, fps: float) -> None:
    """Write `metrics.json`, `report.md`, `strips.png` and `rollouts.mp4`.

    Args:
        result: of `evaluate_world_model`.
        comparisons: episodes to draw, of equal length.
        out: folder, made if missing; files of an earlier evaluation are replaced.
        fps: of the video.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_png(out / "strips.png", draw_strips(comparisons))
    save_mp4(out / "rollouts.mp4", draw_side_by_side(comparisons), fps)
    _write(out / "report.md", markdown(result))
    _write(out / "metrics.json", to_json(result))


def _table(rows: Mapping[str, Mapping[str, Mapping[str, float]]], intervals: bool = True) -> list[str]:
    """Markdown rows of the columns that any row defines."""
    columns = [key for key in LABELS if any(key in row and math.isfinite(row[key]["value"]) for row in rows.values())]
    lines = ["| | " + " | ".join(LABELS[key][0] for key in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = [_cell(row[key], LABELS[key][1], intervals) if key in row else "" for key in columns]
        if any(cells) and not all(cell in ("", "-") for cell in cells):
            lines.append(f"| {ROWS.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def _cell(figure: Mapping[str, float], spec: str, interval: bool = True) -> str:
    if not math.isfinite(figure["value"]):
        return "-"
    text = format(figure["value"], spec)
    if interval and math.isfinite(figure["low"]):
        text += f" [{format(figure['low'], spec)}, {format(figure['high'], spec)}]"
    return text


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
