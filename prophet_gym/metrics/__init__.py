"""How good is an imagined video? Fidelity, motion, the block's place, and reports that carry their baselines."""

from .evaluate import evaluate_world_model, open_loop
from .fidelity import fidelity_metrics, psnr_per_frame, ssim_per_frame, tssim_per_step
from .optical_flow import (
    FlowComparison,
    compare_flows,
    default_threshold,
    farneback_flow,
    flow_metrics,
    flow_per_frame,
)
from .pictures import Comparison, draw_side_by_side, draw_strips, save_mp4, save_png
from .report import markdown, write_report
from .tracking import find_block, reference_color, track_block

__all__ = [
    "Comparison",
    "FlowComparison",
    "compare_flows",
    "default_threshold",
    "draw_side_by_side",
    "draw_strips",
    "evaluate_world_model",
    "farneback_flow",
    "fidelity_metrics",
    "find_block",
    "flow_metrics",
    "flow_per_frame",
    "markdown",
    "open_loop",
    "psnr_per_frame",
    "reference_color",
    "save_mp4",
    "save_png",
    "ssim_per_frame",
    "track_block",
    "tssim_per_step",
    "write_report",
]
