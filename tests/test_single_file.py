"""The single-file example computes what the library computes: flow, weights, advantages, loss and gradient."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prophrl_agents import fa_grpo_loss, flowscale_weights, group_advantages
from prophrl_agents.flow_sde import schedule


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "fa_grpo_single_file.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


def test_loss_and_gradient_equal_the_librarys(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    calls, steps, chunk, dims = 6, 5, 4, 3
    old = torch.randn(calls, steps, chunk, dims, generator=generator)
    new = old + 0.1 * torch.randn(old.shape, generator=generator)  # ratios on both sides of both clips
    advantages = torch.randn(calls, generator=generator)
    weights = flowscale_weights(schedule(steps, 0.5).std)
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss, ratio = example.fa_grpo_loss(ours, old, advantages, weights, 0.2, 0.28)
    expected, metrics = fa_grpo_loss(
        theirs[:, None],
        old[:, None],
        advantages[:, None, None].expand(calls, 1, chunk),
        torch.ones(calls, 1, chunk, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.28,
        weights=weights.expand(calls, 1, steps),
    )
    assert metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0
    torch.testing.assert_close(loss, expected)
    assert float(ratio.mean()) == pytest.approx(metrics["ratio_mean"])
    loss.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_flow_and_weights_equal_the_librarys(example: ModuleType, steps: int) -> None:
    flow, library = example.make_flow(steps, 0.5), schedule(steps, 0.5)
    for name in ("std", "c_x", "c_v"):
        torch.testing.assert_close(getattr(flow, name), getattr(library, name))
    torch.testing.assert_close(flow.t, library.t[:-1])
    torch.testing.assert_close(example.flowscale_weights(flow.std), flowscale_weights(library.std))


def test_advantages_equal_the_librarys(example: ModuleType) -> None:
    reward = torch.tensor([0.0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0])
    valid = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    torch.testing.assert_close(
        example.group_advantages(reward, valid, 4), group_advantages(reward, 4, valid=valid), atol=1e-5, rtol=1e-5
    )
