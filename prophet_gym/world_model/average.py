"""The mean of the denoisers of several checkpoints that were fine-tuned from one another ("model soup").

Fine-tuned from common weights, denoisers often lie in one basin, where their mean does as well as the best of them or
better (Wortsman et al. 2022), and costs no more than one to run. Whether it does is to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .prophet import ProphetWorldModel


def average_worlds(checkpoints: Sequence[Path], weights: Sequence[float] | None = None) -> ProphetWorldModel:
    """Load checkpoints and average their denoisers, one at a time; all else is the first one's, but ``trained_on``.

    Args:
        checkpoints: folders written by :meth:`ProphetWorldModel.save_pretrained`, of one architecture and with codecs
            that encode alike (their decoders may differ).
        weights: of each checkpoint, above 0, relative to one another; all the same by default.

    Returns:
        World model, float32 on the CPU. Its ``trained_on`` says what each of the checkpoints was trained on.

    Raises:
        ValueError: fewer than two checkpoints, bad weights, or checkpoints that differ in more than weights.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} checkpoint(s) to average; expected at least 2")
    weights = [1.0] * len(checkpoints) if weights is None else list(weights)
    if len(weights) != len(checkpoints):
        raise ValueError(f"{len(weights)} weights for {len(checkpoints)} checkpoints; give one each, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights {weights}: expected numbers above 0; leave a checkpoint out to give it none")
    shares = [weight / sum(weights) for weight in weights]
    first = ProphetWorldModel.from_pretrained(checkpoints[0])
    total = {name: shares[0] * value for name, value in first.transformer.state_dict().items()}
    trained_on = [first.config.trained_on]
    for checkpoint, share in zip(checkpoints[1:], shares[1:], strict=True):
        world = ProphetWorldModel.from_pretrained(checkpoint)
        _require_alike(first, world, checkpoints[0], checkpoint)
        for name, value in world.transformer.state_dict().items():
            total[name] += share * value
        trained_on.append(world.config.trained_on)
    first.transformer.load_state_dict(total)
    first.config = replace(first.config, trained_on="; ".join(dict.fromkeys(trained_on)))
    return first


def _require_alike(first: ProphetWorldModel, other: ProphetWorldModel, one: Path, two: Path) -> None:
    """Require one architecture, one meaning of actions and frames, and one latent space.

    Raises:
        ValueError: something differs.
    """
    for part, mine, theirs in (
        ("denoiser", dict(first.transformer.config), dict(other.transformer.config)),
        ("prophet.json", first.config.to_dict(), other.config.to_dict()),
    ):
        keys = {key for key in mine.keys() | theirs.keys() if not key.startswith("_")} - {"name", "trained_on"}
        differ = sorted(key for key in keys if mine.get(key) != theirs.get(key))
        if differ:
            raise ValueError(
                f"{two}: its {part} differs from that of {one} in {', '.join(differ)}; expected the same, as in a "
                "checkpoint that was fine-tuned from the other (--init)"
            )
    height, width = first.image_size
    frames = torch.randint(256, (1, 5, height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        apart = (first.codec.encode(frames) - other.codec.encode(frames)).abs().max()
    if apart > 1e-3:
        raise ValueError(
            f"{two}: its codec encodes otherwise than that of {one}, so their latents mean other things; train the "
            "denoisers with one codec (--vae)"
        )
