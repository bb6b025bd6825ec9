"""FlowScale weights: the rule, the projection, its bounds."""

import pytest
import torch

from prophrl_agents import flowscale_weights
from prophrl_agents.flow_sde import schedule


def test_without_projection_it_is_equation_22():
    std = schedule(10, 0.5, dtype=torch.float64).std
    raw = (std**2 + 1e-8) ** 0.5
    expected = (0.1 + 0.9 * raw / raw.mean()).clamp(0.1, 5.0)
    assert torch.allclose(flowscale_weights(std, renorm=None), expected, rtol=1e-12)


def test_half_power_without_mixing_is_proportional_to_std():
    std = schedule(10, 0.5, dtype=torch.float64).std
    ratio = flowscale_weights(std, alpha=0.0, w_min=0.0, w_max=10.0, eps=0.0) / std
    assert torch.allclose(ratio, ratio[:1].expand(10), rtol=1e-10)


def test_projection_equals_the_paper_where_the_clip_does_not_bind():
    std = schedule(5, 0.5, dtype=torch.float64).std
    assert torch.allclose(flowscale_weights(std), flowscale_weights(std, renorm=None), rtol=1e-12)


@pytest.mark.parametrize("bounds", [(0.1, 5.0), (0.5, 1.5), (0.9, 5.0), (0.0, 1.2), (1.0, 1.0)])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_projection_has_mean_one_within_bounds(bounds, p):
    std = torch.rand(6, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3 + 1e-4
    weights = flowscale_weights(std, p=p, alpha=0.05, w_min=bounds[0], w_max=bounds[1])
    assert torch.allclose(weights.mean(dim=-1), torch.ones(6, 3, dtype=torch.float64), atol=1e-12)
    assert weights.min() >= bounds[0] and weights.max() <= bounds[1]
    order = std.argsort(dim=-1)
    assert (weights.gather(-1, order).diff(dim=-1) >= -1e-12).all(), "noisier steps never weigh less"


def test_the_paper_loses_the_mean_once_the_clip_binds():
    std = schedule(10, 0.5, dtype=torch.float64).std
    assert abs(flowscale_weights(std, p=1.0, w_max=1.5, renorm=None).mean() - 1) > 0.05
    assert flowscale_weights(std, p=1.0, w_max=1.5).mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("renorm", ["project", None])
def test_alpha_one_is_exactly_uniform(renorm):
    assert torch.equal(flowscale_weights(schedule(10, 0.5).std, alpha=1.0, renorm=renorm), torch.ones(10))


@pytest.mark.parametrize("renorm", ["project", None])
def test_steps_without_noise_weigh_nothing_and_stay_out_of_the_mean(renorm):
    std = schedule(5, 0.5, last_step="ode").std
    weights = flowscale_weights(std, renorm=renorm)
    assert weights[-1] == 0 and weights[:-1].mean() == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights[:-1], flowscale_weights(std[:-1], renorm=renorm))
    assert torch.equal(flowscale_weights(torch.zeros(3, 5), renorm=renorm), torch.zeros(3, 5))


def test_weights_are_constants_of_the_input_dtype():
    std = schedule(5, 0.5).std.expand(2, 3, 5).clone().requires_grad_()
    weights = flowscale_weights(std)
    assert weights.shape == (2, 3, 5) and weights.dtype == torch.float32 and not weights.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(std=torch.tensor([0.1, -0.1])), "finite and >= 0"),
        (dict(std=torch.tensor([0.1, float("nan")])), "finite and >= 0"),
        (dict(std=torch.tensor([1, 2])), "dtype torch.int64"),
        (dict(alpha=1.5), "alpha=1.5"),
        (dict(w_min=2.0, w_max=1.0), "out of order"),
        (dict(w_min=1.5, w_max=2.0), "exclude the mean weight 1"),
        (dict(renorm="mean"), "renorm is 'mean'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        flowscale_weights(**{"std": torch.tensor([0.5, 0.1]), **arguments})
