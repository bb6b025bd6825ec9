"""The 2B model on a GPU: ``python benchmarks/gpu.py``. Random weights; speed does not depend on them.

In one run on one machine: milliseconds and FLOPs of each stage, a whole chunk at several batch sizes and numbers of
steps, memory, model FLOPs utilisation, one LoRA training step, and the stock diffusers pipeline (35 steps with
guidance, no actions, no history) on the same task. ``--preset small --device cpu`` runs the same code anywhere.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world import Cosmos2VideoToWorldPipeline
from torch import Tensor, nn

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.snapshot import Snapshot
from prophet_gym.strict_json import to_json
from prophet_gym.training.cost import PEAK_TFLOPS, count_flops
from prophet_gym.world_model.lora import add_lora
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
from prophet_gym.world_model.transformer import ProphetTransformer

SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 16, "adaln_lora_dim": 8,
    "scalar_hidden_dim": 16, "max_size": (32, 64, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What is measured."""

    preset: Literal["cosmos-2b", "small"] = "cosmos-2b"
    """Size of denoiser and codec; "small" is there to try the script."""
    device: str = "cuda"
    """As in torch."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of both networks."""
    image_size: int = 256
    """Side of the images in pixels."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Batch sizes."""
    steps: tuple[int, ...] = (4, 35)
    """Denoising steps of a chunk."""
    repeats: int = 5
    """Timed runs per figure, after one to warm up; the median is reported."""
    peak_tflops: float | None = None
    """Peak of the device for the utilisation; known devices have one."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile first."""
    training: bool = True
    """Measure a LoRA training step, at batch 1 with gradient checkpointing."""
    baseline: bool = True
    """Measure the stock pipeline."""
    out: Path = Path("runs/bench/gpu.json")
    """Result file."""


def measure(call: Callable[[], object], config: Config) -> dict[str, float | None]:
    """Median milliseconds of ``call`` and its peak memory in GB (CUDA only), after one run to warm up."""
    cuda = config.device.startswith("cuda")
    call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "ms": 1e3 * float(np.median(times)),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def teraflops(call: Callable[[], object]) -> float:
    """Floating-point operations of ``call`` in units of 1e12."""
    return count_flops(call) / 1e12


def random_network(network_class: Any, config: Config, **arguments: Any) -> Any:
    """A network of small random weights, made on the device."""
    with torch.device("meta"):
        network = network_class(**arguments)
    nn.Module.to(network, getattr(torch, config.dtype))  # diffusers' own warns about modules that are not there
    network.to_empty(device=config.device).eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    return network


def make_world(config: Config) -> ProphetWorldModel:
    """The world model at its preset's size."""
    small = config.preset == "small"
    shape = preset("cosmos-2b", memory_gate=1.0, **(SMALL if small else {}))
    transformer = random_network(ProphetTransformer, config, **shape)
    vae = random_network(AutoencoderKLWan, config, **({"base_dim": 8, "num_res_blocks": 1} if small else {}))
    if config.compile:
        transformer.transformer_blocks = nn.ModuleList(torch.compile(b) for b in transformer.transformer_blocks)
    return ProphetWorldModel(
        transformer,
        vae,
        ProphetConfig(
            name=config.preset, image_size=(config.image_size, config.image_size), schedule="karras", solver="ab2",
            action_spec=ACTION_SPECS["bridge"],
        ),
    )  # fmt: skip


def start(config: Config) -> Snapshot:
    """A grey image with a camera above the table."""
    side = config.image_size
    K = np.array([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1.0]])
    E = np.diag([1.0, -1.0, -1.0, 1.0])
    E[2, 3] = 1.0
    pose = np.eye(4)[None]
    return Snapshot(np.full((side, side, 3), 127, np.uint8), "stand", pose, np.ones(1), Camera(K, E, side, side))


def stages(world: ProphetWorldModel, config: Config, batch: int, peak: float | None) -> dict[str, dict[str, Any]]:
    """Time, FLOPs and utilisation of each stage of a chunk."""
    dtype, device, side = world.transformer.dtype, world.device, config.image_size
    frames = torch.zeros(batch, 21, side, side, 3, dtype=torch.uint8, device=device)
    latents = world.codec.encode(frames[:, :1]).expand(-1, -1, 6, -1, -1).contiguous()
    history = latents[:, :, :1].expand(-1, -1, world.config.history_frames // 4, -1, -1).contiguous()
    shape = (batch, world.chunk_length, world.num_effectors, 7)
    condition = partial(world.transformer.condition, torch.zeros(shape, dtype=dtype, device=device), latents, history)
    known = condition()
    mask = torch.zeros_like(latents[:, :1])
    times = torch.full((batch, 6), 0.5, device=device)
    calls: dict[str, Callable[[], object]] = {
        "encode start frame": partial(world.codec.encode, frames[:, :1]),
        "encode action frames": partial(world.codec.encode, frames),
        "condition": condition,
        "denoise once": partial(world.transformer, latents, mask, times, known),
        "decode": partial(world.codec.decode, latents),
    }
    rows = {}
    for name, call in calls.items():
        row: dict[str, Any] = {**measure(call, config), "tflop": teraflops(call)}
        row["mfu"] = None if peak is None else row["tflop"] / (row["ms"] * 1e-3) / peak
        rows[name] = row
    return rows


def chunks(world: ProphetWorldModel, config: Config) -> list[dict[str, Any]]:
    """Whole chunks through ``predict``, drawing and history included."""
    rows = []
    for batch in config.batches:
        state = world.begin([start(config)] * batch, range(batch))
        commands = np.zeros((batch, world.chunk_length, 1, 7), np.float32)
        for steps in config.steps:
            row: dict[str, Any] = {"batch": batch, "steps": steps}
            row |= measure(partial(world.predict, state, commands, steps), config)
            row["frames_per_second"] = batch * world.chunk_length / (row["ms"] * 1e-3)
            rows.append(row)
    return rows


def training_step(world: ProphetWorldModel, config: Config) -> dict[str, Any]:
    """One optimiser step of LoRA with the new parameters in full; changes the world."""
    transformer, device, dtype = world.transformer, world.device, world.transformer.dtype
    add_lora(transformer)
    transformer.train()
    transformer.enable_gradient_checkpointing()
    learned = [p for p in transformer.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.1, fused=True)
    side = config.image_size // 8
    latents = torch.randn(1, world.codec.latent_channels, 6, side, side, device=device, dtype=dtype)
    history = latents[:, :, :1].expand(-1, -1, world.config.history_frames // 4, -1, -1)
    actions = torch.zeros(1, world.chunk_length, world.num_effectors, 7, device=device, dtype=dtype)
    mask = torch.zeros_like(latents[:, :1])
    times = torch.full((1, 6), 0.5, device=device)

    def step() -> None:
        condition = transformer.condition(actions, latents, history)
        loss: Tensor = transformer(latents, mask, times, condition).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return {"learned_parameters": sum(p.numel() for p in learned), **measure(step, config)}


class _Unchecked:
    """Stands where the stock pipeline wants its safety checker, which is another model and not part of the task."""

    def to(self, *_: Any) -> _Unchecked:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def stock_chunk(world: ProphetWorldModel, config: Config) -> dict[str, Any]:
    """21 frames by diffusers' own Cosmos-Predict2 pipeline at the same size, on given text embeddings."""
    own = world.transformer.config
    same = ("num_attention_heads", "attention_head_dim", "num_layers", "text_embed_dim", "adaln_lora_dim", "max_size")
    transformer = random_network(
        CosmosTransformer3DModel, config, in_channels=17, out_channels=16, rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None, **{name: own[name] for name in same},
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipeline = Cosmos2VideoToWorldPipeline(None, None, transformer, world.codec.vae, scheduler, _Unchecked())
    pipeline.set_progress_bar_config(disable=True)
    text = torch.zeros(1, 512, own["text_embed_dim"], device=world.device, dtype=transformer.dtype)
    image = torch.full((1, 3, config.image_size, config.image_size), 0.5)

    def chunk() -> None:
        pipeline(
            image=image, prompt_embeds=text, negative_prompt_embeds=text, height=config.image_size,
            width=config.image_size, num_frames=21, num_inference_steps=max(config.steps), output_type="np",
        )  # fmt: skip

    return {"steps": max(config.steps), "guidance": True, **measure(chunk, config)}


def attempt(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or why there are none: one part that does not fit must not cost the others."""
    try:
        return what()
    except (RuntimeError, ImportError, NameError) as error:  # out of memory; a package that the stock code needs
        return {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


@torch.no_grad()
def inference(world: ProphetWorldModel, config: Config, peak: float | None) -> dict[str, Any]:
    """Everything that needs no gradient."""
    return {
        "stages": {str(batch): stages(world, config, batch, peak) for batch in sorted({1, max(config.batches)})},
        "chunks": chunks(world, config),
        **({"stock_pipeline": attempt(partial(stock_chunk, world, config))} if config.baseline else {}),
    }


def table(result: dict[str, Any]) -> str:
    """The figures for the terminal and the docs."""
    lines = ["| stage | batch | ms | TFLOP | MFU |", "|---|---|---|---|---|"]
    for batch, rows in result["stages"].items():
        for name, row in rows.items():
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
            lines.append(f"| {name} | {batch} | {row['ms']:.1f} | {row['tflop']:.3g} | {mfu} |")
    lines += ["", "| chunk of 20 frames | batch | ms | frames/s | peak GB |", "|---|---|---|---|---|"]

    def memory(row: dict[str, Any]) -> str:
        return "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"

    for row in result["chunks"]:
        figures = f"{row['ms']:.0f} | {row['frames_per_second']:.0f} | {memory(row)}"
        lines.append(f"| {row['steps']} steps | {row['batch']} | {figures} |")
    for key, name in (("stock_pipeline", "stock pipeline, 21 frames"), ("training_step", "LoRA training step")):
        row = result.get(key)
        if row is not None:
            figures = row.get("not_measured") or f"{row['ms']:.0f} ms, {memory(row)} GB"
            lines.append(f"\n{name}: {figures}")
    return "\n".join(lines)


def main(config: Config) -> dict[str, Any]:
    """Measure, print, write."""
    cuda = config.device.startswith("cuda")
    name = torch.cuda.get_device_name(config.device) if cuda else platform.processor() or platform.machine()
    peak = config.peak_tflops or next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    world = make_world(config)
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "peak_tflops": peak,
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()},
        "parameters": sum(p.numel() for p in world.transformer.parameters()),
        **inference(world, config, peak),
    }
    if config.training:
        result["training_step"] = attempt(partial(training_step, world, config))
    print(table(result))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(to_json(result))
    print(f"\nwritten to {config.out}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
