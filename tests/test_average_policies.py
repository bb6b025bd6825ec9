"""The mean of policies: of their weights, by the shares asked for, and of nothing that does not go together."""

import dataclasses
import sys

import pytest
import torch
from reach import make_reach_policy

from prophet_gym.averaging import shares_of
from prophrl_agents import SmallFlowPolicy
from prophrl_agents.cli import main
from prophrl_agents.policies.average import average_policies


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two policies with one normalisation and other weights."""
    root = tmp_path_factory.mktemp("policies")
    for name, seed in (("one", 0), ("two", 1)):
        policy = make_reach_policy(seed=seed)
        policy.normalizer.state_mean.copy_(torch.linspace(0.1, 0.7, 4))  # a third of each, three times, is another
        policy.save_pretrained(root / name)
    return [root / "one", root / "two"]


def states(*folders):
    return [SmallFlowPolicy.from_pretrained(folder).state_dict() for folder in folders]


def test_the_mean_has_the_shares_asked_for(pair):
    first, second = states(*pair)
    mean = average_policies(pair, [3, 1]).state_dict()
    moved = 0
    of_three = average_policies([*pair, pair[0]], [1, 2, 4]).state_dict()
    assert all(torch.equal(of_three[name], first[name]) for name in first if name.startswith("normalizer."))
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], msg=name)
        moved += not torch.equal(first[name], second[name])
    assert moved > 5


def test_the_command_saves_equal_shares_and_replaces_nothing(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["prophrl", "average", str(tmp_path / "mean"), *map(str, pair), "--dtype", "float16"]
    )
    main()
    first, second, mean = states(*pair, tmp_path / "mean")
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=2e-3) for name in mean)
    assert "measure it with prophrl eval" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main()
    assert "exists already" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(pair, tmp_path):
    other = SmallFlowPolicy.from_pretrained(pair[0])
    other.normalizer.state_mean += 1
    other.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"scaled differs from .*one in normalizer\.state_mean"):
        average_policies([pair[0], tmp_path / "scaled"])
    config = dataclasses.replace(other.config, noise_level=other.config.noise_level / 2)
    SmallFlowPolicy(config, other.normalizer.statistics()).save_pretrained(tmp_path / "noisier")
    with pytest.raises(ValueError, match=r"differs from .* in config\.noise_level"):
        average_policies([pair[0], tmp_path / "noisier"])


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        (None, 1, "1 to average; expected at least 2 policies"),
        ([1.0], 2, "1 weights for 2 policies; give one each, or none"),
        ([1.0, 0.0], 2, "expected numbers above 0"),
        ([1.0, float("nan")], 2, "expected numbers above 0"),
    ],
)
def test_bad_shares_are_refused(weights, count, message):
    with pytest.raises(ValueError, match=message):
        shares_of(weights, count, "policies")
