"""Mean colours of places, read off latents: what tells how much of a thing is somewhere, however its place is coded.

Latents of a block differ as much between places a few pixels apart as from those of no block at all, so distances of
latents say nothing about whether there is one. The mean colour of the pixels behind a cell is nearly linear in its
latents, and a linear map costs nothing beside decoding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .clips import ClipArrays, LatentArrays

_GROUPS = 1024


def fit_latent_colours(clips: ClipArrays, latents: LatentArrays) -> Tensor:
    """Least-squares map from latents of a cell to the mean colour of its pixels, the same for every cell.

    Args:
        clips: frames (E, T, H, W, 3).
        latents: of their groups of four frames, of which 1,024 are drawn, always the same.

    Returns:
        (z, 3) float32, without the constant; colours in standard deviations of each channel.
    """
    rng = np.random.default_rng(0)
    episodes = rng.integers(len(clips), size=_GROUPS)
    index = rng.integers(2, latents.group.shape[1], size=_GROUPS)  # group[i] codes frames 2 i - 3 ... 2 i
    coded = torch.from_numpy(latents.group[episodes, index].astype(np.float64))
    colours = torch.stack(
        [
            F.adaptive_avg_pool2d(
                torch.from_numpy(clips.frames[e, 2 * i - 3 : 2 * i + 1].mean(axis=0)).permute(2, 0, 1), coded.shape[-2:]
            )
            for e, i in zip(episodes, index, strict=True)
        ]
    )
    inputs, targets = (values.permute(0, 2, 3, 1).flatten(0, 2) for values in (coded, colours))
    targets = (targets - targets.mean(dim=0)) / targets.std(dim=0).clamp(min=1.0)
    return torch.linalg.lstsq(inputs - inputs.mean(dim=0), targets).solution.float()
