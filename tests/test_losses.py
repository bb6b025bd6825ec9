"""FA-GRPO and Flow-GRPO against naive formulas, closed-form gradients and a small learning problem."""

import math

import pytest
import torch

from prophrl_agents import fa_grpo_loss, flow_grpo_loss, flow_sde, flowscale_weights, group_advantages

LOSSES = [fa_grpo_loss, flow_grpo_loss]
B, S, K, CH, D = 3, 2, 4, 3, 2


def batch(spread, dtype=torch.float64, seed=0):
    """Log-probabilities that differ by ``spread`` between the policies, advantages and a mask with padding."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(B, S, K, CH, D, generator=generator, dtype=dtype)
    new = (old + spread * torch.randn(old.shape, generator=generator, dtype=dtype)).requires_grad_()
    advantages = torch.randn(B, S, CH, generator=generator, dtype=dtype)
    mask = torch.ones(B, S, CH, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, 0, 2] = False
    return new, old, advantages, mask


def weights(dtype=torch.float64):
    return flowscale_weights(flow_sde.schedule(K, 0.5, dtype=dtype).std, alpha=0.0).expand(B, S, K)


def gradient(loss_function, new, *arguments, **options):
    loss, metrics = loss_function(new, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, new)[0], metrics


def naive(new, old, advantages, mask, per_flow_step, low=0.2, high=0.28):
    """Eq. 18 written as loops over valid commands."""
    total = 0.0
    for b, s, c in mask.nonzero().tolist():
        element = (new - old).detach()[b, s, :, c]
        for log_ratio in element.sum(1) if per_flow_step else element.sum(0):
            r, advantage = math.exp(log_ratio), advantages[b, s, c].item()
            total += min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
    return -total / mask.sum().item()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_value_equals_the_formula_written_as_loops(loss_function):
    new, old, advantages, mask = batch(0.2)
    loss, metrics = loss_function(new, old, advantages, mask)
    expected = naive(new, old, advantages, mask, per_flow_step=loss_function is flow_grpo_loss)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["policy_loss"] == pytest.approx(expected, rel=1e-12)
    assert metrics["num_valid"] == mask.sum() and 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("loss_function", LOSSES)
def test_ratio_is_exactly_one_before_the_first_update(loss_function):
    new, _, advantages, mask = batch(0.0, torch.float32)
    for w in (None, weights(torch.float32)):
        _, metrics = loss_function(new, new.detach(), advantages, mask, weights=w)
        assert metrics["ratio_min"] == metrics["ratio_max"] == metrics["ratio_mean"] == 1
        assert metrics["ratio_std"] == metrics["approx_kl"] == metrics["clip_fraction"] == 0


def test_both_losses_have_the_same_gradient_at_ratio_one():
    new, _, advantages, mask = batch(0.0)
    for w in (None, weights()):
        _, fa, _ = gradient(fa_grpo_loss, new, new.detach(), advantages, mask, weights=w)
        _, flow, _ = gradient(flow_grpo_loss, new, new.detach(), advantages, mask, weights=w)
        assert torch.allclose(fa, flow, rtol=1e-12) and fa.abs().sum() > 0
    new, old, advantages, mask = batch(0.05)
    assert not torch.allclose(
        gradient(fa_grpo_loss, new, old, advantages, mask)[1], gradient(flow_grpo_loss, new, old, advantages, mask)[1]
    )


@pytest.mark.parametrize("loss_function", LOSSES)
def test_flowscale_alpha_one_changes_neither_value_nor_gradient(loss_function):
    new, old, advantages, mask = batch(0.2)
    uniform = flowscale_weights(flow_sde.schedule(K, 0.5, dtype=torch.float64).std, alpha=1.0).expand(B, S, K)
    value, slope, _ = gradient(loss_function, new, old, advantages, mask)
    value_w, slope_w, _ = gradient(loss_function, new, old, advantages, mask, weights=uniform)
    assert torch.equal(value, value_w) and torch.equal(slope, slope_w)


def test_straight_through_gradient_is_equation_26_at_ratio_one():
    new, _, advantages, mask = batch(0.0)
    _, slope, _ = gradient(fa_grpo_loss, new, new.detach(), advantages, mask, weights=weights())
    expected = -(mask * advantages)[:, :, None, :, None] * weights()[..., None, None] / mask.sum()
    assert torch.allclose(slope, expected.expand_as(slope), rtol=1e-12)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_off_policy_flowscale_keeps_value_and_metrics_and_scales_the_gradient_by_step(loss_function):
    new, old, advantages, mask = batch(0.2)
    kl = torch.rand(new.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain, slope, metrics = gradient(loss_function, new, old, advantages, mask, kl=kl, beta=0.1)
    scaled, slope_w, metrics_w = gradient(loss_function, new, old, advantages, mask, kl=kl, beta=0.1, weights=weights())
    assert torch.equal(plain, scaled) and metrics == metrics_w
    assert torch.allclose(slope_w, slope * weights()[..., None, None], rtol=1e-12)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_nan_padding_is_inert(loss_function):
    new, old, advantages, mask = batch(0.2)
    kl = torch.rand(new.shape, dtype=torch.float64)
    w = weights().clone()
    clean = gradient(loss_function, new, old, advantages, mask, weights=w, kl=kl, beta=0.1)
    padded = ~mask[:, :, None, :, None].expand(new.shape)
    for tensor in (old, kl):
        tensor[padded] = float("nan")
    advantages[~mask] = float("nan")
    w[0, 1] = float("nan")  # a policy call that is padded throughout
    dirty_new = new.detach().masked_fill(padded, float("nan")).requires_grad_()
    dirty = gradient(loss_function, dirty_new, old, advantages, mask, weights=w, kl=kl, beta=0.1)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1]) and clean[2] == dirty[2]
    assert (dirty[1][padded] == 0).all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_equal_rewards_move_nothing(loss_function):
    new, old, _, mask = batch(0.3)
    advantages = group_advantages(torch.full((B,), 0.1), B)[:, None, None].expand(B, S, CH)
    loss, slope, metrics = gradient(loss_function, new, old, advantages, mask)
    assert loss == 0 and (slope == 0).all() and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_finite_differences(loss_function, dual_clip):
    new, old, advantages, mask = (tensor.detach()[:1] for tensor in batch(0.1))
    new.requires_grad_()
    mean = torch.randn(new.shape, dtype=torch.float64, requires_grad=True)

    def loss(log_prob, mean):
        kl = flow_sde.kl_divergence(mean, torch.zeros_like(mean), torch.full((K, 1, 1), 0.3, dtype=torch.float64))
        return loss_function(log_prob, old, advantages, mask, kl=kl, beta=0.1, dual_clip=dual_clip)[0]

    assert torch.autograd.gradcheck(loss, (new, mean))


def test_clip_removes_gradients_on_the_right_side_only():
    log_ratios = torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=torch.float64)
    new = log_ratios.reshape(4, 1, 1, 1, 1).clone().requires_grad_()
    advantages = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64).reshape(4, 1, 1)
    mask = torch.ones(4, 1, 1, dtype=torch.bool)
    _, slope, metrics = gradient(fa_grpo_loss, new, torch.zeros_like(new), advantages, mask)
    assert (slope.flatten() != 0).tolist() == [True, False, False, True]
    assert metrics["clip_fraction_high"] == metrics["clip_fraction_low"] == 0.25 and metrics["clip_fraction"] == 0.5
    assert metrics["ratio_min"] == pytest.approx(math.exp(-0.5)) and metrics["ratio_max"] == pytest.approx(
        math.exp(0.5)
    )


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    new = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    arguments = torch.zeros_like(new), torch.full((1, 1, 1), -1.0, dtype=torch.float64), torch.ones(1, 1, 1).bool()
    assert fa_grpo_loss(new, *arguments)[0].item() == pytest.approx(math.exp(2))
    loss, slope, metrics = gradient(fa_grpo_loss, new, *arguments, dual_clip=3.0)
    assert loss == 3 and slope == 0 and metrics["clip_fraction_dual"] == 1


def test_log_ratio_is_limited():
    new = torch.full((1, 1, 1, 1, 1), 1000.0, requires_grad=True)
    arguments = torch.zeros_like(new), torch.full((1, 1, 1), -1.0), torch.ones(1, 1, 1).bool()
    loss, slope, _ = gradient(fa_grpo_loss, new, *arguments)
    assert loss.item() == pytest.approx(math.exp(20)) and slope == 0


@pytest.mark.parametrize("loss_function", LOSSES)
def test_mini_batches_with_the_global_count_add_up(loss_function):
    new, old, advantages, mask = batch(0.2)
    kl = torch.rand(new.shape, dtype=torch.float64)
    whole, slope, _ = gradient(loss_function, new, old, advantages, mask, kl=kl, beta=0.1)
    rows = [[tensor[i : i + 1] for tensor in (new, old, advantages, mask, kl)] for i in range(B)]
    parts = [loss_function(*row[:4], kl=row[4], beta=0.1, normalizer=mask.sum())[0] for row in rows]
    assert torch.allclose(sum(parts), whole, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(sum(parts), new)[0], slope, rtol=1e-12)


def test_kl_is_the_sum_over_steps_and_dimensions_and_needs_beta():
    new, old, advantages, mask = batch(0.0)
    kl = torch.rand(new.shape, dtype=torch.float64)
    expected = (kl.sum(dim=(2, 4)) * mask).sum() / mask.sum()
    without, metrics = fa_grpo_loss(new, old, advantages, mask, kl=kl)
    with_kl, _ = fa_grpo_loss(new, old, advantages, mask, kl=kl, beta=0.5)
    assert metrics["kl"] == pytest.approx(expected.item())
    assert (with_kl - without).item() == pytest.approx(0.5 * expected.item())


def test_a_batch_without_valid_commands_is_zero():
    new, old, advantages, mask = batch(0.2)
    loss, slope, metrics = gradient(fa_grpo_loss, new, old, advantages, torch.zeros_like(mask))
    assert loss == 0 and (slope == 0).all() and metrics["num_valid"] == 0
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new, old, adv, mask: ((new, old[:, :, :3], adv, mask), {}), r"old_log_prob has shape .* K=4"),
        (lambda new, old, adv, mask: ((new, old, adv[..., :2], mask), {}), r"advantages has shape .* CH=3"),
        (lambda new, old, adv, mask: ((new, old, adv, mask.float()), {}), "mask has dtype"),
        (lambda new, old, adv, mask: ((new.bfloat16(), old, adv, mask), {}), "quantises ratios"),
        (lambda new, old, adv, mask: ((new, old, adv, mask), dict(beta=0.1)), "kl is missing"),
        (lambda new, old, adv, mask: ((new, old, adv, mask), dict(clip_low=1.5)), "clip_low=1.5"),
        (lambda new, old, adv, mask: ((new, old, adv, mask), dict(dual_clip=1.0)), "dual_clip is 1.0"),
        (lambda new, old, adv, mask: ((new, old, adv, mask), dict(normalizer=0)), "normalizer is 0"),
        (lambda new, old, adv, mask: ((new, old, adv, mask), dict(weights=torch.ones(4))), "weights has shape"),
    ],
)
def test_bad_input(change, message):
    arguments, options = change(*batch(0.1))
    with pytest.raises(ValueError, match=message):
        fa_grpo_loss(*arguments, **options)


class Biased:
    """Velocity toward N(bias, small): a flow policy with one parameter."""

    def __init__(self):
        self.bias = torch.zeros((), requires_grad=True)

    def __call__(self, x, t):
        return (x - self.bias) / t.clamp(min=0.2)


def train_toy(loss_function, w, judge, updates=30, rollouts=256):
    """Groups of 8 in a one-command world; returns how far the policy moved toward larger actions."""
    generator = torch.Generator().manual_seed(0)
    policy, flow = Biased(), flow_sde.schedule(5, 0.5)
    optimizer = torch.optim.Adam([policy.bias], lr=0.02)
    for _ in range(updates):
        with torch.no_grad():
            path, old = flow_sde.sample_path(policy, (rollouts, 1, 1), flow, generator)
        rewards = judge(path[:, -1, 0, 0], generator)
        advantages = group_advantages(rewards, 8)[:, None, None]
        mask = torch.ones_like(advantages, dtype=torch.bool)
        new = flow_sde.log_prob(path[:, 1:], flow_sde.path_mean(policy, path, flow), flow.std[:, None, None])
        loss, _ = loss_function(
            new[:, None], old[:, None], advantages, mask, weights=None if w is None else w.expand(rollouts, 1, 5)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.bias.item()


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_true_judge_moves_the_policy_and_a_random_one_does_not(loss_function, scaled):
    w = flowscale_weights(flow_sde.schedule(5, 0.5).std) if scaled else None
    learnt = train_toy(loss_function, w, lambda action, generator: (action > 0.3).float())
    noise = train_toy(loss_function, w, lambda action, generator: torch.rand(len(action), generator=generator).round())
    assert learnt > 0.4
    assert abs(noise) < 0.25 * learnt
