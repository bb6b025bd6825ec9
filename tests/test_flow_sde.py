"""The flow SDE against closed forms."""

import math

import pytest
import torch

from prophrl_agents import flow_sde
from prophrl_agents.flow_sde import schedule


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_schedule_matches_the_closed_forms(steps, level):
    t, dt, std, c_x, c_v = schedule(steps, level, dtype=torch.float64)
    assert t.shape == (steps + 1,) and t[0] == 1 and t[-1] == 0
    assert torch.allclose(dt, torch.full_like(dt, 1 / steps))
    assert std[0] == pytest.approx(level)
    assert -c_v[0] == pytest.approx(1 / steps)
    if steps > 1:
        assert std[-1] == pytest.approx(level / math.sqrt(steps * (steps - 1)))
        assert torch.allclose(-c_v[1:], dt[1:] * (1 + level**2 / 2))
    for k in range(steps):
        now, nxt, step = t[k].item(), t[k + 1].item(), dt[k].item()
        sigma = level * math.sqrt(now / (1 - (now if now < 1 else nxt)))
        g = sigma**2 / (2 * now)
        assert c_x[k] == pytest.approx(1 - g * step)
        assert c_v[k] == pytest.approx(-(1 + g * (1 - now)) * step)
        assert std[k] == pytest.approx(sigma * math.sqrt(step))


def test_ode_last_step_is_deterministic():
    flow = schedule(4, 0.5, last_step="ode")
    assert flow.std[-1] == 0 and flow.c_x[-1] == 1 and flow.c_v[-1] == -flow.dt[-1]
    noisy = schedule(4, 0.5)
    assert torch.equal(flow.std[:-1], noisy.std[:-1]) and torch.equal(flow.c_v[:-1], noisy.c_v[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_flow_steps=0, noise_level=0.5), "num_flow_steps is 0"),
        (dict(num_flow_steps=5, noise_level=-1.0), "noise_level is -1.0"),
        (dict(num_flow_steps=5, noise_level=float("nan")), "noise_level is nan"),
        (dict(num_flow_steps=5, noise_level=0.5, last_step="none"), "last_step is 'none'"),
        (dict(num_flow_steps=5, noise_level=0.5, dtype=torch.bfloat16), "quantises"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)


def test_sde_step_equals_ode_step_at_noise_zero():
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(3, 4, 7, generator=generator) for _ in range(3))
    flow = schedule(10, 0.0)
    for k in range(10):
        stepped, mean = flow_sde.sde_step(x, v, noise, flow, k)
        assert torch.equal(stepped, x - flow.dt[k] * v)
        assert torch.equal(stepped, mean)


def test_log_prob_and_kl_equal_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    x, mean, reference = (torch.randn(2, 5, 4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    std = schedule(5, 0.5, dtype=torch.float64).std[:, None, None]
    here = torch.distributions.Normal(mean, std.expand_as(mean))
    there = torch.distributions.Normal(reference, std.expand_as(mean))
    assert torch.allclose(flow_sde.log_prob(x, mean, std), here.log_prob(x), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(here, there)
    assert torch.allclose(flow_sde.kl_divergence(mean, reference, std), expected, rtol=1e-10, atol=1e-12)


def test_kl_equals_its_form_in_velocities():
    a, steps = 0.5, 8
    flow = schedule(steps, a, dtype=torch.float64)
    x, v, v_ref = (
        torch.randn(steps, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    c_x, c_v, std = (n[:, None, None] for n in (flow.c_x, flow.c_v, flow.std))
    kl = flow_sde.kl_divergence(flow_sde.step_mean(x, v, c_x, c_v), flow_sde.step_mean(x, v_ref, c_x, c_v), std)
    t, dt = flow.t[:-1, None, None], flow.dt[:, None, None]
    form = dt * (1 - t) / t * (1 + a**2 / 2) ** 2 / (2 * a**2) * (v - v_ref) ** 2
    assert torch.allclose(kl[1:], form[1:], rtol=1e-9)


def test_a_step_without_noise_has_no_log_prob_no_kl_and_finite_gradients():
    mean = torch.randn(2, 3, 4, 7, requires_grad=True)
    std = torch.tensor([0.5, 0.2, 0.0])[:, None, None]
    density = flow_sde.log_prob(torch.randn(2, 3, 4, 7), mean, std)
    kl = flow_sde.kl_divergence(mean, torch.zeros(2, 3, 4, 7), std)
    assert (density[:, 2] == 0).all() and (kl[:, 2] == 0).all() and (density[:, :2] != 0).all()
    (density.sum() + kl.sum()).backward()
    assert mean.grad.isfinite().all() and (mean.grad[:, 2] == 0).all() and (mean.grad[:, :2] != 0).all()


class GaussianFlow:
    """Actions a ~ N(m, s^2): the exact velocity E[eps - a | x_t] and the exact marginals."""

    m, s = 0.7, 0.4

    def mean(self, t):
        return (1 - t) * self.m

    def var(self, t):
        return (1 - t) ** 2 * self.s**2 + t**2

    def slope(self, t):
        return (t - (1 - t) * self.s**2) / self.var(t)

    def __call__(self, x, t):
        return -self.m + self.slope(t) * (x - self.mean(t))


def test_sde_preserves_the_marginals_to_second_order_per_step():
    """A step from the marginal at t lands on the one at t - dt up to O(dt^2): halving dt quarters the error."""
    world = GaussianFlow()

    def error(steps, a):
        flow = schedule(steps, a, dtype=torch.float64)
        t, dt = flow.t[:-1], flow.dt
        slope = world.slope(t)
        after_mean = flow.c_x * world.mean(t) + flow.c_v * -world.m
        after_var = (flow.c_x + flow.c_v * slope) ** 2 * world.var(t) + flow.std**2
        k = steps // 2  # t = 1/2
        return abs(after_mean[k] - world.mean(t - dt)[k]).item(), abs(after_var[k] - world.var(t - dt)[k]).item()

    for a in (0.3, 0.5, 1.0):
        (mean_coarse, var_coarse), (mean_fine, var_fine) = error(200, a), error(400, a)
        assert var_fine < 1e-4 and var_coarse / var_fine == pytest.approx(4, rel=0.05)
        assert mean_fine < 1e-12 or mean_coarse / mean_fine == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5])
def test_sampled_paths_have_the_marginals_of_the_ode(level):
    world, steps = GaussianFlow(), 100
    flow = schedule(steps, level)
    path, log_prob = flow_sde.sample_path(world, (4000, 2, 2), flow, torch.Generator().manual_seed(0))
    assert path.shape == (4000, steps + 1, 2, 2) and log_prob.shape == (4000, steps, 2, 2)
    for k in (30, 60, 90, steps):
        t = flow.t[k]
        assert path[:, k].mean() == pytest.approx(world.mean(t).item(), abs=0.02)
        assert path[:, k].std() == pytest.approx(world.var(t).sqrt().item(), rel=0.04)


def test_log_prob_along_a_sampled_path_is_that_of_sampling():
    world, flow = GaussianFlow(), schedule(5, 0.5, last_step="ode")
    path, log_prob = flow_sde.sample_path(world, (8, 4, 7), flow, torch.Generator().manual_seed(0))
    again = flow_sde.log_prob(path[:, 1:], flow_sde.path_mean(world, path, flow), flow.std[:, None, None])
    assert torch.equal(again, log_prob)


def test_expected_ratio_under_the_old_policy_is_one():
    """The ratio of a path is a martingale: E_old[r] = 1, per command and dimension."""
    old, flow = GaussianFlow(), schedule(5, 0.5)

    def new(x, t):
        return old(x, t) + 0.15 * torch.tanh(x.flip(-1)) - 0.1

    path, old_log_prob = flow_sde.sample_path(old, (20000, 2, 3), flow, torch.Generator().manual_seed(1))
    log_prob = flow_sde.log_prob(path[:, 1:], flow_sde.path_mean(new, path, flow), flow.std[:, None, None])
    ratio = (log_prob - old_log_prob).double().sum(dim=1).exp()
    standard_error = ratio.std(dim=0) / math.sqrt(len(ratio))
    assert ratio.std() > 0.1
    assert ((ratio.mean(dim=0) - 1).abs() < 4 * standard_error).all()


def test_noise_per_row_does_not_depend_on_the_batch():
    def rows(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    flow = schedule(5, 0.5)
    batch, _ = flow_sde.sample_path(GaussianFlow(), (3, 4, 7), flow, rows([7, 8, 9]))
    lone, _ = flow_sde.sample_path(GaussianFlow(), (1, 4, 7), flow, rows([8]))
    assert torch.equal(batch[1:2], lone)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        flow_sde.sample_path(GaussianFlow(), (3, 4, 7), flow, rows([7, 8]))
