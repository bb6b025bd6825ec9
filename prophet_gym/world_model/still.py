"""What stands still keeps its pixels: imagined frames laid over the chunk's start frame where something changed.

A small codec redraws the whole picture with its own error, so that the scene jumps from the start frame to the first
imagined one and flickers after it; with few and small motions that is more than what moved. Where a decoded frame
equals the decoded start frame but for a few grey levels, the true start frame is shown instead. The paper does not do
this. Change that is smaller within one chunk, a slow shadow for example, is not shown either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FULLY_CHANGED = 2.5
"""Change, in units of the threshold, from which the imagined pixel is shown alone."""


def keep_still(frames: Tensor, start: Tensor, decoded_start: Tensor, threshold: float) -> Tensor:
    """Lay decoded frames over the start frame.

    Args:
        frames: decoded (B, T, H, W, 3) uint8.
        start: the start frame as it was given, (B, H, W, 3) uint8.
        decoded_start: the start frame as the codec draws it where nothing moves, (B, H, W, 3) uint8.
        threshold: change in grey levels (largest channel, mean over 3 x 3 pixels) up to which a pixel is still.

    Returns:
        (B, T, H, W, 3) uint8; from `threshold` to `FULLY_CHANGED` times as much, a mixture of both.
    """
    difference = torch.maximum(frames, decoded_start[:, None]).sub_(torch.minimum(frames, decoded_start[:, None]))
    red, green, blue = difference.unbind(-1)
    largest = torch.maximum(torch.maximum(red, green), blue).float()
    change = F.avg_pool2d(largest, 3, stride=1, padding=1, count_include_pad=False)
    weight = change.div_(threshold).sub_(1).div_(FULLY_CHANGED - 1).clamp_(0, 1)[..., None]
    still = start[:, None].float()
    return (frames - still).mul_(weight).add_(still).round_().to(torch.uint8)
