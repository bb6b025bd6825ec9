"""Group advantages and masks."""

import pytest
import torch

from prophrl_agents import chunk_mask, dynamic_sampling_mask, group_advantages, zero_variance_groups

REWARDS = torch.tensor([1.0, 0, 0, 1, 0.5, 0, 0, 0])


def test_population_norm_equals_the_formula_per_group():
    advantages = group_advantages(REWARDS, 4)
    for group, result in zip(REWARDS.view(2, 4), advantages.view(2, 4), strict=True):
        expected = (group - group.mean()) / (group.std(unbiased=False) + 1e-6)
        assert torch.allclose(result, expected)


def test_dr_grpo_and_leave_one_out():
    plain = group_advantages(REWARDS, 4, norm="none")
    assert torch.allclose(plain, (REWARDS.view(2, 4) - REWARDS.view(2, 4).mean(1, keepdim=True)).flatten())
    rloo = group_advantages(REWARDS, 4, norm="rloo")
    for i in range(8):
        group = REWARDS.view(2, 4)[i // 4]
        others = torch.cat([group[: i % 4], group[i % 4 + 1 :]])
        assert rloo[i] == pytest.approx((REWARDS[i] - others.mean()).item())


@pytest.mark.parametrize("norm", ["population", "none", "rloo"])
def test_equal_rewards_give_exactly_zero(norm):
    inexact = 0
    for value in (0.1, 0.3, 0.7, 0.9):
        for size in (3, 5, 6, 7, 8, 12):
            rewards = torch.full((2 * size,), value)
            inexact += bool((rewards[:size].sum() / size != rewards[0]).item())
            assert torch.equal(group_advantages(rewards, size, norm=norm), torch.zeros(2 * size))
            assert zero_variance_groups(rewards, size).tolist() == [True, True]
    assert inexact > 0, "the float mean of equal rewards has to differ from them somewhere, or this tests nothing"


@pytest.mark.parametrize("norm", ["population", "none", "rloo"])
def test_abstained_members_are_inert(norm):
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 0, 1, nan, nan, 1, nan])
    valid = rewards.isfinite()
    advantages = group_advantages(rewards, 4, valid=valid, norm=norm)
    assert torch.allclose(advantages[[0, 2, 3]], group_advantages(torch.tensor([1.0, 0, 1]), 3, norm=norm))
    assert (advantages[~valid] == 0).all()
    assert (advantages[4:] == 0).all(), "one valid member has nothing to be compared with"


def test_dynamic_sampling_drops_flat_groups_and_invalid_members():
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 1])
    valid = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert zero_variance_groups(rewards, 2, valid=valid).tolist() == [True, True, False, True]
    assert dynamic_sampling_mask(rewards, 2, valid=valid).tolist() == [False] * 4 + [True, True] + [False] * 2


def test_integer_and_bool_rewards_are_accepted():
    assert torch.equal(group_advantages(REWARDS.long()[:4], 4), group_advantages(REWARDS[:4], 4))
    assert torch.equal(group_advantages(REWARDS[:4].bool(), 4), group_advantages(REWARDS[:4], 4))


@pytest.mark.parametrize(
    ("rewards", "arguments", "message"),
    [
        (torch.zeros(8), dict(group_size=1), "at least 2"),
        (torch.zeros(7), dict(group_size=4), "multiple of group_size 4"),
        (torch.zeros(2, 4), dict(group_size=4), r"shape \(2, 4\), expected \(B\)"),
        (torch.zeros(8), dict(group_size=4, norm="std"), "norm is 'std'"),
        (torch.tensor([0.0, float("nan")]), dict(group_size=2), r"rewards \[1\] are not finite"),
        (torch.zeros(8), dict(group_size=4, valid=torch.ones(8)), "valid has dtype"),
        (torch.zeros(8), dict(group_size=4, valid=torch.ones(4, dtype=torch.bool)), r"valid has shape \(4,\)"),
    ],
)
def test_bad_input(rewards, arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **arguments)


def test_chunk_mask_includes_the_terminal_command():
    done = torch.zeros(4, 2, 3, dtype=torch.bool)
    done[0, 0, 1] = True  # inside the first chunk
    done[1, 0, 2] = True  # last command of the first chunk
    done[2, 1, 0] = True
    done[2, 1, 2] = True  # a second flag changes nothing
    expected = [
        [[1, 1, 0], [0, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
        [[1, 1, 1], [1, 0, 0]],
        [[1, 1, 1], [1, 1, 1]],  # never done
    ]
    mask = chunk_mask(done)
    assert mask.dtype == torch.bool and mask.int().tolist() == expected
    with pytest.raises(ValueError, match="expected torch.bool"):
        chunk_mask(done.float())
    with pytest.raises(ValueError, match="B batch, S policy calls, CH commands"):
        chunk_mask(done[0])
