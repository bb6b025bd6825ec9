"""The success network: a few frames and an instruction in, one logit out.

Success on a table is a matter of pixels (is the block over the plate, has the gripper let go), so the first layers
keep half resolution, coordinates are input channels, and the head reads positions (spatial soft-argmax) beside
presence (average pool). The instruction enters early, by feature-wise modulation (FiLM) of the second layer on: which
colour matters decides which filters matter. Group norm: the answer for a rollout does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prophet_gym.vision import FiLMBlock, coordinates, soft_argmax

__all__ = ["SuccessNetwork", "frame_indices"]


def frame_indices(length: int, late_frames: Sequence[int]) -> list[int]:
    """Returns which of ``length`` frames the network sees: the first, then the late ones, oldest first.

    Args:
        length: number of frames T of the rollout.
        late_frames: distances from the last frame; where a rollout is too short, its first frame stands in.
    """
    return [0, *(max(length - 1 - distance, 0) for distance in sorted(late_frames, reverse=True))]


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
                FiLMBlock(width // 2, width // 2, text_dim),
                FiLMBlock(width // 2, width, text_dim, stride=2),
                FiLMBlock(width, width, text_dim),
                FiLMBlock(width, width, text_dim),
            ]
        )
        self.keypoints = nn.Conv2d(width, width, 1)
        self.deep = nn.ModuleList(
            [FiLMBlock(width, 2 * width, text_dim, stride=2), FiLMBlock(2 * width, 2 * width, text_dim)]
        )
        self.head = nn.Sequential(nn.Linear(2 * width + 2 * 2 * width + text_dim, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, frames: Tensor, words: Tensor) -> Tensor:
        """Returns logits (B,) of success.

        Args:
            frames: (B, F, 3, H, W) float in [0, 1].
            words: (B, max_words) int64 word ids, 0 for padding.
        """
        text = self.text(self.words(words).flatten(1))
        features = F.silu(self.stem(torch.cat([frames.flatten(1, 2) * 2 - 1, coordinates(frames[:, 0])], dim=1)))
        for block in self.blocks:
            features = block(features, text)
        positions = soft_argmax(self.keypoints(features))
        for block in self.deep:
            features = block(features, text)
        pooled = [features.mean(dim=(2, 3)), features.amax(dim=(2, 3))]
        return self.head(torch.cat([positions, *pooled, text], dim=1)).squeeze(1)
