"""Image augmentation for imitation: a batch at a time, on whatever device the images are.

Judges have their own (``prophet_gym.training.augment``), which also draws the faults of a world model's decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["augment_images"]


def augment_images(images: Tensor, generator: torch.Generator, *, shift: int, jitter: float) -> Tensor:
    """Returns shifted and recoloured copies, each image with its own draw.

    The shift is uniform in whole pixels, edges repeat. Pixels become ``gain * pixel + offset``: gain within 1 +- jitter
    for the image and within 1 +- jitter / 4 for each channel (instructions name colours), offset within +- 64 jitter
    grey levels.

    Args:
        images: (B, H, W, 3) uint8.
        generator: source of all randomness, on any device.
        shift: largest shift in pixels, along each axis; 0 for none. A shift moves what is seen against the state.
        jitter: strength of the change of colour, 0 for none.
    """

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, device=generator.device) - 1).to(images.device)

    batch, height, width, channels = images.shape
    # The same draws whatever the strength, so that runs that differ in it can be compared.
    moves = (uniform(batch, 2) * (shift + 0.5)).round().long().clamp(-shift, shift)
    gain = (1 + jitter * uniform(batch, 1, 1, 1)) * (1 + jitter / 4 * uniform(batch, 1, 1, channels))
    offset = 64 * jitter * uniform(batch, 1, 1, 1)
    rows, columns = (
        (torch.arange(size, device=images.device) + moves[:, axis, None]).clamp(0, size - 1)
        for axis, size in enumerate((height, width))
    )
    moved = images[torch.arange(batch, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]]
    return (moved * gain + offset).round().clamp(0, 255).to(torch.uint8)
