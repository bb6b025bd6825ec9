"""What losses of one denoising step are least for: the likelier outcome, or one as often as the truth is."""

from __future__ import annotations

import pytest
import torch

from prophet_gym.training.chunks import ChunkBatch
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.objective import ChunkNoise
from prophet_gym.training.one_step import colour_distances, energy_score, one_step_loss
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


@pytest.fixture(scope="module")
def network() -> ProphetTransformer:
    return ProphetTransformer(**preset("tiny", latent_channels=8, num_attention_heads=1, action_frames="none"))


def median_loss(
    network: ProphetTransformer, shown: torch.Tensor, truth: torch.Tensor, colours: torch.Tensor | None = None
) -> float:
    """Loss of a denoiser that shows some latents whatever it is given."""
    latents = torch.cat([torch.zeros(1, 8, 1, 8, 8), truth[None]], dim=2)
    near = torch.zeros(1, 2, 8, 8)
    batch = ChunkBatch(latents, torch.zeros(1, 8, 15, 8, 8), torch.zeros(1, 20, 1, 7), None, near, near)

    def model(inputs: torch.Tensor, *_: object) -> torch.Tensor:
        return inputs - torch.cat([inputs[:, :, :1], shown[None]], dim=2)

    weight = 0.0 if colours is None else 1.0
    config = ObjectiveConfig(action_frames="none", objective="median", num_inference_steps=1, colour_weight=weight)
    return float(one_step_loss(model, network, batch, config, 0, colours)[0])


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_median_is_the_likelier_outcome_and_not_a_mixture(network: ProphetTransformer, share: float) -> None:
    missed, lifted = outcomes()

    def loss(shown: torch.Tensor) -> float:
        return share * median_loss(network, shown, lifted) + (1 - share) * median_loss(network, shown, missed)

    likelier = lifted if share > 0.5 else missed
    mixtures = [p * missed + q * lifted for p, q in ((1 - share, share), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0))]
    mixtures.append(missed if share > 0.5 else lifted)
    assert loss(likelier) < 0.99 * min(map(loss, mixtures))


def block_at(row: int, column: int, channel: int = 1) -> torch.Tensor:
    """A block of one colour (channel 0); the other channel says where in its cell it is."""
    latents = torch.zeros(SHAPE)
    latents[0, :, row, column] = latents[channel, :, row, column] = 3.0
    return latents


COLOURS = 4.0 * torch.eye(8)[:, :3] * torch.tensor([1.0, 0.0, 0.0])


def test_of_many_places_colours_choose_one_and_not_none(network: ProphetTransformer) -> None:
    places = [block_at(row, column, channel) for row, column in ((3, 3), (3, 4), (4, 3), (4, 4)) for channel in (1, 2)]

    def loss(shown: torch.Tensor, colours: torch.Tensor | None) -> float:
        return sum(median_loss(network, shown, truth, colours) for truth in places) / len(places)

    none, one, two, faint = torch.zeros(SHAPE), places[0], places[0] + places[-1], sum(places) / len(places)
    assert loss(none, None) < 0.8 * loss(one, None)
    assert loss(one, COLOURS) < 0.95 * min(loss(none, COLOURS), loss(two, COLOURS))
    assert isinstance(faint, torch.Tensor) and loss(one, COLOURS) < loss(2.0 * faint, COLOURS)


def test_colours_are_averaged_before_distances_are_taken() -> None:
    weight = torch.ones(1, 2, 8, 8)
    truth, none = block_at(4, 4)[None], torch.zeros(1, *SHAPE)
    near, far, recoded = (block[None] for block in (block_at(4, 5), block_at(0, 0), block_at(4, 4, channel=5)))
    absent = float(colour_distances(none, truth, weight, COLOURS))
    assert colour_distances(recoded, truth, weight, COLOURS) == 0  # coded otherwise, of the same colour
    assert 0 < colour_distances(near, truth, weight, COLOURS) < 0.6 * absent
    assert colour_distances(far, truth, weight, COLOURS) > absent
    assert colour_distances(near, truth, weight, 2 * COLOURS) > 1.9 * colour_distances(near, truth, weight, COLOURS)
    swapped = truth.clone()
    swapped[:, :, 0] = 0.0
    assert colour_distances(swapped, truth, weight, COLOURS) > 0.4 * absent  # frames are not averaged


def test_distances_are_root_mean_squares_of_three_scales_each() -> None:
    """Against loops over places: latents squared, then averaged; colours averaged, then squared."""
    generator = torch.Generator().manual_seed(2)
    samples, truth = torch.randn(2, 1, 8, 2, 4, 4, generator=generator), torch.randn(1, 8, 2, 4, 4, generator=generator)
    weight = 1.0 + torch.rand(1, 2, 4, 4, generator=generator)
    colours = torch.randn(8, 3, generator=generator)
    places = [(t, i, j) for t in range(2) for i in range(4) for j in range(4)]

    def around(values: torch.Tensor, i: int, j: int, reach: int) -> torch.Tensor:
        return values[..., max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]

    def root(square: torch.Tensor) -> float:
        return float((square + 1e-4).sqrt()) - 0.01

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        apart = a - b  # (8, 2, 4, 4)
        colour = torch.einsum("zthw,zc->cthw", apart, colours)
        total = 0.0
        for t, i, j in places:
            share = float(weight[0, t, i, j] / weight.sum())
            chunk = sum(float(weight[0][place] / weight.sum()) * apart[:, *place].square().mean() for place in places)
            near = [apart[:, t, i, j], around(apart, i, j, 1)]
            total += share * (sum(root(part.square().mean()) for part in near) + root(torch.as_tensor(chunk))) / 3
            means = [around(colour[:, t], i, j, reach).mean(dim=(1, 2)) for reach in (1, 2, 9)]
            total += share * sum(root(mean.square().mean()) for mean in means) / 3
        return total

    one, other = samples[:, 0]
    wanted = (distance(one, truth[0]) + distance(other, truth[0]) - distance(one, other)) / 2
    assert float(energy_score(samples, truth, weight, colours)) == pytest.approx(wanted, rel=1e-4)


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


def test_the_loss_is_the_score_of_two_one_step_samples_of_the_same_chunk(network: ProphetTransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 3, 8, 8, generator=generator)
    near = torch.rand(2, 2, 8, 8, generator=generator)
    batch = ChunkBatch(latents, torch.zeros(2, 8, 15, 8, 8), torch.zeros(2, 20, 1, 7), None, near, 1 - near)
    config = ObjectiveConfig(
        action_frames="none", object_weight=3.0, objective="energy", num_inference_steps=1, colour_weight=2.0
    )
    seen = []

    def model(inputs: torch.Tensor, mask: torch.Tensor, times: torch.Tensor, condition: object) -> torch.Tensor:
        seen.append((inputs, mask, times))
        return 0.5 * inputs

    colours = torch.randn(8, 3, generator=generator)
    loss, numbers = one_step_loss(model, network, batch, config, 4, colours)
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
    wanted = energy_score(samples, latents[:, :, 1:], 1.0 + 3.0 * near, 2.0 * colours).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    with pytest.raises(ValueError, match=r"colour_weight=2.0 with no map of colours"):
        one_step_loss(model, network, batch, config, 4)
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
    with pytest.raises(ValueError, match="colour_weight=2.0 with objective='velocity'"):
        ObjectiveConfig(colour_weight=2.0)
    with pytest.raises(ValueError, match="colour_weight=-1.0: expected an extra weight"):
        ObjectiveConfig(objective="median", num_inference_steps=1, colour_weight=-1.0)
