"""How actions reach the denoiser (paper 3.2.3): the scalar stream, pooled action frames, and spatial action frames.

The two streams of the paper are global: one vector a chunk (scalar) or a latent frame (pooled action frames), added to
the timestep embedding. ``SpatialActionFrames`` is our extension: the drawn action joins the noisy latents position by
position. Every output layer starts at zero, so that a pretrained backbone is unchanged at initialisation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal encoding (..., dim) of real-valued positions (...); the angular frequencies run from 1 to 1e-4."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device) / half)
    angles = positions[..., None].float() * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim - 2 * half))


def zero_init(linear: nn.Linear) -> nn.Linear:
    """Set weight and bias to zero and return the layer."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ScalarActionStream(nn.Module):
    """Chunk of commands to one global embedding, added to every latent frame (f_sa of paper 3.2.3).

    Commands arrive canonical (metres, radians, open ratio); translation and rotation are multiplied by ``motion_scale``
    to be of order one. A padded command carries the open ratio -1, which tells the model where the chunk ends.
    """

    motion_scale = 20.0

    def __init__(self, chunk_length: int, num_effectors: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        inputs = chunk_length * num_effectors * 7
        self.to_time = nn.Sequential(nn.Linear(inputs, hidden_dim), nn.SiLU(), zero_init(nn.Linear(hidden_dim, dim)))
        self.to_modulation = nn.Sequential(
            nn.Linear(inputs, hidden_dim), nn.SiLU(), zero_init(nn.Linear(hidden_dim, 3 * dim))
        )

    def forward(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Map commands (B, C, N, 7) to (B, 1, D) for the time embedding and (B, 1, 3D) for the AdaLN-LoRA vector."""
        scale = actions.new_tensor([self.motion_scale] * 6 + [1.0])
        flat = (actions * scale).flatten(1)
        return self.to_time(flat)[:, None], self.to_modulation(flat)[:, None]


class PooledActionFrames(nn.Module):
    """Latents of the action frames to one embedding a latent frame (Eqs 10 and 11)."""

    def __init__(self, latent_channels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.project = nn.Conv3d(latent_channels, dim, 1)
        self.depthwise = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1), groups=dim)
        self.pointwise = nn.Conv3d(dim, dim, 1)
        self.to_time = zero_init(nn.Linear(dim, dim))
        self.to_modulation = zero_init(nn.Linear(dim, 3 * dim))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Map action-frame latents (B, z, T, h, w) to (B, T, D) and (B, T, 3D)."""
        pooled = self.pointwise(self.depthwise(self.project(latents))).mean(dim=(3, 4)).transpose(1, 2)
        time = sinusoidal_embedding(torch.arange(pooled.shape[1], device=pooled.device), self.dim)
        hidden = F.silu(pooled + time.to(pooled))
        return self.to_time(hidden), self.to_modulation(hidden)


class SpatialActionFrames(nn.Module):
    """Action frames as extra input channels of the denoiser, aligned with the latents (our extension).

    Args:
        cells: each latent position sees ``cells`` x ``cells`` averaged pixels of every action frame.
        temporal_stride: action frames of one latent frame.
        patch_size: (1, p, p) of the denoiser.
        dim: channel width D of the denoiser.
    """

    def __init__(self, cells: int, temporal_stride: int, patch_size: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.cells, self.temporal_stride, self.patch = cells, temporal_stride, patch_size[1]
        self.proj = zero_init(nn.Linear(3 * temporal_stride * (cells * self.patch) ** 2, dim))

    def forward(self, frames: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map action frames (B, 3, 1 + 4n, H, W) in [-1, 1] to tokens (B, 1 + n, h / p, w / p, D).

        Args:
            frames: the start pose drawn once, then one frame a command.
            grid: latent height h and width w.
        """
        b, stride = frames.shape[0], self.temporal_stride
        frames = torch.cat([frames[:, :, :1].expand(-1, -1, stride, -1, -1), frames[:, :, 1:]], dim=2)
        size = (grid[0] * self.cells, grid[1] * self.cells)
        small = frames.transpose(1, 2).flatten(0, 1)
        if small.shape[2] % size[0] or small.shape[3] % size[1]:
            raise ValueError(f"action frames of {tuple(small.shape[2:])} pixels; expected a multiple of {size}")
        if small.shape[2:] != size:
            small = F.avg_pool2d(small, (small.shape[2] // size[0], small.shape[3] // size[1]))
        cells = F.pixel_unshuffle(small, self.cells * self.patch)
        tokens = cells.unflatten(0, (b, -1, stride)).permute(0, 1, 4, 5, 2, 3).flatten(4)
        return self.proj(tokens)
