"""The GPU benchmark runs to its end on a CPU at small size, and its FLOPs at full size are those of the design."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks.gpu import Config, main, teraflops
from prophet_gym.world_model import ProphetTransformer
from prophet_gym.world_model.presets import preset


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.programs
def test_the_script_measures_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(
        preset="small", device="cpu", dtype="float32", image_size=64, batches=(1, 2), steps=(1, 2), repeats=1,
        peak_tflops=0.1, out=tmp_path / "gpu.json",
    )  # fmt: skip
    main(config)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["stages"]) == {"1", "2"} and all(row["ms"] > 0 for row in result["stages"]["2"].values())
    denoise = {batch: result["stages"][batch]["denoise once"] for batch in ("1", "2")}
    assert denoise["2"]["tflop"] == pytest.approx(2 * denoise["1"]["tflop"], rel=0.01)
    assert denoise["1"]["mfu"] == pytest.approx(denoise["1"]["tflop"] / (denoise["1"]["ms"] * 1e-3) / 0.1)
    assert [(row["batch"], row["steps"]) for row in result["chunks"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert result["training_step"]["learned_parameters"] > 0 and result["training_step"]["ms"] > 0
    stock = result["stock_pipeline"]  # its forward needs torchvision, which a CPU installation may lack
    assert stock.get("ms", 0) > 0 or "transforms" in stock["not_measured"]
    assert "| denoise once | 1 |" in capsys.readouterr().out


@torch.no_grad()
def test_full_size_costs_what_the_design_says() -> None:
    """256x256, one chunk: 5.06 TFLOP a denoising step without text, 0.44 and 7.0 to encode 1 and 21 frames, 11.8 to
    decode."""
    with torch.device("meta"):
        transformer, vae = ProphetTransformer(**preset("cosmos-2b", memory_gate=1.0)), AutoencoderKLWan()
        latents, history = torch.zeros(1, 16, 6, 32, 32), torch.zeros(1, 16, 15, 32, 32)
        video = torch.zeros(1, 3, 21, 256, 256)
        condition = transformer.condition(torch.zeros(1, 20, 2, 7), latents, history)
        mask, times = torch.zeros(1, 1, 6, 32, 32), torch.zeros(1, 6)
        assert teraflops(lambda: transformer(latents, mask, times, condition)) == pytest.approx(5.06, abs=0.01)
        assert teraflops(lambda: vae.encode(video[:, :, :1])) == pytest.approx(0.44, abs=0.01)
        assert teraflops(lambda: vae.encode(video)) == pytest.approx(7.0, abs=0.01)
        assert teraflops(lambda: vae.decode(latents)) == pytest.approx(11.8, abs=0.05)
