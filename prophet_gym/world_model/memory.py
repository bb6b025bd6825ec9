"""History-aware memory (paper 3.2.4): past latents, pooled at several strides, as extra keys and values of every block.

Computed once a chunk: the memory does not depend on the denoising step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import sinusoidal_embedding


class HistoryMemory(nn.Module):
    """Latent history to K_mem, V_mem, shared by all blocks.

    Args:
        latent_channels: channels z of a latent frame.
        strides: spatio-temporal pooling strides (t, h, w), one projection each.
        dim: channel width D of the denoiser.
        num_heads: attention heads; D is split among them.
    """

    def __init__(self, latent_channels: int, strides: tuple[tuple[int, int, int], ...], dim: int, num_heads: int):
        super().__init__()
        self.strides, self.dim, self.num_heads = tuple(tuple(s) for s in strides), dim, num_heads
        self.projections = nn.ModuleList(nn.Linear(latent_channels, dim) for _ in self.strides)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def tokens(self, history: Tensor) -> Tensor:
        """Pool and project a history (B, z, T, h, w), oldest first, to tokens M (B, L, D).

        A token carries a parameter-free encoding of its age and place, in units of latent positions.
        """
        groups = []
        for stride, project in zip(self.strides, self.projections, strict=True):
            pooled = F.avg_pool3d(history.float(), stride, stride).to(history.dtype)
            tokens = project(pooled.permute(0, 2, 3, 4, 1))
            axes = [
                (torch.arange(n, device=history.device) + 0.5) * s
                for n, s in zip(tokens.shape[1:4], stride, strict=True)
            ]
            age = history.shape[2] - axes[0]
            d = self.dim // 3
            where = torch.cat(
                [
                    sinusoidal_embedding(age, self.dim - 2 * d)[:, None, None].expand(*tokens.shape[1:4], -1),
                    sinusoidal_embedding(axes[1], d)[None, :, None].expand(*tokens.shape[1:4], -1),
                    sinusoidal_embedding(axes[2], d)[None, None].expand(*tokens.shape[1:4], -1),
                ],
                dim=-1,
            )
            groups.append((tokens + where.to(tokens)).flatten(1, 3))
        return torch.cat(groups, dim=1)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Return K_mem and V_mem, each (B, heads, L, D / heads); keys have unit root mean square, as in the blocks."""
        tokens = self.tokens(history)
        key = self.to_k(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        value = self.to_v(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return F.rms_norm(key, key.shape[-1:]), value
