"""The mean of the denoisers of several checkpoints that were fine-tuned from one another ("model soup").

Fine-tuned from common weights, denoisers often lie in one basin, where their mean does as well as the best of them or
better (Wortsman et al. 2022), and costs no more than one to run. Whether it does is to be measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..averaging import shares_of, weighted_mean
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
    shares = shares_of(weights, len(checkpoints), "checkpoints")
    first = ProphetWorldModel.from_pretrained(checkpoints[0])
    trained_on = [first.config.trained_on]

    def states() -> Iterator[dict[str, Tensor]]:
        yield first.transformer.state_dict()
        for checkpoint in checkpoints[1:]:
            world = ProphetWorldModel.from_pretrained(checkpoint)
            _require_alike(first, world, checkpoints[0], checkpoint)
            trained_on.append(world.config.trained_on)
            yield world.transformer.state_dict()

    first.transformer.load_state_dict(weighted_mean(states(), shares))
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
