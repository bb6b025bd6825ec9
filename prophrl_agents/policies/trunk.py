"""The observation trunk of the small policy: image, state and instruction to one feature vector.

Grasping is a matter of pixels: the first blocks keep half resolution, coordinates are input channels, and the image
leaves as positions (spatial soft-argmax) beside a coarse map. The instruction modulates the filters (FiLM) and joins
the features: which colour matters decides what to look at. Group norm, so a row's features do not depend on its batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prophet_gym.vision import FiLMBlock, coordinates, soft_argmax

__all__ = ["ObservationTrunk"]

_TEXT, _WORD, _STATE, _MAP = 64, 16, 64, 16


class ObservationTrunk(nn.Module):
    """Convolutions, word embeddings and a state MLP.

    Args:
        image_size: height and width in pixels, a multiple of 8.
        state_dim: numbers in the state.
        vocabulary_size: known words; ids are 1 to this, 0 is padding.
        max_words: ids per instruction.
        width: channels at quarter resolution.
        feature_dim: length F of the result.
    """

    def __init__(
        self, image_size: int, state_dim: int, vocabulary_size: int, max_words: int, width: int, feature_dim: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size + 1, _WORD, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(max_words * _WORD, _TEXT), nn.SiLU(), nn.Linear(_TEXT, _TEXT), nn.SiLU())
        self.state = nn.Sequential(nn.Linear(state_dim, _STATE), nn.SiLU(), nn.Linear(_STATE, _STATE), nn.SiLU())
        self.stem = nn.Conv2d(5, width // 2, 5, stride=2, padding=2)
        self.near = nn.ModuleList(
            [
                FiLMBlock(width // 2, width // 2, _TEXT),
                FiLMBlock(width // 2, width, _TEXT, stride=2),
                FiLMBlock(width, width, _TEXT),
                FiLMBlock(width, width, _TEXT),
            ]
        )
        self.keypoints = nn.Conv2d(width, width, 1)
        self.far = nn.ModuleList([FiLMBlock(width, width, _TEXT, stride=2), FiLMBlock(width, width, _TEXT)])
        self.squeeze = nn.Conv2d(width, _MAP, 1)
        joined = 2 * width + _MAP * (image_size // 8) ** 2 + _STATE + _TEXT
        self.features = nn.Sequential(
            nn.Linear(joined, feature_dim),
            nn.LayerNorm(feature_dim),
            nn.SiLU(),
            nn.Linear(feature_dim, feature_dim),
            nn.SiLU(),
        )

    def forward(self, image: Tensor, state: Tensor, words: Tensor) -> Tensor:
        """Returns features (B, F).

        Args:
            image: (B, 3, H, W) float in [-1, 1].
            state: (B, P) normalised state.
            words: (B, max_words) int64 word ids.
        """
        text = self.text(self.words(words).flatten(1))
        h = F.silu(self.stem(torch.cat([image, coordinates(image)], dim=1)))
        for block in self.near:
            h = block(h, text)
        positions = soft_argmax(self.keypoints(h))
        for block in self.far:
            h = block(h, text)
        return self.features(torch.cat([positions, self.squeeze(h).flatten(1), self.state(state), text], dim=1))
