"""The success network: a few frames and an instruction in, one logit out.

Success on a table is a matter of pixels (is the block over the plate, has the gripper let go), so the first layers
keep half resolution, coordinates are input channels, and the head reads positions (spatial soft-argmax) beside
presence (average pool). The instruction enters early, by feature-wise modulation (FiLM) of the second layer on: which
colour matters decides which filters matter. Group norm: the answer for a rollout does not depend on its batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SuccessNetwork", "build_vocabulary", "encode_instruction", "frame_indices", "split_words"]


def split_words(instruction: str) -> list[str]:
    """Returns the lower-case words of an instruction, without punctuation."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


def build_vocabulary(instructions: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted words of all instructions; word ids are positions + 1, as 0 is padding."""
    return tuple(sorted({word for instruction in instructions for word in split_words(instruction)}))


def encode_instruction(instruction: str, vocabulary: Sequence[str], max_words: int) -> tuple[list[int], str]:
    """Turns an instruction into word ids, padded with 0.

    Returns:
        (ids of length ``max_words``, "") or ([], why not) for an unknown word or too many words.
    """
    words = split_words(instruction)
    unknown = sorted(set(words) - set(vocabulary))
    if unknown:
        return [], f"unknown words {unknown} in instruction {instruction!r}; known: {list(vocabulary)}"
    if not 1 <= len(words) <= max_words:
        return [], f"instruction of {len(words)} words, expected 1 to {max_words}: {instruction!r}"
    ids = [vocabulary.index(word) + 1 for word in words]
    return ids + [0] * (max_words - len(ids)), ""


def frame_indices(length: int, late_frames: Sequence[int]) -> list[int]:
    """Returns which of ``length`` frames the network sees: the first, then the late ones, oldest first.

    Args:
        length: number of frames T of the rollout.
        late_frames: distances from the last frame; where a rollout is too short, its first frame stands in.
    """
    return [0, *(max(length - 1 - distance, 0) for distance in sorted(late_frames, reverse=True))]


class _Block(nn.Module):
    """Convolution, group norm, FiLM, SiLU; residual where the shape allows."""

    def __init__(self, in_channels: int, out_channels: int, text_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, out_channels)
        self.film = nn.Linear(text_dim, 2 * out_channels)
        nn.init.zeros_(self.film.bias)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
        out = F.silu(self.norm(self.conv(x)) * (1 + scale) + shift)
        return x + out if self.residual else out


class SuccessNetwork(nn.Module):
    """Convolutions over stacked frames, modulated by the instruction.

    Args:
        num_frames: frames per rollout F, the first and the late ones (see :func:`frame_indices`).
        vocabulary_size: number of known words V.
        max_words: longest instruction.
        width: channels at quarter resolution.
    """

    def __init__(self, num_frames: int, vocabulary_size: int, max_words: int, width: int) -> None:
        super().__init__()
        text_dim, word_dim = 64, 16
        self.words = nn.Embedding(vocabulary_size + 1, word_dim, padding_idx=0)
        self.text = nn.Sequential(
            nn.Linear(max_words * word_dim, text_dim), nn.SiLU(), nn.Linear(text_dim, text_dim), nn.SiLU()
        )
        self.stem = nn.Conv2d(3 * num_frames + 2, width // 2, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            [
                _Block(width // 2, width // 2, text_dim),
                _Block(width // 2, width, text_dim, stride=2),
                _Block(width, width, text_dim),
                _Block(width, width, text_dim),
            ]
        )
        self.keypoints = nn.Conv2d(width, width, 1)
        self.deep = nn.ModuleList(
            [_Block(width, 2 * width, text_dim, stride=2), _Block(2 * width, 2 * width, text_dim)]
        )
        self.head = nn.Sequential(nn.Linear(2 * width + 2 * 2 * width + text_dim, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, frames: Tensor, words: Tensor) -> Tensor:
        """Returns logits (B,) of success.

        Args:
            frames: (B, F, 3, H, W) float in [0, 1].
            words: (B, max_words) int64 word ids, 0 for padding.
        """
        batch, _, _, height, width = frames.shape
        text = self.text(self.words(words).flatten(1))
        y = torch.linspace(-1, 1, height, dtype=frames.dtype, device=frames.device)
        x = torch.linspace(-1, 1, width, dtype=frames.dtype, device=frames.device)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, 2, height, width)
        features = F.silu(self.stem(torch.cat([frames.flatten(1, 2) * 2 - 1, grid], dim=1)))
        for block in self.blocks:
            features = block(features, text)
        positions = _soft_argmax(self.keypoints(features))
        for block in self.deep:
            features = block(features, text)
        pooled = [features.mean(dim=(2, 3)), features.amax(dim=(2, 3))]
        return self.head(torch.cat([positions, *pooled, text], dim=1)).squeeze(1)


def _soft_argmax(maps: Tensor) -> Tensor:
    """Expected (y, x) of each map as an attention over the image: (B, K, H, W) -> (B, 2K), in [-1, 1]."""
    height, width = maps.shape[-2:]
    weights = maps.flatten(2).softmax(dim=-1).unflatten(2, (height, width))
    y = torch.linspace(-1, 1, height, dtype=maps.dtype, device=maps.device)
    x = torch.linspace(-1, 1, width, dtype=maps.dtype, device=maps.device)
    return torch.cat([weights.sum(3) @ y, weights.sum(2) @ x], dim=1)
