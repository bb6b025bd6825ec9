"""The plan of a pretraining run is checked against real steps of small networks: operations and memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.training_utils import EMAModel
from mixture_parallel import mixture_config
from test_pretrain import folder  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel

from prophet_gym.training.chunks import ChunkBatch
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.cost import (
    StepShape,
    activation_bytes,
    count_flops,
    encoding_flops,
    expected_step_flops,
    saved_bytes,
    step_flops,
)
from prophet_gym.training.loop import LoopConfig, build_optimizers
from prophet_gym.training.objective import ChunkDenoiser, ChunkNoise, mean_velocity_error
from prophet_gym.training.plan import PlanConfig, format_plan, plan_pretraining, state_bytes
from prophet_gym.training.pretrain import learn_what_is_used
from prophet_gym.world_model.codec import VideoCodec
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.prophet import ProphetConfig
from prophet_gym.world_model.transformer import ProphetTransformer

SIZE = (64, 80)


def small(layers: int = 3) -> ProphetTransformer:
    torch.manual_seed(0)
    return ProphetTransformer(**preset("tiny", num_attention_heads=2, num_layers=layers, latent_channels=8))


def arguments(transformer: ProphetTransformer) -> dict:
    return {key: value for key, value in transformer.config.items() if not key.startswith("_")}


def real_loss(transformer: ProphetTransformer, batch: int, frames: int = 6) -> torch.Tensor:
    """The loss of a run, on noise."""
    h, w = SIZE[0] // 8, SIZE[1] // 8
    latents, history = torch.randn(batch, 8, frames, h, w), torch.randn(batch, 8, 15, h, w)
    drawn = torch.randn(batch, 3, 4 * frames - 3, 4 * h, 4 * w)
    near = torch.zeros(batch, frames - 1, h, w)
    chunk = ChunkBatch(latents, history, torch.zeros(batch, 20, 1, 7), drawn, near, near)
    noise = ChunkNoise.draw(latents.shape, history.shape, ObjectiveConfig(), torch.Generator().manual_seed(0))
    return mean_velocity_error(ChunkDenoiser(transformer), chunk, noise, torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_real_step(checkpointing: bool) -> None:
    transformer = small()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    shape = StepShape(arguments(transformer), SIZE, bfloat16=False, checkpointing=checkpointing)
    forward, step = step_flops(shape, 6)
    with sdpa_kernel(SDPBackend.MATH):  # torch counts no operations of the fused attention on a CPU
        real = count_flops(lambda: real_loss(transformer, 2).backward())
        assert 2 * step == pytest.approx(real, rel=0.01)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert 2 * forward == pytest.approx(count_flops(lambda: real_loss(transformer, 2)), rel=0.01)
    assert 3.5 < step / forward < 4.1 if checkpointing else 2.5 < step / forward < 3.1


def test_operations_of_shorter_chunks_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StepShape(arguments(small(1)), SIZE, bfloat16=False)
    counted = {frames: step_flops(shape, frames) for frames in range(2, 7)}
    monkeypatch.setattr("prophet_gym.training.cost.step_flops", lambda shape, frames: counted[frames])
    costs = [counted[frames][1] for frames in range(2, 7)]
    assert expected_step_flops(shape, 0.25) == pytest.approx(0.25 * costs[-1] + 0.75 * sum(costs) / 5)


def test_operations_of_the_codec_are_those_of_a_real_one() -> None:
    settings = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
    codec = VideoCodec(AutoencoderKLWan(**settings, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    config = {**codec.vae.config}
    clip = torch.zeros(1, 5, *SIZE, 3, dtype=torch.uint8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert encoding_flops(AutoencoderKLWan, config, 5, SIZE) == count_flops(lambda: codec.encode(clip))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_step(checkpointing: bool) -> None:
    transformer = small()
    shape = StepShape(arguments(transformer), SIZE, bfloat16=False, checkpointing=checkpointing)
    kept, block = activation_bytes(shape, 6)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    few, many = (saved_bytes(lambda n=n: real_loss(transformer, n)) for n in (1, 4))
    assert kept == pytest.approx((many - few) / 3, rel=0.05)
    deeper = saved_bytes(lambda: real_loss(small(4), 4)) - saved_bytes(lambda: real_loss(small(4), 1))
    flat = saved_bytes(lambda: real_loss(small(3), 4)) - saved_bytes(lambda: real_loss(small(3), 1))
    assert block == pytest.approx((deeper - flat) / 3, rel=0.05)


def test_state_is_what_a_run_holds() -> None:
    """Weights, gradients, moments and average, byte for byte; what is frozen has weights alone."""
    transformer = small()
    learn_what_is_used(transformer, draws=False)
    (optimizer,) = build_optimizers(transformer, LoopConfig())
    learned = [p for p in transformer.parameters() if p.requires_grad]
    average = EMAModel(learned)
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = state_bytes(transformer, 7, 1, "ddp", False)
    moments = [v for slot in optimizer.state.values() for name, v in slot.items() if name != "step"]
    assert held == {
        "weights": sum(p.nbytes for p in transformer.parameters()),
        "gradients": sum(p.grad.nbytes for p in learned),
        "adamw": sum(moment.nbytes for moment in moments),
        "average": sum(p.nbytes for p in average.shadow_params),
        "copies of weights in use": 0,
        "whole gradients in use": 0,
        "codec": 7,
    }
    assert held["gradients"] < held["weights"]


def test_plan_of_a_small_mixture(folder: Path) -> None:  # noqa: F811
    config = replace(mixture_config(folder, 2), full_length=1.0)
    plan = plan_pretraining(config, PlanConfig(gpus=2, gpu="A100", mfu=0.5))
    assert plan["run"]["steps"] == 5 and plan["run"]["chunks"] == 40
    posed, blind = plan["datasets"]
    assert (posed["clips"], posed["tokens"], posed["action_frames"]) == (6, 6 * 16, "spatial")
    assert (blind["clips"], blind["tokens"], blind["action_frames"]) == (4, 6 * 20, "none")
    assert posed["passes"] * 6 + blind["passes"] * 4 == pytest.approx(40)
    flops = 40 * sum(row["share"] * row["flops_denoiser"] for row in (posed, blind))
    assert plan["hours"]["training"] == pytest.approx(flops / (2 * 312e12 * 0.5) / 3600)
    text = format_plan(plan)
    assert "5 steps of 8 chunks" in text and "posed" in text
    with pytest.raises(ValueError, match="H100"):
        PlanConfig(gpu="H1000")


def test_plan_of_the_papers_model(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Configurations are enough; a forward pass at 256x256 costs 5.06 TFLOP and 0.06 for the condition."""
    with torch.device("meta"):
        ProphetTransformer(**preset("cosmos-2b")).save_config(tmp_path / "base" / "transformer")
        AutoencoderKLWan().save_config(tmp_path / "base" / "vae")
    (tmp_path / "base" / "prophet.json").write_text(json.dumps(ProphetConfig().to_dict()))
    (tmp_path / "one.toml").write_text(
        f'[[dataset]]\npath = "{folder / "blind"}"\nclip_length = 20\nimage_size = [256, 256]'
    )
    config = replace(
        mixture_config(folder, 1), mixture=tmp_path / "one.toml", vae=None, base=str(tmp_path / "base"),
        mixed_precision="bf16", batch_size=16, full_length=1.0,
    )  # fmt: skip
    plan = plan_pretraining(config, PlanConfig(gpus=64))
    assert plan["run"]["parameters"] == 2_057_668_608
    assert 1.5e9 < plan["run"]["learned_parameters"] < 1.7e9  # without cross-attention
    (row,) = plan["datasets"]
    assert row["tokens"] == 1536 and row["flops_codec"] / 1e12 == pytest.approx(7.0, abs=0.1)
    assert row["flops_denoiser"] / 1e12 == pytest.approx(4 * 5.12, rel=0.05)
    memory = plan["memory"]
    assert memory["fsdp2"]["weights"] == pytest.approx(memory["ddp"]["weights"] / 64, rel=0.01)
    assert memory["ddp"]["adamw"] == 8 * plan["run"]["learned_parameters"]
    assert 3e9 < memory["ddp"]["activations"] < 40e9
