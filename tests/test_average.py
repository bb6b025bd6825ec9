"""The mean of checkpoints: of their weights, by the weights given, and of nothing that does not go together."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from prophet_gym.cli import main
from prophet_gym.strict_json import to_json
from prophet_gym.world_model.average import average_worlds
from prophet_gym.world_model.prophet import ProphetWorldModel


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint, and one with other weights in the denoiser and in the decoder."""
    other = tmp_path_factory.mktemp("other") / "world"
    world = ProphetWorldModel.from_pretrained(tiny_checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*world.transformer.parameters(), *world.codec.vae.decoder.parameters()]:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    world.save_pretrained(other)
    config = json.loads((other / "transformer" / "config.json").read_text())  # as diffusers notes what was not given
    (other / "transformer" / "config.json").write_text(to_json({**config, "_use_default_values": ["residual"]}))
    return [tiny_checkpoint, other]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return ProphetWorldModel.from_pretrained(folder).transformer.state_dict()


def test_the_mean_has_the_shares_asked_for_and_the_first_codec(pair: list[Path]) -> None:
    first, second = map(weights_of, pair)
    world = average_worlds(pair, [3.0, 1.0])
    assert all(torch.allclose(v, 0.75 * first[k] + 0.25 * second[k]) for k, v in world.transformer.state_dict().items())
    codec = ProphetWorldModel.from_pretrained(pair[0]).codec.vae.state_dict()
    assert all(torch.equal(v, codec[k]) for k, v in world.codec.vae.state_dict().items())


def test_the_command_saves_equal_shares_and_replaces_nothing(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "average", str(tmp_path / "mean"), *map(str, pair)])
    main()
    first, second = map(weights_of, pair)
    mean = weights_of(tmp_path / "mean")
    assert all(torch.allclose(v, (first[k] + second[k]) / 2, atol=2e-3) for k, v in mean.items())
    assert not all(torch.allclose(v, first[k], atol=2e-3) for k, v in mean.items())
    with pytest.raises(SystemExit):
        main()
    assert "exists already" in capsys.readouterr().err


def test_weights_are_checked(pair: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"1 checkpoint\(s\) to average; expected at least 2"):
        average_worlds(pair[:1])
    with pytest.raises(ValueError, match="3 weights for 2 checkpoints"):
        average_worlds(pair, [1.0, 1.0, 1.0])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected numbers above 0"):
            average_worlds(pair, [1.0, bad])


def test_what_differs_in_more_than_weights_is_refused(pair: list[Path], tmp_path: Path) -> None:
    steps = shutil.copytree(pair[1], tmp_path / "steps")
    config = json.loads((steps / "prophet.json").read_text())
    (steps / "prophet.json").write_text(to_json({**config, "num_inference_steps": 7, "name": "another"}))
    with pytest.raises(ValueError, match="prophet.json differs from that of .* in num_inference_steps; expected"):
        average_worlds([pair[0], steps])
    recoded = tmp_path / "recoded"
    world = ProphetWorldModel.from_pretrained(pair[1])
    with torch.no_grad():
        next(world.codec.vae.encoder.parameters()).mul_(1.5)
    world.save_pretrained(recoded)
    with pytest.raises(ValueError, match="codec encodes otherwise"):
        average_worlds([pair[0], recoded])
