"""What judge and policy share of their vision: coordinates as channels, instructed convolutions, positions of features.

What matters on a table is where things are, to the pixel, and which of them the instruction names. Group norm, so that
the result for one image does not depend on its batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FiLMBlock", "coordinates", "soft_argmax"]


class FiLMBlock(nn.Module):
    """Convolution, group norm, modulation by the instruction (FiLM), SiLU; residual where the shape allows.

    Args:
        in_channels: of the input.
        out_channels: of the result, a multiple of 4.
        text_dim: length of the instruction's features.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, text_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, out_channels)
        self.film = nn.Linear(text_dim, 2 * out_channels)
        nn.init.zeros_(self.film.bias)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) and (B, text_dim) to (B, out_channels, H / stride, W / stride)."""
        scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
        out = F.silu(self.norm(self.conv(x)) * (1 + scale) + shift)
        return x + out if self.residual else out


def coordinates(image: Tensor) -> Tensor:
    """Returns (B, 2, H, W): y and x of every pixel of an image (B, C, H, W), from -1 to 1."""
    y, x = _axes(image)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(len(image), 2, *image.shape[-2:])


def soft_argmax(maps: Tensor) -> Tensor:
    """Returns the expected y of every map, then the expected x, under its softmax: (B, C, H, W) to (B, 2C), -1 to 1."""
    y, x = _axes(maps)
    weights = maps.flatten(2).softmax(dim=-1).unflatten(2, maps.shape[-2:])
    return torch.cat([weights.sum(3) @ y, weights.sum(2) @ x], dim=1)


def _axes(image: Tensor) -> list[Tensor]:
    return [torch.linspace(-1, 1, n, dtype=image.dtype, device=image.device) for n in image.shape[-2:]]
