"""The value network of algorithm "ppo", and generalised advantage estimation over policy calls.

The critic reads the policy's own features (``policy.encode``), which are held fixed for it: it needs no trunk, knows
the instruction, and cannot disturb the policy. Network and optimiser are its own, so there is no value coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prophrl_agents.gradients import Averages, sum_gradients, sum_over_processes
from prophrl_agents.shapes import check_shape

__all__ = ["Critic", "fit_critic", "generalised_advantages", "standardise"]


class Critic(nn.Module):
    """Maps the features of a policy call to the reward expected from it on.

    Args:
        feature_dim: length F of the policy's features.
        width: hidden width.
    """

    def __init__(self, feature_dim: int, width: int = 256) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.layers = nn.Sequential(
            nn.LayerNorm(feature_dim), nn.Linear(feature_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 1)
        )  # fmt: skip

    @classmethod
    def for_policy(cls, policy: Any, seed: int) -> Critic:
        """Returns a critic that fits ``policy.encode``; its weights follow from the seed.

        Raises:
            ValueError: the policy shows no features.
        """
        feature_dim = getattr(getattr(policy, "config", None), "feature_dim", None)
        if not callable(getattr(policy, "encode", None)) or feature_dim is None:
            raise ValueError(
                f"algorithm 'ppo' with a {type(policy).__name__}: expected encode(obs) -> (B, F) and "
                "config.feature_dim, which the critic reads; add them or use 'fa_grpo', which needs no critic"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(feature_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Returns values (M,) of features (M, F)."""
        return self.layers(features)[:, 0]


def generalised_advantages(
    values: Tensor, rewards: Tensor, called: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Returns (advantages, returns), both (B, S), 0 where the policy was not called.

    The reward of a rollout comes with its last policy call; after it the value is 0, also at the horizon, where the
    judge has spoken.

    Args:
        values: (B, S) estimates before each policy call.
        rewards: (B,) reward of each rollout.
        called: (B, S) bool, True up to the last policy call.
        gamma: discount per policy call.
        gae_lambda: decay of the exponential average over horizons.
    """
    sizes: dict[str, int] = {}
    check_shape("values", values, "B S", sizes)
    check_shape("called", called, "B S", sizes)
    check_shape("rewards", rewards, "B", sizes)
    values = torch.where(called, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    later = torch.zeros_like(called[:, 0])
    for s in reversed(range(values.shape[1])):
        reward = torch.where(later, 0.0, rewards.to(values.dtype))
        advantage = reward + gamma * next_value - values[:, s] + gamma * gae_lambda * next_advantage
        advantages[:, s] = torch.where(called[:, s], advantage, 0.0)
        next_value, next_advantage, later = values[:, s], advantages[:, s], called[:, s] | later
    return advantages, advantages + values


def standardise(values: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns values with mean 0 and standard deviation 1 over ``mask`` and all processes; 0 outside."""
    mean, variance = _moments(values[mask])
    return torch.where(mask, (values - mean) / (variance**0.5 + eps), 0.0)


def fit_critic(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    returns: Tensor,
    steps: Sequence[Tensor],
    averages: Averages,
    grad_clip: float,
) -> None:
    """Regresses the critic on returns, one optimiser step per entry of ``steps``.

    Args:
        critic: changed in place.
        optimizer: its optimiser.
        features: (M, F) of policy calls.
        returns: (M,).
        steps: index tensors into M, as many on every process.
        averages: gets ``value_loss`` and ``explained_variance`` (before the first step).
        grad_clip: largest gradient norm.

    Raises:
        FloatingPointError: the loss or its gradient is not finite.
    """
    parameters = list(critic.parameters())
    with torch.no_grad():
        unexplained, variance = _moments(returns - critic(features))[1], _moments(returns)[1]
    if variance > 0:
        averages.add([("explained_variance", 1 - unexplained / variance)])
    for rows in steps:
        (count,) = sum_over_processes([len(rows)])
        if not count:
            continue
        optimizer.zero_grad(set_to_none=True)
        loss = (critic(features[rows]) - returns[rows]).square().sum() / count
        loss.backward()
        sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the critic's gradient has norm {norm}; lower ppo.critic_learning_rate")
        optimizer.step()
        averages.add([("value_loss", float(loss.detach()) * count / max(len(rows), 1))], len(rows))


def _moments(values: Tensor) -> tuple[float, float]:
    """Returns mean and variance of (M,) values over all processes; 0 without any."""
    exact = values.double()
    count, total, squares = sum_over_processes([len(exact), float(exact.sum()), float(exact.square().sum())])
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean**2, 0.0)
