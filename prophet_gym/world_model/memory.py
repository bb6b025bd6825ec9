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
        levels: (newest, oldest, t, h, w) each: latents of age ``newest`` up to, not including, ``oldest`` (0 is the
            newest latent frame) are pooled with strides (t, h, w); one projection a level. Without levels nothing is
            remembered: the ablation of the paper's Tables 3 and 4.
        dim: channel width D of the denoiser.
        num_heads: attention heads; D is split among them.
    """

    def __init__(self, latent_channels: int, levels: tuple[tuple[int, ...], ...], dim: int, num_heads: int) -> None:
        super().__init__()
        self.levels, self.dim, self.num_heads = tuple(tuple(level) for level in levels), dim, num_heads
        self.projections = nn.ModuleList(nn.Linear(latent_channels, dim) for _ in self.levels)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def check(self, latent_frames: int, grid: tuple[int, int]) -> None:
        """Raise ValueError where a level asks for older latents than a history holds, or pools more than a frame.

        Args:
            latent_frames: length of the history.
            grid: latent height and width.
        """
        oldest = max((level[1] for level in self.levels), default=0)
        if oldest > latent_frames:
            raise ValueError(
                f"memory_levels reach back {oldest} latent frames, the history holds {latent_frames}; expected no "
                "more than it holds: lengthen history_frames or change memory_levels"
            )
        largest = tuple(max((level[axis] for level in self.levels), default=1) for axis in (3, 4))
        if largest[0] > grid[0] or largest[1] > grid[1]:
            raise ValueError(
                f"memory_levels pool {largest[0]}x{largest[1]} latent positions, a frame has {grid[0]}x{grid[1]}; "
                "expected no more than a frame: use larger images or change memory_levels"
            )

    def tokens(self, history: Tensor) -> Tensor:
        """Pool and project a history (B, z, T, h, w), oldest first, to tokens M (B, L, D).

        A token carries a parameter-free encoding of its age and place, in units of latent positions.
        """
        groups, length = [history.new_zeros(len(history), 0, self.dim)], history.shape[2]
        for (newest, oldest, *stride), project in zip(self.levels, self.projections, strict=True):
            part = history[:, :, length - oldest : length - newest]
            # Windows that reach over the edge (240 pixels are 30 latents) average what they hold: nothing is dropped.
            pooled = F.avg_pool3d(part.float(), stride, stride, ceil_mode=True, count_include_pad=False)
            pooled = pooled.to(history.dtype)
            tokens = project(pooled.permute(0, 2, 3, 4, 1))
            axes = [
                (torch.arange(n, device=history.device) + 0.5) * s
                for n, s in zip(tokens.shape[1:4], stride, strict=True)
            ]
            age = oldest - axes[0]
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
