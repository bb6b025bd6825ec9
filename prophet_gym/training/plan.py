"""The dry run of pretraining (``prophet plan``): clips, steps, operations, memory and hours, before a GPU is rented.

Operations and activations are counted on the network itself (:mod:`.cost`); parameters, gradients, AdamW's two moments
and the average are four bytes each. What cannot be known beforehand is stated: the share of the device's peak that the
run will reach (``mfu``), and what the allocator and the communication library add.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..errors import nearest
from ..world_model.codec import VideoCodec
from ..world_model.transformer import ProphetTransformer
from ..world_model.video_vae import FoldedVideoVAE
from .cost import MEMORY_GB, PEAK_TFLOPS, StepShape, activation_bytes, encoding_flops, expected_step_flops
from .mixture import OpenedDataset, open_mixture, read_mixture
from .parallel import Parallel
from .pretrain import learn_what_is_used, starting_configs
from .pretrain_config import PretrainConfig

__all__ = ["PlanConfig", "format_plan", "plan_pretraining", "state_bytes"]


@dataclass(frozen=True)
class PlanConfig:
    """The machine that a run is planned for."""

    gpus: int = 8
    """Number of GPUs, one process each."""
    gpu: str = "H200"
    """Kind: H200, H100, A100, L40S or RTX 4090."""
    mfu: float = 0.35
    """Share of the GPU's peak that the run reaches."""

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_TFLOPS:
            raise ValueError(
                f"gpu={self.gpu!r}: expected one of {', '.join(PEAK_TFLOPS)}.{nearest(self.gpu, PEAK_TFLOPS)}"
            )
        if self.gpus < 1 or not 0.0 < self.mfu <= 1.0:
            raise ValueError(f"gpus={self.gpus}, mfu={self.mfu}; expected at least 1 GPU and a share in (0, 1]")


def state_bytes(
    transformer: ProphetTransformer, codec_bytes: int, gpus: int, parallel: Parallel, bfloat16: bool
) -> dict[str, int]:
    """Bytes on one GPU that do not depend on the batch.

    Args:
        transformer: the network, whose frozen parameters have no gradient, moments or average; may be on "meta".
        codec_bytes: of the codec, which every process has.
        gpus: processes.
        parallel: whole or shared out.
        bfloat16: whether weights are copied to half precision when they are used.
    """
    parts = gpus if parallel == "fsdp2" else 1
    everything = learned = 0
    for parameter in transformer.parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        share = 4 * -(-rows // parts) * (parameter.numel() // rows)  # FSDP2 cuts along the first dimension
        everything, learned = everything + share, learned + (share if parameter.requires_grad else 0)
    blocks = [sum(p.numel() for p in block.parameters()) for block in transformer.transformer_blocks]
    total = sum(p.numel() for p in transformer.parameters())
    narrow = 2 if bfloat16 else 4
    if parallel == "fsdp2" and gpus > 1:  # two blocks, one of them on its way, and the parameters outside of the blocks
        gathered = narrow * (2 * max(blocks) + total - sum(blocks))
        whole_gradients = gathered
    else:  # autocast keeps its copies until the end of the forward pass
        gathered, whole_gradients = (narrow * total if bfloat16 else 0), 0
    return {
        "weights": everything,
        "gradients": learned,
        "adamw": 2 * learned,
        "average": learned,
        "copies of weights in use": gathered,
        "whole gradients in use": whole_gradients,
        "codec": codec_bytes,
    }


def plan_pretraining(config: PretrainConfig, machine: PlanConfig) -> dict[str, Any]:
    """Plan a run; nothing is trained, decoded (but a first image) or encoded.

    Returns:
        JSON-ready: ``datasets`` (clips, share, image size, tokens, operations a chunk), ``run`` (steps, chunks,
        operations), ``memory`` (bytes a GPU for both ways of parallel training), ``hours``, ``disk``.

    Raises:
        ValueError: a bad mixture or bad data, as :func:`.pretrain.pretrain` would raise.
    """
    mixture = read_mixture(config.mixture)
    effectors = max(dataset.source.open(dataset.path)[0].action_spec.num_effectors for dataset in mixture.datasets)
    denoiser, vae_class, vae_config, history = starting_configs(config, effectors)
    opened = open_mixture(
        mixture,
        chunk_length=denoiser["chunk_length"],
        num_effectors=denoiser["num_effectors"],
        action_frames=denoiser["action_frames"],
    )
    with torch.device("meta"):
        transformer = ProphetTransformer(**denoiser)
        codec = vae_class.from_config(vae_config)
    learn_what_is_used(transformer, any(dataset.draws for dataset in opened))
    clips = [dataset.clips for dataset in opened]
    shares = mixture.shares(clips)
    steps = config.steps(sum(clips), machine.gpus)
    chunks = steps * config.batch_size * config.accumulation * machine.gpus
    bfloat16 = config.mixed_precision == "bf16"
    full = 1 + denoiser["chunk_length"] // VideoCodec.temporal_stride
    rows, activations, once, disk = [], 0.0, 0.0, 0
    for dataset, share in zip(opened, shares.tolist(), strict=True):
        shape = StepShape(denoiser, dataset.image_size, history, dataset.draws, bfloat16, config.gradient_checkpointing)
        kept, block = activation_bytes(shape, full)
        activations = max(activations, config.batch_size * (kept + (block if shape.checkpointing else 0.0)))
        encoding = _encoding(dataset, denoiser, vae_class, vae_config)
        once += dataset.clips * encoding["once"]
        disk += dataset.clips * _stored_bytes(dataset, denoiser, codec)
        rows.append(
            {
                "name": dataset.dataset.name,
                "clips": dataset.clips,
                "share": share,
                "passes": share * chunks / dataset.clips,
                "image_size": list(dataset.image_size),
                "action_frames": denoiser["action_frames"] if dataset.draws else "none",
                "tokens": shape.tokens(full),
                "flops_denoiser": expected_step_flops(shape, config.full_length),
                "flops_codec": encoding["each step"],
            }
        )
    training = chunks * sum(row["share"] * (row["flops_denoiser"] + row["flops_codec"]) for row in rows)
    speed = machine.gpus * PEAK_TFLOPS[machine.gpu] * 1e12 * machine.mfu
    codec_bytes = sum(p.numel() for p in codec.parameters()) * (2 if bfloat16 and vae_class is AutoencoderKLWan else 4)
    memory = {}
    for parallel in ("ddp", "fsdp2"):
        parts = state_bytes(transformer, codec_bytes, machine.gpus, parallel, bfloat16)
        memory[parallel] = {**parts, "activations": int(activations)}
        memory[parallel]["total"] = sum(memory[parallel].values())
    return {
        "machine": {**asdict(machine), "memory_gb": MEMORY_GB[machine.gpu], "peak_tflops": PEAK_TFLOPS[machine.gpu]},
        "datasets": rows,
        "run": {
            "parameters": sum(p.numel() for p in transformer.parameters()),
            "learned_parameters": sum(p.numel() for p in transformer.parameters() if p.requires_grad),
            "epochs": config.epochs,
            "steps": steps,
            "chunks_a_step": config.batch_size * config.accumulation * machine.gpus,
            "chunks": chunks,
            "flops": training,
            "flops_once": once,
            "parallel": config.parallel,
        },
        "memory": memory,
        "hours": {"training": training / speed / 3600, "encoding": once / speed / 3600},
        "disk": disk,
    }


def _encoding(dataset: OpenedDataset, denoiser: dict[str, Any], vae_class: Any, vae_config: dict) -> dict[str, float]:
    """Operations of the codec on one clip: once, into the cache, and each time that a chunk of it is drawn."""
    moments = dataset.dataset.clip_length // 2 + 1

    def cost(frames: int) -> float:
        return encoding_flops(vae_class, vae_config, frames, dataset.image_size)

    pooled = dataset.draws and denoiser["action_frames"] == "pooled"
    clip = cost(1 + denoiser["chunk_length"])
    if vae_class is FoldedVideoVAE:  # a group is encoded as it is; one frame of context costs another group
        return {"once": moments * 2 * cost(1), "each step": pooled * clip}
    return {"once": moments * (cost(1) + cost(5)), "each step": (1 + pooled) * clip}


def _stored_bytes(dataset: OpenedDataset, denoiser: dict[str, Any], codec: Any) -> int:
    """Bytes of one clip in the cache: frames, drawn actions, two latents every other frame."""
    from .world_model import drawn_size

    height, width = dataset.image_size
    length, stride = dataset.dataset.clip_length, VideoCodec.spatial_stride
    kind = denoiser["action_frames"] if dataset.draws else "none"
    drawn = drawn_size(kind, dataset.image_size, denoiser["action_frame_cells"]) or (0, 0)
    latent = VideoCodec(codec).latent_channels * (height // stride) * (width // stride)
    return 3 * (length + 1) * (height * width + drawn[0] * drawn[1]) + 2 * 2 * (length // 2 + 1) * latent


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as text for the terminal."""
    machine, run, gigabyte = plan["machine"], plan["run"], 1e9
    lines = [
        f"{'data set':24}{'clips':>12}{'share':>8}{'passes':>8}{'pixels':>10}{'actions':>9}{'tokens':>8}"
        f"{'TFLOP/chunk':>13}{'codec':>8}"
    ]
    for row in plan["datasets"]:
        size = "x".join(map(str, row["image_size"]))
        lines.append(
            f"{row['name'][:23]:24}{row['clips']:>12,}{row['share']:>8.1%}{row['passes']:>8.2f}{size:>10}"
            f"{row['action_frames']:>9}{row['tokens']:>8}{row['flops_denoiser'] / 1e12:>13.4g}"
            f"{row['flops_codec'] / 1e12:>8.3g}"
        )
    lines += [
        "",
        f"{run['learned_parameters']:,} of {run['parameters']:,} parameters learn. {run['epochs']:g} epochs: "
        f"{run['steps']:,} steps of {run['chunks_a_step']:,} chunks, {run['flops'] / 1e18:.4g} EFLOP, and "
        f"{run['flops_once'] / 1e18:.3g} EFLOP once to encode; {plan['disk'] / 1e9:,.1f} GB of cache.",
        "",
        f"{'GB on each GPU':28}{'ddp':>10}{'fsdp2':>10}",
    ]
    ways = plan["memory"]
    for name in ways["ddp"]:
        lines.append(f"{name:28}" + "".join(f"{ways[way][name] / gigabyte:>10.2f}" for way in ("ddp", "fsdp2")))
    fits = {way: ways[way]["total"] / gigabyte <= 0.9 * machine["memory_gb"] for way in ways}
    lines += [
        f"{machine['gpu']}: {machine['memory_gb']} GB each; with a tenth left for the allocator and communication, "
        + "; ".join(f"{way} {'fits' if fit else 'does not fit'}" for way, fit in fits.items())
        + ".",
        "",
        f"{plan['hours']['training']:,.4g} hours of training and {plan['hours']['encoding']:,.3g} of encoding on "
        f"{machine['gpus']} {machine['gpu']} at {machine['mfu']:.0%} of {machine['peak_tflops']:g} TFLOP/s.",
    ]
    return "\n".join(lines)
