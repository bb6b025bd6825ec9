"""One update of a policy on frozen rollouts: what moves the weights, what must not, and how a batch is divided."""

import dataclasses

import numpy as np
import pytest
import safetensors
import torch

from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig, fa_grpo_loss, flow_sde
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.config import FlowScaleConfig, TrainConfig
from prophrl_agents.critic import generalised_advantages, standardise
from prophrl_agents.learner import Learner
from prophrl_agents.lesson import make_lesson, mini_batches
from prophrl_agents.update import update_policy

B, S, G, CH, D, SIZE = 16, 3, 4, 3, 2, 8
SUCCESS = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0]).bool()  # group 2 all succeed
CONFIG = TrainConfig(
    rollouts_per_update=B, group_size=G, mini_batch=B, learning_rate=1e-3, grad_clip=1e3, log_grad_every=0
)
OFF = FlowScaleConfig(enabled=False)
ALGORITHMS = ["fa_grpo", "flow_grpo", "filtered_bc", "ppo"]


def make_policy(seed=0, **flow):
    config = SmallFlowPolicyConfig(
        ("go",), image_size=SIZE, state_dim=2, chunk_length=CH, action_dim=D, num_flow_steps=3,
        trunk_width=8, feature_dim=16, head_width=16, head_blocks=1, **flow,
    )  # fmt: skip
    two = np.ones(2)
    torch.manual_seed(seed)
    policy = SmallFlowPolicy(config, PolicyStatistics(0 * two, two, -two, two, 0 * two, two))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval()


def make_batch(policy, success=SUCCESS, valid=None, seed=0):
    """Rollouts of 2 or 3 policy calls, some of which end inside their last chunk; slots after the end hold zeros."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (B, S, SIZE, SIZE, 3), dtype=np.uint8))
    state = torch.from_numpy(rng.normal(size=(B, S, 2)).astype(np.float32))
    mask = torch.from_numpy(np.arange(S * CH).reshape(S, CH) < rng.integers(4, S * CH + 1, (B, 1, 1)))
    called = mask.any(dim=2)
    obs = {"image": image.flatten(0, 1), "state": state.flatten(0, 1), "instruction": ["go"] * (B * S)}
    sample = policy.sample(obs, torch.Generator().manual_seed(seed))

    def padded(tensor):
        tensor = tensor.unflatten(0, (B, S))
        return torch.where(called.reshape(B, S, *[1] * (tensor.ndim - 2)), tensor, torch.zeros_like(tensor))

    return RolloutBatch(
        image=image, state=state, instructions=("go",) * B, actions=padded(sample.actions), path=padded(sample.path),
        log_prob=padded(sample.log_prob), std=sample.std, mask=mask, rewards=success.float(), success=success,
        valid=torch.ones(B, dtype=torch.bool) if valid is None else valid, scores=torch.full((B,), torch.nan),
        starts=tuple(Start(seed) for seed in range(B // G)), group_size=G,
    )  # fmt: skip


def learn(batch=None, config=CONFIG, updates=1, **flow):
    """Updates a fresh policy; returns its weights as one vector, the metrics, and the learner."""
    learner = Learner.build(make_policy(**flow), config)
    batch = make_batch(learner.policy) if batch is None else batch
    for update in range(updates):
        metrics = update_policy(learner, batch, config, update)
    return weights_of(learner), metrics, learner


def weights_of(learner):
    return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])


def gradient_of(learner):
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


def changed(**settings):
    return dataclasses.replace(CONFIG, **settings)


@pytest.mark.parametrize("algorithm", ["fa_grpo", "flow_grpo", "ppo"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_ratio_is_exactly_one_before_the_first_step(algorithm, mixed_precision):
    config = changed(algorithm=algorithm, mixed_precision=mixed_precision, micro_batch=7)
    _, metrics, _ = learn(config=config)
    assert metrics["ratio_min"] == metrics["ratio_max"] == metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0
    assert metrics["optimizer_steps"] == 1 and metrics["gradient_norm"] > 0
    assert metrics["log_prob_gap"] < (1e-4 if mixed_precision == "no" else 0.5)


def test_rollouts_of_other_weights_show_in_the_gap():
    batch = make_batch(make_policy(seed=1))
    _, metrics, _ = learn(batch)
    assert metrics["log_prob_gap"] > 0.01


def test_after_the_first_step_ratios_differ_from_one():
    _, metrics, _ = learn(config=changed(epochs=2))
    assert metrics["optimizer_steps"] == 2 and metrics["ratio_min"] < 1 < metrics["ratio_max"]
    assert metrics["approx_kl"] > 0 and metrics["ratio_std"] > 0


def test_the_step_follows_the_gradient_of_the_loss_on_the_whole_batch():
    _, _, learner = learn(config=changed(flowscale=OFF, micro_batch=5))
    policy = make_policy()
    batch = make_batch(policy)
    b, s = batch.called.nonzero(as_tuple=True)
    log_prob = torch.zeros_like(batch.log_prob)
    log_prob[b, s] = policy.log_prob(batch.observations(b, s), batch.path[b, s])
    rewards = batch.rewards.reshape(-1, G)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    loss, _ = fa_grpo_loss(
        log_prob, log_prob.detach(), advantages.reshape(B, 1, 1).expand(B, S, CH).contiguous(), batch.mask
    )
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient_of(learner), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_change_nothing(algorithm):
    whole, small = (learn(config=changed(algorithm=algorithm, micro_batch=n))[2] for n in (1000, 3))
    torch.testing.assert_close(gradient_of(small), gradient_of(whole), rtol=1e-4, atol=1e-6)


def test_gradients_of_mini_batches_average_to_that_of_the_batch():
    """At learning rate 0+ the weights stay, so that the gradients of the steps can be compared."""
    still = changed(learning_rate=1e-30, mini_batch=G)
    learner = Learner.build(make_policy(), still)
    steps = []
    learner.optimizer.register_step_pre_hook(lambda *_: steps.append(gradient_of(learner)))
    update_policy(learner, make_batch(learner.policy), still, 0)
    _, _, whole = learn(config=changed(learning_rate=1e-30))
    assert len(steps) == 3  # the fourth group is without contrast
    torch.testing.assert_close(sum(steps) / 4, gradient_of(whole), rtol=1e-4, atol=1e-6)


def test_mini_batches_hold_whole_groups_each_once_and_differ_between_epochs():
    batch = make_batch(make_policy())
    epochs = mini_batches(batch, changed(mini_batch=2 * G, epochs=3), update=5)
    assert [len(plan) for plan in epochs] == [2, 2, 2]
    for plan in epochs:
        assert sorted(torch.cat(plan).tolist()) == list(range(B))
        for rollouts in plan:
            assert (rollouts.reshape(-1, G) // G == rollouts[::G, None] // G).all()
    assert len({tuple(torch.cat(plan).tolist()) for plan in epochs}) > 1
    again = mini_batches(batch, changed(mini_batch=2 * G, epochs=3), update=5)
    assert all(torch.equal(torch.cat(x), torch.cat(y)) for x, y in zip(epochs, again, strict=True))


@pytest.mark.parametrize("algorithm", ["fa_grpo", "flow_grpo", "filtered_bc"])
def test_equal_rewards_move_no_bit_even_after_earlier_updates(algorithm):
    config = changed(algorithm=algorithm, epochs=2, mini_batch=8)
    _, _, learner = learn(config=config, updates=2)
    before = weights_of(learner)
    assert not torch.equal(before, weights_of(Learner.build(make_policy(), CONFIG)))
    equal = torch.zeros(B, dtype=torch.bool)
    metrics = update_policy(learner, make_batch(learner.policy, equal), config, 2)
    assert torch.equal(weights_of(learner), before)
    assert metrics["optimizer_steps"] == 0 and metrics["zero_variance_share"] == 1 and "ratio_mean" not in metrics


def test_equal_rewards_with_a_kl_pull_back_to_the_reference_only():
    config = changed(beta=0.1)
    equal = torch.ones(B, dtype=torch.bool)
    start, metrics, learner = learn(make_batch(make_policy(), equal), config)
    assert torch.equal(start, weights_of(Learner.build(make_policy(), CONFIG))) and metrics["kl"] == 0
    with torch.no_grad():
        learner.policy.head.outputs.bias.add_(0.3)
    losses = []
    for update in range(1, 20):
        batch = make_batch(learner.policy, equal, seed=update)
        losses.append(update_policy(learner, batch, config, update)["kl"])
    assert 0 < losses[-1] < 0.9 * losses[0]


def test_the_kl_is_the_exact_one_between_the_flow_steps():
    config = changed(beta=0.1, flowscale=OFF)
    learner = Learner.build(make_policy(), config)
    with torch.no_grad():
        learner.policy.head.outputs.bias.add_(0.1)
    batch = make_batch(learner.policy)
    b, s = batch.called.nonzero(as_tuple=True)
    obs, path = batch.observations(b, s), batch.path[b, s]
    with torch.no_grad():
        means = [policy.step_mean(obs, path) for policy in (learner.policy, learner.reference)]
    kl = flow_sde.kl_divergence(*means, batch.std[:, None, None]).sum(dim=(1, 3))
    expected = float(kl[batch.mask[b, s]].mean())
    assert update_policy(learner, batch, config, 0)["kl"] == pytest.approx(expected, rel=1e-4) and expected > 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_in_padded_slots_is_inert(algorithm):
    config = changed(algorithm=algorithm, epochs=2, mini_batch=8)
    policy = make_policy()
    clean = make_batch(policy)
    unused = ~clean.called
    dirty = {name: getattr(clean, name).clone() for name in ("state", "path", "actions", "log_prob")}
    for tensor in dirty.values():
        tensor[unused] = torch.nan
    dirty["actions"][~clean.mask] = torch.nan
    dirty["log_prob"].transpose(2, 3)[~clean.mask] = torch.nan
    expected, _, _ = learn(clean, config)
    weights, metrics, _ = learn(dataclasses.replace(clean, **dirty), config)
    assert torch.equal(weights, expected)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_abstained_rollouts_do_not_influence(algorithm):
    """Rollouts 4-7 abstained: whatever they hold, the update is the same, and they are not in the denominator."""
    config = changed(algorithm=algorithm, mini_batch=8)
    valid = torch.arange(B) // G != 1
    batch = make_batch(make_policy(), valid=valid)
    expected, metrics, learner = learn(batch, config)
    other = {"rewards": batch.rewards.clone(), "success": batch.success.clone(), "state": batch.state.clone()}
    other["rewards"][~valid], other["success"][~valid], other["state"][~valid] = torch.nan, True, 7.0
    weights, others_metrics, _ = learn(dataclasses.replace(batch, **other), config)
    assert torch.equal(weights, expected) and metrics["valid_share"] == 0.75
    assert others_metrics["reward_mean"] == metrics["reward_mean"]
    assert metrics["reward_mean"] == pytest.approx(float(SUCCESS[valid].float().mean()))
    lesson = make_lesson(batch, changed(algorithm="fa_grpo"))
    assert not lesson.mask[~valid].any() and lesson.mask[valid].sum() == batch.mask[valid].sum()


def test_flowscale_alpha_one_equals_off_and_other_values_do_not():
    off, full, usual = (
        learn(config=changed(flowscale=scale))[2] for scale in (OFF, FlowScaleConfig(alpha=1.0), FlowScaleConfig())
    )
    torch.testing.assert_close(gradient_of(full), gradient_of(off), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(gradient_of(usual), gradient_of(off), rtol=0.01)


def test_filtered_bc_sees_successes_only_and_lowers_their_imitation_loss():
    config = changed(algorithm="filtered_bc", learning_rate=3e-3, epochs=30)
    batch = make_batch(make_policy())
    expected, _, learner = learn(batch, config)
    other = {"actions": batch.actions.clone(), "image": batch.image.clone()}
    other["actions"][~SUCCESS], other["image"][~SUCCESS] = 0.9, 0
    assert torch.equal(learn(dataclasses.replace(batch, **other), config)[0], expected)
    b, s = (batch.called & SUCCESS[:, None]).nonzero(as_tuple=True)

    def loss(policy):
        generator = torch.Generator().manual_seed(0)
        arguments = batch.observations(b, s), batch.actions[b, s], generator
        return float(policy.imitation_loss(*arguments, mask=batch.mask[b, s]).detach())

    assert loss(learner.policy) < 0.95 * loss(make_policy())


def test_dynamic_sampling_changes_the_denominator_and_not_the_direction():
    plain, dynamic = (learn(config=changed(dynamic_sampling=on))[2] for on in (False, True))
    batch = make_batch(make_policy())
    share = float(batch.mask[torch.arange(B) // G != 2].sum() / batch.mask.sum())
    torch.testing.assert_close(gradient_of(plain), gradient_of(dynamic) * share, rtol=1e-4, atol=1e-6)


def test_gradient_norms_of_the_flow_steps_are_even_with_flowscale():
    norms = {}
    for name, scale in (("off", OFF), ("on", FlowScaleConfig(alpha=0.0))):
        _, metrics, _ = learn(config=changed(flowscale=scale, log_grad_every=1))
        norms[name] = np.array([metrics[f"gradient_norm_flow_step_{k}"] for k in (1, 2, 3)])
    weights = norms["on"] / norms["off"]
    std = flow_sde.schedule(3, 0.5).std.numpy()
    np.testing.assert_allclose(weights, std / std.mean(), rtol=1e-3)
    assert "gradient_norm_flow_step_1" not in learn(config=changed(log_grad_every=2), updates=2)[1]


def test_a_last_step_without_noise_is_left_out():
    config = changed(last_step="ode", log_grad_every=1, algorithm="flow_grpo", epochs=2)
    learner = Learner.build(make_policy(), config)
    metrics = update_policy(learner, make_batch(learner.policy), config, 0)
    assert "gradient_norm_flow_step_2" in metrics and "gradient_norm_flow_step_3" not in metrics
    assert metrics["ratio_std"] > 0


def test_learning_rate_warms_up_and_frozen_trunk_stays():
    config = changed(warmup_updates=4, freeze_trunk=True)
    _, metrics, learner = learn(config=config, updates=2)
    assert metrics["learning_rate"] == pytest.approx(0.5e-3)
    old, new = make_policy().state_dict(), learner.policy.state_dict()
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"head"}


def test_a_frozen_trunk_is_asked_once_and_nothing_else_changes():
    class Counting(SmallFlowPolicy):
        rows, use = 0, True

        def encode(self, obs):
            if self.use and "features" in obs:
                return obs["features"]
            self.rows += len(obs["image"])
            return super().encode({name: value for name, value in obs.items() if name != "features"})

    config = changed(freeze_trunk=True, epochs=2, beta=0.1)
    policies = []
    for use in (True, False):
        policy = make_policy()
        policy.__class__, policy.use, policy.rows = Counting, use, 0
        learner = Learner.build(policy, config)
        batch = make_batch(policy)
        policy.rows = 0
        update_policy(learner, batch, config, 0)
        policies.append(policy)
    once, often = policies
    assert once.rows == int(batch.called.sum()) + 1 and often.rows > 2.5 * once.rows
    for name, value in once.state_dict().items():
        torch.testing.assert_close(value, often.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_gradient_clipping_bounds_the_step():
    _, metrics, learner = learn(config=changed(grad_clip=1e-3))
    assert metrics["gradient_norm"] > 1e-3 and gradient_of(learner).norm() == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_saves_the_mini_batch(tmp_path):
    learner = Learner.build(make_policy(), CONFIG)
    batch = make_batch(learner.policy)
    path = batch.path.clone()
    path[3, 0, 1] = torch.inf
    before = weights_of(learner)
    saved = tmp_path / "failed_batch.safetensors"
    with pytest.raises(FloatingPointError, match="failed_batch.safetensors"):
        update_policy(learner, dataclasses.replace(batch, path=path), CONFIG, 7, failed_batch=saved)
    assert torch.equal(weights_of(learner), before)
    with safetensors.safe_open(saved, "pt") as stream:
        row = stream.get_tensor("rollouts").tolist().index(3)
        assert stream.get_tensor("path")[row, 0, 1].isinf().all() and stream.metadata()["update"] == "7"
    assert [file.name for file in tmp_path.iterdir()] == [saved.name]


def test_rollouts_without_noise_are_refused():
    policy = make_policy()
    batch = dataclasses.replace(make_batch(policy), std=torch.zeros(3))
    with pytest.raises(ValueError, match="mode='sde'"):
        update_policy(Learner.build(policy, CONFIG), batch, CONFIG, 0)


def test_generalised_advantages_by_hand():
    values = torch.tensor([[0.5, 0.2, 9.0], [0.1, 0.4, 0.3]])
    called = torch.tensor([[True, True, False], [True, True, True]])
    advantages, returns = generalised_advantages(values, torch.tensor([1.0, 0.0]), called, gamma=0.9, gae_lambda=0.5)
    last = 1.0 - 0.2
    expected = torch.tensor(
        [[0.9 * 0.2 - 0.5 + 0.45 * last, last, 0.0], [0.26 + 0.45 * (-0.13 - 0.45 * 0.3), -0.13 - 0.45 * 0.3, -0.3]]
    )
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(called, expected + values, 0.0))
    _, targets = generalised_advantages(values, torch.tensor([1.0, 0.0]), called, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(targets, torch.where(called, torch.tensor([[1.0], [0.0]]), 0.0))


def test_standardise_ignores_what_is_masked():
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    result = standardise(values, mask)
    torch.testing.assert_close(result, torch.tensor([[-1.2247, 0.0], [0.0, 1.2247]]), atol=1e-3, rtol=0)


def test_the_critic_learns_to_tell_good_starts_from_bad():
    """The second half of the groups starts from another kind of image, and succeeds."""
    config = changed(algorithm="ppo", epochs=4, learning_rate=1e-6)
    learner = Learner.build(make_policy(), config)
    success = torch.arange(B) >= B // 2
    batch = make_batch(learner.policy, success)
    image = batch.image.clone()
    image[success] = image[success] // 4
    batch = dataclasses.replace(batch, image=image)
    first = update_policy(learner, batch, config, 0)
    for update in range(1, 15):
        last = update_policy(learner, batch, config, update)
    assert last["value_loss"] < 0.3 * first["value_loss"] and last["explained_variance"] > 0.7


def test_a_policy_that_lacks_what_the_settings_ask_for_is_refused():
    class Bare(torch.nn.Linear):
        pass

    for settings, message in (
        ({"freeze_trunk": True}, "freeze_trunk needs Bare.trunk"),
        ({"noise_level": 0.3}, "set_flow"),
        ({"algorithm": "filtered_bc"}, "imitation_loss"),
        ({}, "save_pretrained"),
    ):
        with pytest.raises(ValueError, match=message):
            Learner.build(Bare(1, 1), changed(**settings))
    policy = make_policy()
    policy.encode = None
    with pytest.raises(ValueError, match="use 'fa_grpo'"):
        Learner.build(policy, changed(algorithm="ppo"))
