"""What weighs how much in the loss, and what is left of the log of a killed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prophet_gym.training.chunks import ChunkBatch
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.loop import forget_after
from prophet_gym.training.objective import ChunkNoise, velocity_loss
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.transformer import ProphetTransformer


@pytest.mark.parametrize("weight", ["presence_weight", "object_weight"])
def test_places_weigh_by_their_weight_and_nearness(weight: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 8, 3, 8, 8, generator=generator)
    here = torch.zeros(1, 2, 8, 8)
    here[0, 1, 4, 7], here[0, 0, 0, 0] = 1.0, 0.5
    near = {"presence_weight": (torch.zeros_like(here), here), "object_weight": (here, torch.zeros_like(here))}[weight]
    batch = ChunkBatch(latents, torch.zeros(1, 8, 15, 8, 8), torch.zeros(1, 20, 1, 7), None, *near)
    network = ProphetTransformer(**preset("tiny", latent_channels=8, num_attention_heads=1, action_frames="none"))
    plain = ObjectiveConfig(action_frames="none", first_step=1.0)

    def result(config: ObjectiveConfig) -> tuple[torch.Tensor, dict[str, float]]:
        return velocity_loss(lambda inputs, *_: torch.zeros_like(inputs), network, batch, config, 0)

    def loss(config: ObjectiveConfig) -> float:
        return float(result(config)[0])

    seeded = torch.Generator().manual_seed(plain.loop.seed * 1_000_003)
    noise = ChunkNoise.draw(latents.shape, batch.history.shape, plain, seeded)
    error = (noise.target - latents[:, :, 1:]).square().mean(dim=1)
    assert loss(plain) == pytest.approx(float(error.mean()), rel=1e-5)
    share = 1.0 + 3.0 * here
    assert loss(replace(plain, **{weight: 3.0})) == pytest.approx(float((share * error).sum() / share.sum()), rel=1e-5)
    named = {"presence_weight": "velocity_mse_presence", "object_weight": "velocity_mse_object"}
    numbers = result(plain)[1]
    assert numbers[named[weight]] == pytest.approx(float((here * error).sum() / here.sum()), rel=1e-5)
    assert not numbers.keys() & (set(named.values()) - {named[weight]})


@pytest.mark.parametrize("weight", ["motion_weight", "object_weight", "presence_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{weight}={value}: expected an extra weight of 0 or more"):
        ObjectiveConfig(**{weight: value})


def test_a_torn_last_line_of_the_log_goes(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "score": 0.5}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert not forget_after(metrics, 2) and len(metrics.read_text().splitlines()) == 3
    assert forget_after(metrics, 1) and len(metrics.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"timestep_shift": 0.0},
        {"timestep_shift": float("nan")},
        {"condition_noise": -0.1},
        {"condition_noise": float("inf")},
    ],
)
def test_settings_that_would_give_times_or_noise_without_a_meaning_are_refused(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}={bad[name]}: expected a finite"):
        ObjectiveConfig(**bad)
