"""The mean of checkpoints: of their weights, by the weights given, and of nothing that does not go together."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
    world.config = replace(world.config, trained_on="other nothing")
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
    assert world.config.trained_on == "nothing: random weights for tests; other nothing"
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
    assert "exists already; give another folder for the mean" in capsys.readouterr().err
    wide = ["prophet", "average", str(tmp_path / "wide"), *map(str, pair), "--dtype", "float32", "--trained-on", "two"]
    monkeypatch.setattr(sys, "argv", wide)
    main()
    for folder, dtype in (("mean", torch.float16), ("wide", torch.float32)):
        stored = [load_file(path) for path in sorted((tmp_path / folder).glob("*/*.safetensors"))]
        assert len(stored) == 2 and {value.dtype for tensors in stored for value in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "wide" / "prophet.json").read_text())["trained_on"] == "two"


def test_weights_are_checked(pair: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"1 to average; expected at least 2 checkpoints"):
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
    gated = shutil.copytree(pair[1], tmp_path / "gated")
    config = json.loads((gated / "transformer" / "config.json").read_text())
    (gated / "transformer" / "config.json").write_text(to_json({**config, "memory_gate": 0.5}))
    with pytest.raises(ValueError, match="denoiser differs from that of .* in memory_gate; expected"):
        average_worlds([pair[0], gated])
    recoded = tmp_path / "recoded"
    world = ProphetWorldModel.from_pretrained(pair[1])
    with torch.no_grad():
        next(world.codec.vae.encoder.parameters()).mul_(1.5)
    world.save_pretrained(recoded)
    with pytest.raises(ValueError, match="codec encodes otherwise"):
        average_worlds([pair[0], recoded])
