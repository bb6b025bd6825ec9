"""Frames in, latents out: one interface over the small folded VAE and diffusers' Wan VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .video_vae import FoldedVideoVAE


def to_video(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames (B, T, H, W, 3) uint8 to video (B, 3, T, H, W) in [-1, 1]."""
    return (frames.to(torch.float32) / 127.5 - 1.0).to(dtype).permute(0, 4, 1, 2, 3)


def to_frames(video: Tensor) -> Tensor:
    """Video (B, 3, T, H, W) in [-1, 1] to frames (B, T, H, W, 3) uint8, rounded and clamped."""
    grey = ((video.float() + 1.0) * 127.5).round().clamp(0.0, 255.0)
    return grey.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def placement(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and number format of a network's first parameter.

    The properties of diffusers search all modules for hooks of offloading, each time: milliseconds of every chunk.
    """
    first = next(network.parameters())
    return first.device, first.dtype


class VideoCodec:
    """Encodes and decodes clips of 1 + 4n frames; latents are normalised to about zero mean and unit variance.

    Args:
        vae: a :class:`FoldedVideoVAE` or a ``diffusers.AutoencoderKLWan``.
    """

    temporal_stride = 4
    spatial_stride = 8

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.folded = isinstance(vae, FoldedVideoVAE)
        self.latent_channels = vae.config.latent_channels if self.folded else vae.config.z_dim
        if not self.folded:
            spatial = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
            strides = 2 ** sum(vae.config.temperal_downsample), spatial
            if strides != (self.temporal_stride, self.spatial_stride):
                raise ValueError(
                    f"a codec with strides {strides} in time and space; expected "
                    f"{(self.temporal_stride, self.spatial_stride)}, as of the Wan 2.1 VAE"
                )

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames (B, 1 + 4n, H, W, 3) uint8 to latents (B, z, 1 + n, H / 8, W / 8); deterministic (the mean)."""
        device, dtype = placement(self.vae)
        video = to_video(frames.to(device), dtype)
        if self.folded:
            return self.vae.encode(video)
        raw = self.vae.encode(video).latent_dist.mode()
        mean, std = self._wan_statistics(raw)
        return ((raw.float() - mean) / std).to(raw.dtype)

    def standing(self, frames: Tensor, latents: Tensor) -> Tensor:
        """Latents (B, z, 2, h, w) of frames (B, H, W, 3) uint8 that stand still, given their own (B, z, 1, h, w)."""
        if self.folded:  # a frame alone is coded as four that stand still
            return latents.expand(-1, -1, 2, -1, -1)
        return self.encode(frames[:, None].expand(-1, 1 + self.temporal_stride, -1, -1, -1))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, z, 1 + n, h, w) to the 4n frames after the first, (B, 4n, H, W, 3) uint8."""
        latents = latents.to(placement(self.vae)[1])
        if self.folded:
            return to_frames(self.vae.decode(latents))
        mean, std = self._wan_statistics(latents)
        raw = (latents.float() * std + mean).to(latents.dtype)
        return to_frames(self.vae.decode(raw).sample[:, :, 1:])

    def _wan_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config, device = self.vae.config, latents.device
        mean, std = (torch.tensor(values, device=device) for values in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
