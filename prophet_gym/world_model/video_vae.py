"""The small video codec of the ``tiny`` Prophet, with the latent interface of the Wan VAE (time x4, space x8).

Departure from Wan: time is folded into channels. A group of four frames becomes twelve colour planes and is coded by
2-D convolutions, so the latents of a video do not depend on where a clip was cut: history built chunk by chunk equals
history built in one go. The first frame of a clip is coded as a group of four copies. Decoding is causal over one
group: a latent frame is decoded beside its predecessor, which carries what does not move.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; the second starts at zero, which spares a normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class FoldedVideoVAE(ModelMixin, ConfigMixin):
    """Video autoencoder: (B, 3, 1 + 4n, H, W) in [-1, 1] to latents (B, z, 1 + n, H / 8, W / 8) and back.

    Args:
        latent_channels: z, channels of a latent frame.
        channels: width of the convolutions.
        encoder_blocks: residual blocks at 1/4 and at 1/8 of the resolution in the encoder.
        decoder_blocks: residual blocks at 1/8 and at 1/4 of the resolution in the decoder.
        latents_mean: per-channel mean of the raw latents; ``normalise`` subtracts it.
        latents_std: per-channel standard deviation of the raw latents.
    """

    temporal_stride = 4

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        channels: int = 96,
        encoder_blocks: tuple[int, int] = (2, 1),
        decoder_blocks: tuple[int, int] = (1, 3),
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        c, planes = channels, 3 * self.temporal_stride
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(16 * planes, c, 3, padding=1),
            *[ResBlock(c) for _ in range(encoder_blocks[0])],
            nn.Conv2d(c, c, 4, stride=2, padding=1),
            *[ResBlock(c) for _ in range(encoder_blocks[1])],
            nn.SiLU(),
            nn.Conv2d(c, 2 * latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * latent_channels, c, 3, padding=1),
            *[ResBlock(c) for _ in range(decoder_blocks[0])],
            nn.Conv2d(c, 4 * c, 1),
            nn.PixelShuffle(2),
            *[ResBlock(c) for _ in range(decoder_blocks[1])],
            nn.SiLU(),
            nn.Conv2d(c, 4 * 48, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(48, 4 * planes, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode_groups(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Code groups of four frames (B, 3, 4, H, W) in [-1, 1]; return mean and log-variance (B, z, H / 8, W / 8)."""
        planes = groups.transpose(1, 2).flatten(1, 2)
        mean, log_variance = self.encoder(planes).chunk(2, dim=1)
        return mean, log_variance.clamp(-20.0, 5.0)

    def decode_groups(self, previous: Tensor, latents: Tensor) -> Tensor:
        """Decode raw latents (B, z, h, w) beside their predecessors to frames (B, 3, 4, H, W)."""
        planes = self.decoder(torch.cat([previous, latents], dim=1))
        return planes.unflatten(1, (self.temporal_stride, 3)).transpose(1, 2)

    def normalise(self, latents: Tensor) -> Tensor:
        """Bring raw latents (B, z, ...) to zero mean and unit variance per channel."""
        mean, std = self._statistics(latents)
        return ((latents.float() - mean) / std).to(latents.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        mean, std = self._statistics(latents)
        return (latents.float() * std + mean).to(latents.dtype)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1) + (1,) * (latents.ndim - 2)
        z = self.config.latent_channels
        mean = torch.tensor(self.config.latents_mean or [0.0] * z, device=latents.device).view(shape)
        std = torch.tensor(self.config.latents_std or [1.0] * z, device=latents.device).view(shape)
        return mean, std

    def encode(self, video: Tensor) -> Tensor:
        """Code a video (B, 3, 1 + 4n, H, W) in [-1, 1] to normalised latents (B, z, 1 + n, H / 8, W / 8)."""
        first, rest = video[:, :, :1], video[:, :, 1:]
        groups = torch.cat([first.expand(-1, -1, self.temporal_stride, -1, -1), rest], dim=2)
        groups = groups.unflatten(2, (-1, self.temporal_stride)).movedim(2, 1)
        mean, _ = self.encode_groups(groups.flatten(0, 1))
        return self.normalise(mean.unflatten(0, groups.shape[:2]).transpose(1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, z, 1 + n, h, w) to the 4n frames after the first, (B, 3, 4n, H, W).

        The first latent frame is context only: a rollout already has the frame it stands for.
        """
        raw = self.denormalise(latents).transpose(1, 2)
        frames = self.decode_groups(raw[:, :-1].flatten(0, 1), raw[:, 1:].flatten(0, 1))
        return frames.unflatten(0, (raw.shape[0], -1)).transpose(1, 2).flatten(2, 3)
