"""What losses of one denoising step are least for: the likelier outcome, or one as often as the truth is."""

from __future__ import annotations

import pytest
import torch

from prophet_gym.training.chunks import ChunkBatch
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.objective import ChunkNoise
from prophet_gym.training.one_step import energy_score, one_step_loss
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.transformer import ProphetTransformer

SHAPE = (8, 2, 8, 8)  # z, T, h, w


def outcomes() -> tuple[torch.Tensor, torch.Tensor]:
    """A block that stays in one cell, and one that is carried to another."""
    missed, lifted = torch.zeros(SHAPE), torch.zeros(SHAPE)
    missed[:, :, 4, 4] = 2.0
    lifted[:, 0, 4, 5] = lifted[:, 1, 3, 6] = 2.0
    return missed, lifted


def expected(samples: list[tuple[float, torch.Tensor]], share: float) -> float:
    """Expected score of two independent draws of a distribution, where the block is lifted in a share of cases."""
    missed, lifted = outcomes()
    total = 0.0
    for p, first in samples:
        for q, second in samples:
            for r, truth in ((1 - share, missed), (share, lifted)):
                pair = torch.stack([first, second])[:, None]
                total += p * q * r * float(energy_score(pair, truth[None], torch.ones(1, 2, 8, 8)))
    return total


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_best_samples_are_as_often_lifted_as_the_truth(share: float) -> None:
    missed, lifted = outcomes()
    scores = {q / 10: expected([(1 - q / 10, missed), (q / 10, lifted)], share) for q in range(11)}
    assert min(scores, key=scores.__getitem__) == pytest.approx(share)
    faded = expected([(1.0, (1 - share) * missed + share * lifted)], share)
    doubled = expected([(1.0, missed + lifted)], share)
    assert scores[share] < 0.9 * min(faded, doubled)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_median_is_the_likelier_outcome_and_not_a_mixture(share: float) -> None:
    missed, lifted = outcomes()
    network = ProphetTransformer(**preset("tiny", latent_channels=8, num_attention_heads=1, action_frames="none"))
    config = ObjectiveConfig(action_frames="none", objective="median", num_inference_steps=1)

    def loss(shown: torch.Tensor) -> float:
        def distance(truth: torch.Tensor) -> float:
            latents = torch.cat([torch.zeros(1, 8, 1, 8, 8), truth[None]], dim=2)
            near = torch.zeros(1, 2, 8, 8)
            batch = ChunkBatch(latents, torch.zeros(1, 8, 15, 8, 8), torch.zeros(1, 20, 1, 7), None, near, near)

            def model(inputs: torch.Tensor, *_: object) -> torch.Tensor:
                return inputs - torch.cat([inputs[:, :, :1], shown[None]], dim=2)

            return float(one_step_loss(model, network, batch, config, 0)[0])

        return share * distance(lifted) + (1 - share) * distance(missed)

    likelier = lifted if share > 0.5 else missed
    mixtures = [p * missed + q * lifted for p, q in ((1 - share, share), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0))]
    mixtures.append(missed if share > 0.5 else lifted)
    assert loss(likelier) < 0.99 * min(map(loss, mixtures))


def test_exact_samples_score_nothing_and_their_gradient_is_finite() -> None:
    truth = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([truth, truth]).requires_grad_()
    score = energy_score(samples, truth, torch.ones(3, 2, 8, 8))
    score.sum().backward()
    assert score.detach().abs().max() == 0 and torch.isfinite(samples.grad).all()


def test_heavier_places_count_more() -> None:
    missed, lifted = (part[None] for part in outcomes())
    weight = torch.ones(1, 2, 8, 8)
    heavy = weight.clone()
    heavy[:, :, 3:5, 4:7] = 9.0
    pair = torch.stack([missed, missed])
    assert energy_score(pair, lifted, heavy) > 1.5 * energy_score(pair, lifted, weight)


def test_the_loss_is_the_score_of_two_one_step_samples_of_the_same_chunk() -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 3, 8, 8, generator=generator)
    near = torch.rand(2, 2, 8, 8, generator=generator)
    batch = ChunkBatch(latents, torch.zeros(2, 8, 15, 8, 8), torch.zeros(2, 20, 1, 7), None, near, 1 - near)
    network = ProphetTransformer(**preset("tiny", latent_channels=8, num_attention_heads=1, action_frames="none"))
    config = ObjectiveConfig(action_frames="none", object_weight=3.0, objective="energy", num_inference_steps=1)
    seen = []

    def model(inputs: torch.Tensor, mask: torch.Tensor, times: torch.Tensor, condition: object) -> torch.Tensor:
        seen.append((inputs, mask, times))
        return 0.5 * inputs

    loss, numbers = one_step_loss(model, network, batch, config, 4)
    inputs, mask, times = seen[0]
    assert len(inputs) == 4 and torch.equal(inputs[:2, :, 0], inputs[2:, :, 0])  # one context, two noises
    assert not torch.equal(inputs[:2, :, 1:], inputs[2:, :, 1:])
    assert (times[:, 1:] == 1).all() and (times[:, 0] == 0).all() and mask[:, :, 0].all() and not mask[:, :, 1:].any()
    noise = ChunkNoise.draw(
        latents.shape, batch.history.shape, ObjectiveConfig(first_step=1.0),
        torch.Generator().manual_seed(config.loop.seed * 1_000_003 + 4),
    )  # fmt: skip
    assert torch.equal(inputs[:2, :, 1:], noise.target)
    samples = 0.5 * inputs[:, :, 1:].unflatten(0, (2, 2))
    wanted = energy_score(samples, latents[:, :, 1:], 1.0 + 3.0 * near).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    apart = (samples[0] - samples[1]).square().mean()
    assert numbers["sample_spread"] == pytest.approx(float(apart) / 2, rel=1e-5)


def test_outcomes_do_not_weigh() -> None:
    with pytest.raises(ValueError, match="presence_weight=9.0: what happened must not decide"):
        ObjectiveConfig(objective="median", num_inference_steps=1, presence_weight=9.0)


def test_objectives_are_checked() -> None:
    with pytest.raises(ValueError, match="trains one denoising step, got num_inference_steps=4"):
        ObjectiveConfig(objective="energy")
    with pytest.raises(ValueError, match='expected "velocity", "median"'):
        ObjectiveConfig(objective="mean")  # type: ignore[arg-type]
