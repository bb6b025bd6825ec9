"""What a training step costs, counted on the network itself without running it.

The denoiser is built with one and with two blocks on tensors that have shapes and types but no memory: on "meta" torch
counts the operations of a forward and backward pass; on fake tensors, on which autocast acts, autograd says what it
keeps. Both are linear in the number of
blocks, and what is kept is linear in the batch, so that two points give the whole network at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..world_model.codec import VideoCodec
from ..world_model.transformer import ProphetTransformer
from .objective import ChunkDenoiser

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bfloat16 matrix products a second, in units of 1e12, by a part of the device's name (vendors' data sheets)."""
MEMORY_GB = {"H200": 141, "H100": 80, "A100": 80, "L40S": 48, "RTX 4090": 24}
"""Memory of the same devices, in units of 1e9 bytes; the A100 also exists with half of it."""


def count_flops(call: Callable[[], object]) -> float:
    """Floating-point operations of ``call``: matrix products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of ``call``, parameters among them."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    size = sum(storage.nbytes() for storage in kept.values())
    del result
    return size


@dataclass(frozen=True)
class StepShape:
    """One micro-batch, as the denoiser sees it.

    Attributes:
        denoiser: keyword arguments of :class:`ProphetTransformer`.
        image_size: (height, width) in pixels.
        history_frames: T_h.
        draws: whether action frames are given.
        bfloat16: whether autocast is on.
        checkpointing: whether activations are computed twice.
    """

    denoiser: Mapping[str, Any]
    image_size: tuple[int, int]
    history_frames: int = 60
    draws: bool = True
    bfloat16: bool = True
    checkpointing: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Latent height and width."""
        height, width = self.image_size
        return height // VideoCodec.spatial_stride, width // VideoCodec.spatial_stride

    def tokens(self, latent_frames: int) -> int:
        """Tokens of a chunk."""
        patch = int(self.denoiser["patch_size"][1])
        return latent_frames * (self.grid[0] // patch) * (self.grid[1] // patch)


def step_flops(shape: StepShape, latent_frames: int) -> tuple[float, float]:
    """Operations of one sample of ``latent_frames`` frames: of the forward pass, and of a training step in all."""
    forward, whole = [], []
    for layers in (1, 2):
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
            loss = _loss_of(shape, layers, 1, latent_frames, shape.checkpointing)
            outputs: list[Tensor] = []

            def forward_pass(loss: Callable[[], Tensor] = loss, outputs: list[Tensor] = outputs) -> None:
                outputs.append(loss())

            forward.append(count_flops(forward_pass))
            whole.append(forward[-1] + count_flops(outputs[0].backward))
    return _at(forward, shape), _at(whole, shape)


def expected_step_flops(shape: StepShape, full_length: float) -> float:
    """Mean operations of one sample of a training step, over the chunk lengths that are drawn.

    Args:
        shape: the micro-batch.
        full_length: share of full chunks; the others have 1 to ``chunk_length`` commands, equally often.
    """
    chunk, stride = int(shape.denoiser["chunk_length"]), VideoCodec.temporal_stride
    frames = [1 + -(-length // stride) for length in range(1, chunk + 1)]
    if full_length == 1.0:
        return step_flops(shape, frames[-1])[1]
    # Attention makes it a polynomial of degree two in the number of latent frames: three points give it.
    points = sorted({frames[0], (frames[0] + frames[-1]) // 2, frames[-1]})
    costs = [step_flops(shape, point)[1] for point in points]
    curve = np.polynomial.Polynomial.fit(points, costs, len(points) - 1)
    return float(full_length * curve(frames[-1]) + (1.0 - full_length) * np.mean(curve(np.array(frames))))


def activation_bytes(shape: StepShape, latent_frames: int) -> tuple[float, float]:
    """Bytes that one sample of ``latent_frames`` frames keeps: through the forward pass, and within one block alone."""
    table = {}
    for checkpointing in {shape.checkpointing, False}:
        for layers in (1, 2):
            sizes = []
            for batch in (1, 2):
                with FakeTensorMode():  # slower than "meta", and autocast acts on it
                    sizes.append(saved_bytes(_loss_of(shape, layers, batch, latent_frames, checkpointing)))
            table[checkpointing, layers] = float(sizes[1] - sizes[0])  # weights and tables are the same in both
    kept = _at([table[shape.checkpointing, layers] for layers in (1, 2)], shape)
    return kept, table[False, 2] - table[False, 1]


def encoding_flops(vae_class: Any, vae_config: Mapping[str, Any], frames: int, image_size: tuple[int, int]) -> float:
    """Operations that encode one clip of ``frames`` frames (1 + 4n)."""
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        codec = VideoCodec(vae_class.from_config(dict(vae_config)))
        clip = torch.zeros(1, frames, *image_size, 3, dtype=torch.uint8)
        return count_flops(lambda: codec.encode(clip))


def _at(points: list[float], shape: StepShape) -> float:
    """The value for all blocks, given those for one and two."""
    return points[0] + (int(shape.denoiser["num_layers"]) - 1) * (points[1] - points[0])


def _loss_of(
    shape: StepShape, layers: int, batch: int, latent_frames: int, checkpointing: bool
) -> Callable[[], Tensor]:
    """A micro-batch of zeros through a network of ``layers`` blocks, to the loss; as ``mean_velocity_error`` does."""
    transformer = ProphetTransformer(**{**shape.denoiser, "num_layers": layers, "memory_gate": 1.0})
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    denoiser = ChunkDenoiser(transformer)
    config = transformer.config
    z, (h, w), stride = config.latent_channels, shape.grid, VideoCodec.temporal_stride
    inputs = torch.zeros(batch, z, latent_frames, h, w)
    drawn = None
    if shape.draws and config.action_frames == "pooled":
        drawn = inputs
    elif shape.draws and config.action_frames == "spatial":
        cells = config.action_frame_cells
        drawn = torch.zeros(batch, 3, 1 + stride * (latent_frames - 1), cells * h, cells * w)
    given = (
        torch.zeros(batch, config.chunk_length, config.num_effectors, 7),
        drawn,
        torch.zeros(batch, z, shape.history_frames // stride, h, w),
        inputs,
        torch.zeros(batch, 1, latent_frames, h, w),
        torch.zeros(batch, latent_frames),
    )

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if shape.bfloat16 else nullcontext():
            velocity = denoiser(*given)
        return (velocity[:, :, 1:].float() - inputs[:, :, 1:]).square().mean()

    return loss
