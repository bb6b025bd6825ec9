"""The contract of flow policies, on the small one: ratio 1 to the bit, randomness by argument, save and load."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from prophrl_agents import (
    FlowPolicy,
    FlowSample,
    PolicyStatistics,
    SmallFlowPolicy,
    SmallFlowPolicyConfig,
    fa_grpo_loss,
    flow_sde,
    flowscale_weights,
)

VOCABULARY = ("blue", "block", "on", "plate", "push", "put", "red", "the")
INSTRUCTIONS = ["put the red block on the blue plate", "push the red block"]
LOW, HIGH = np.array([-0.04] * 3 + [-0.25] * 3 + [0.0]), np.array([0.04] * 3 + [0.25] * 3 + [1.0])
STATISTICS = PolicyStatistics(
    action_mean=np.array([0.01, 0, -0.01, 0, 0, 0, 0.5]),
    action_std=np.array([0.02, 0.02, 0.02, 0, 0, 0.1, 0.5]),
    action_low=LOW,
    action_high=HIGH,
    state_mean=np.zeros(8),
    state_std=np.array([0.1, 0.1, 0.1, 1, 1, 1, 0.5, 0]),
)
TINY = SmallFlowPolicyConfig(
    VOCABULARY, image_size=16, chunk_length=4, trunk_width=8, feature_dim=32, head_width=32, head_blocks=2
)


def observe(batch, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8),
        "state": rng.normal(size=(batch, 8)).astype(np.float32),
        "instruction": [INSTRUCTIONS[i % 2] for i in range(batch)],
    }


def randomise(policy, seed=0):
    """Gives every weight a value, also those that start at zero, so that the velocity depends on everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*seeds):
    return [seeded(seed) for seed in seeds]


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return randomise(SmallFlowPolicy(TINY, STATISTICS))


def test_it_answers_the_contract(policy):
    assert isinstance(policy, FlowPolicy)
    sample = policy.sample(observe(3), seeded())
    assert isinstance(sample, FlowSample)
    assert sample.actions.shape == (3, 4, 7) and sample.actions.dtype == torch.float32
    assert sample.path.shape == (3, 6, 4, 7) and sample.log_prob.shape == (3, 5, 4, 7) and sample.std.shape == (5,)
    assert not sample.path.requires_grad and torch.equal(sample.std, flow_sde.schedule(5, 0.5).std)


def test_default_size_is_at_most_five_million():
    policy = SmallFlowPolicy(SmallFlowPolicyConfig(VOCABULARY), STATISTICS)
    assert 1_000_000 < sum(parameter.numel() for parameter in policy.parameters()) <= 5_000_000


@pytest.mark.parametrize("config", [TINY, SmallFlowPolicyConfig(VOCABULARY)], ids=["tiny", "default"])
@pytest.mark.parametrize("last_step", ["sde", "ode"])
@pytest.mark.parametrize("batch", [1, 5])
def test_ratio_is_one_to_the_bit_before_the_first_update(config, last_step, batch):
    policy = randomise(SmallFlowPolicy(dataclasses.replace(config, last_step=last_step), STATISTICS))
    obs = observe(batch, config.image_size)
    sample = policy.sample(obs, seeded())
    log_prob = policy.log_prob(obs, sample.path)
    assert log_prob.requires_grad and log_prob.dtype == torch.float32
    assert torch.equal(log_prob, sample.log_prob)
    advantages = torch.randn(batch, 1, config.chunk_length, generator=seeded())
    mask = torch.ones_like(advantages, dtype=torch.bool)
    weights = flowscale_weights(sample.std).expand(batch, 1, -1)
    _, metrics = fa_grpo_loss(log_prob[:, None], sample.log_prob[:, None], advantages, mask, weights=weights)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


def test_step_mean_gives_the_exact_kl(policy):
    obs = observe(3)
    sample = policy.sample(obs, seeded())
    reference = randomise(SmallFlowPolicy(TINY, STATISTICS), seed=5)
    mean, mean_ref = policy.step_mean(obs, sample.path), reference.step_mean(obs, sample.path)
    std = sample.std[:, None, None]
    assert torch.equal(flow_sde.log_prob(sample.path[:, 1:], mean, std), policy.log_prob(obs, sample.path))
    assert (flow_sde.kl_divergence(mean, mean, std) == 0).all()
    assert (flow_sde.kl_divergence(mean, mean_ref, std) > 0).any()


def test_gradients_of_the_policy_match_finite_differences():
    policy = randomise(SmallFlowPolicy(TINY, STATISTICS)).double()
    obs = observe(2)
    sample = policy.sample(obs, seeded())
    assert sample.log_prob.dtype == torch.float64
    old = sample.log_prob + 0.02 * torch.randn(sample.log_prob.shape, generator=seeded(1), dtype=torch.float64)
    advantages = torch.randn(2, 1, 4, generator=seeded(2), dtype=torch.float64)

    def loss():
        log_prob = policy.log_prob(obs, sample.path)[:, None]
        return fa_grpo_loss(log_prob, old[:, None], advantages, torch.ones(2, 1, 4, dtype=torch.bool))[0]

    loss().backward()
    for parameter in (policy.head.outputs.weight, policy.head.condition.weight, policy.trunk.stem.weight):
        direction = torch.randn(parameter.shape, generator=seeded(3), dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(loss().item())
                parameter.sub_(step * direction)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4)


def test_every_parameter_gets_a_gradient(policy):
    obs = observe(4)
    policy.log_prob(obs, policy.sample(obs, seeded()).path).sum().backward()
    dead = [name for name, parameter in policy.named_parameters() if not (parameter.grad != 0).any()]
    assert dead == []


def test_randomness_is_the_generator_only(policy):
    obs = observe(3)
    first = policy.sample(obs, seeded(4))
    torch.manual_seed(99)
    assert torch.equal(first.path, policy.sample(obs, seeded(4)).path)
    assert not torch.equal(first.path, policy.sample(obs, seeded(5)).path)


def test_a_row_does_not_depend_on_its_batch(policy):
    obs = observe(3)
    batch = policy.sample(obs, rows(1, 2, 3))
    lone = policy.sample({key: value[1:2] for key, value in obs.items()}, rows(2))
    assert torch.equal(batch.path[1:2, 0], lone.path[:, 0])
    assert torch.allclose(batch.path[1:2], lone.path, atol=1e-5)


def test_ode_mode_is_the_deterministic_flow_from_the_same_noise(policy):
    obs = observe(2)
    sample = policy.sample(obs, rows(1, 2), mode="ode")
    assert (sample.std == 0).all() and (sample.log_prob == 0).all()
    assert torch.equal(sample.path[:, 0], policy.sample(obs, rows(1, 2)).path[:, 0])
    assert torch.equal(sample.actions, policy.predict_action_chunk(obs, rows(1, 2)))
    with pytest.raises(ValueError, match="mode is 'mean'"):
        policy.sample(obs, seeded(), mode="mean")


def test_actions_are_native_and_inside_the_bounds(policy):
    sample = policy.sample(observe(64), seeded())
    low, high = torch.tensor(LOW, dtype=torch.float32), torch.tensor(HIGH, dtype=torch.float32)
    assert (sample.actions >= low).all() and (sample.actions <= high).all()
    assert (sample.actions[..., 3:5] == 0).all(), "a dimension that never moved in the data stays at its mean"
    inside = (sample.actions[..., 0] > -0.04) & (sample.actions[..., 0] < 0.04)
    native = 0.01 + 0.02 * sample.path[:, -1, :, 0]
    assert inside.any() and torch.allclose(sample.actions[..., 0][inside], native[inside], atol=1e-7)
    assert not inside.all()
    assert ((native[~inside] <= -0.04) | (native[~inside] >= 0.04)).all()


def test_normalisation_round_trip_and_statistics_from_data():
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(500, 7)) * 0.01
    actions[:, 4] = 0.002
    statistics = PolicyStatistics.from_data(actions, rng.normal(size=(500, 8)), -np.ones(7), np.ones(7))
    normalizer = SmallFlowPolicy(TINY, statistics).normalizer
    chunk = torch.tensor(actions, dtype=torch.float32)
    normalised = normalizer.normalize_actions(chunk)
    moving = torch.arange(7) != 4
    assert normalised.mean(0).abs().max() < 1e-4 and (normalised[:, 4] == 0).all()
    assert torch.allclose(normalised.std(0, unbiased=False)[moving], torch.ones(6), atol=1e-3)
    assert torch.allclose(normalizer.denormalize_actions(normalised), chunk, atol=1e-7)


def test_select_action_plays_the_chunk_and_reset_drops_it(policy):
    obs = observe(2)
    chunk = policy.predict_action_chunk(obs, rows(1, 2))
    generators = rows(1, 2)
    played = torch.stack([policy.select_action(obs, generators) for _ in range(4)], dim=1)
    assert torch.equal(played, chunk)
    policy.select_action(obs, generators)
    with pytest.raises(ValueError, match="batch of 3, expected 2"):
        policy.select_action(observe(3), seeded())
    policy.reset()
    assert torch.equal(policy.select_action(obs, rows(1, 2)), chunk[:, 0])


def test_instruction_image_and_state_all_matter(policy):
    obs = observe(1)
    base = policy.encode(obs)
    for change in (
        {"instruction": [INSTRUCTIONS[1]]},
        {"instruction": ["put the blue block on the red plate"]},
        {"image": 255 - obs["image"]},
        {"state": obs["state"] + 0.1},
    ):
        assert not torch.allclose(policy.encode({**obs, **change}), base, atol=1e-5)


def test_imitation_learns_what_the_instruction_says():
    """One image and one state for all rows: only the words tell the two targets, 4 cm apart, from each other."""
    torch.manual_seed(0)
    policy = SmallFlowPolicy(TINY, STATISTICS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    obs, generator = observe(32), seeded()
    obs["image"][:], obs["state"][:] = obs["image"][0], obs["state"][0]
    target = torch.zeros(32, 4, 7)
    target[:, :, 0] = torch.tensor([0.03 if i % 2 else -0.01 for i in range(32)])[:, None]
    target[:, :, 6] = 1.0
    for _ in range(150):
        loss = policy.imitation_loss(obs, target, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (policy.predict_action_chunk(obs, seeded(1)) - target).abs().mean(dim=(0, 1))
    assert error[0] < 0.04 / 4 and error[6] < 0.15, error


def test_imitation_mask_is_inert_outside(policy):
    obs, actions = observe(2), torch.rand(2, 4, 7) * 0.02
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    padded = actions.masked_fill(~mask[..., None], float("nan"))
    clean, dirty = (policy.imitation_loss(obs, a, seeded(), mask=mask) for a in (actions, padded))
    assert torch.equal(clean, dirty)
    dirty.backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters() if parameter.grad is not None)


def test_set_flow_changes_the_flow_and_nothing_else(policy):
    policy.set_flow(num_flow_steps=3, noise_level=0.2, last_step="ode")
    sample = policy.sample(observe(2), seeded())
    assert torch.equal(sample.std, flow_sde.schedule(3, 0.2, last_step="ode").std)
    assert policy.config.chunk_length == 4
    with pytest.raises(ValueError, match="noise_level is -1"):
        policy.set_flow(noise_level=-1.0)


def test_save_and_load_reproduce_the_bytes(policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    loaded = SmallFlowPolicy.from_pretrained(tmp_path / "policy")
    assert loaded.config == policy.config
    obs = observe(3)
    one, two = policy.sample(obs, seeded()), loaded.sample(obs, seeded())
    assert torch.equal(one.actions, two.actions) and torch.equal(one.log_prob, two.log_prob)
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["config.json", "model.safetensors"]
    policy.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = SmallFlowPolicy.from_pretrained(tmp_path / "half")
    assert torch.equal(half.normalizer.action_std, policy.normalizer.action_std)
    assert torch.allclose(half.sample(obs, seeded()).actions, one.actions, atol=0.01)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "policy")]
    assert sizes[0] < 0.7 * sizes[1]


def test_half_precision_weights_keep_float32_log_probs_and_ratio_one(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    policy = SmallFlowPolicy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    obs = observe(3)
    sample = policy.sample(obs, seeded())
    assert policy.head.outputs.weight.dtype == torch.bfloat16 and sample.path.dtype == torch.float32
    assert torch.equal(policy.log_prob(obs, sample.path), sample.log_prob)


def edit(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, chunk_lenght=4), "did you mean 'chunk_length'"),
        (lambda f: edit(f, chunk_length=6), "do not fit its config"),
        (lambda f: edit(f, chunk_length="6"), "chunk_length is '6'"),
        (lambda f: edit(f, policy="OtherPolicy"), "holds policy 'OtherPolicy'"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not weights"), "cannot be read"),
    ],
)
def test_loading_refuses(policy, tmp_path, damage, message):
    policy.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        SmallFlowPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": np.zeros((2, 3, 16, 16), np.uint8)},
            r"image has shape \(2, 3, 16, 16\), expected \(B, H=16, W=16, 3=3\)",
        ),
        ({"image": np.zeros((2, 16, 16, 3), np.float32)}, "expected uint8"),
        ({"state": np.zeros((2, 16), np.float32)}, "state has shape"),
        ({"state": np.full((2, 8), np.nan, np.float32)}, "NaN"),
        ({"state": np.zeros((3, 8), np.float32)}, "B=2"),
        ({"instruction": INSTRUCTIONS[0]}, "sequence of 2 strings"),
        ({"instruction": ["fold the towel"] * 2}, r"unknown words \['fold', 'towel'\]"),
    ],
)
def test_observations_are_checked(policy, change, message):
    with pytest.raises(ValueError, match=message):
        policy.encode({**observe(2), **change})


def test_missing_observation_keys_are_named(policy):
    obs = observe(2)
    del obs["instruction"]
    with pytest.raises(ValueError, match=r"\['instruction'\] missing"):
        policy.encode(obs)


def test_paths_statistics_and_samples_are_checked(policy):
    obs = observe(2)
    path = policy.sample(obs, seeded()).path
    with pytest.raises(ValueError, match=r"path has shape \(2, 5, 4, 7\), expected \(B=2, K\+1=6"):
        policy.log_prob(obs, path[:, 1:])
    with pytest.raises(ValueError, match="expected action_dim=14"):
        SmallFlowPolicy(dataclasses.replace(TINY, action_dim=14), STATISTICS)
    with pytest.raises(ValueError, match="is not below action_high"):
        dataclasses.replace(STATISTICS, action_low=HIGH)
    with pytest.raises(ValueError, match="std >= 0; is there NaN"):
        PolicyStatistics.from_data(np.full((3, 7), np.nan), np.zeros((3, 8)), LOW, HIGH)
    sample = policy.sample(obs, seeded())
    with pytest.raises(ValueError, match="path is torch.bfloat16"):
        dataclasses.replace(sample, path=sample.path.bfloat16())
    with pytest.raises(ValueError, match=r"std has shape \(4,\), expected \(K=5\)"):
        dataclasses.replace(sample, std=sample.std[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 20}, "multiple of 8"),
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"vocabulary": ()}, "at least one word"),
        ({"vocabulary": None}, "vocabulary is None, expected a tuple or list of words"),
        ({"vocabulary": "push"}, "vocabulary is 'push'"),
        ({"noise_level": -0.5}, "noise_level is -0.5"),
    ],
)
def test_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_device_that_is_not_there_is_refused():
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{device}'.*expected"):
            SmallFlowPolicy.from_pretrained("tabletop-sft", device=device)


def test_command_info_prints_schedule_and_refuses_nonsense(capsys, monkeypatch):
    from prophrl_agents import cli

    monkeypatch.setattr("sys.argv", ["prophrl", "info", "--num-flow-steps", "3", "--noise-level", "0.6"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("clip_high" in line and "0.28" in line for line in lines)
    table = [line.split() for line in lines[-3:]]
    flow = flow_sde.schedule(3, 0.6)
    for k, row in enumerate(table):
        numbers = [flow.t[k], flow.dt[k], flow.std[k], -flow.c_v[k] / flow.std[k], flowscale_weights(flow.std)[k]]
        assert [float(cell) for cell in row[1:6]] == pytest.approx([float(n) for n in numbers], abs=1e-4)
    monkeypatch.setattr("sys.argv", ["prophrl", "info", "--num-flow-steps", "0"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2 and "num_flow_steps is 0" in capsys.readouterr().err
