"""``Learner``: the weights that learn and what moves them; all of it that a checkpoint must hold."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prophrl_agents.config import TrainConfig
from prophrl_agents.critic import Critic
from prophrl_agents.policies.base import FlowPolicy

__all__ = ["Learner", "TrainablePolicy"]


class TrainablePolicy(FlowPolicy, Protocol):
    """A :class:`FlowPolicy` that is a ``torch.nn.Module`` and can be saved.

    Some settings ask for more: ``freeze_trunk`` for a submodule ``trunk``, flow settings for ``set_flow``, ``beta`` and
    ``ema_decay`` for a network that ``copy.deepcopy`` copies, "filtered_bc" for ``imitation_loss``, "ppo" for
    ``encode``, as :class:`SmallFlowPolicy` has them.
    """

    def parameters(self) -> Iterable[nn.Parameter]:
        """Returns the weights."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns weights and buffers by name."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any:
        """Puts back what state_dict returned."""
        ...

    def eval(self) -> Any:
        """Switches dropout and its like off: they would make the ratio wrong."""
        ...

    def to(self, device: torch.device) -> Any:
        """Moves the weights."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that from_pretrained reads."""
        ...


@dataclass(eq=False)
class Learner:
    """What an update changes (policy, optimisers, critic) and the reference that it does not.

    Attributes:
        policy: the policy that acts and learns.
        optimizer: of its trainable weights.
        reference: frozen policy of the KL term; None without one.
        critic: value network of algorithm "ppo".
        critic_optimizer: of the critic's weights.
        average: running mean of the policy's weights over the updates; None without one.
    """

    policy: TrainablePolicy
    optimizer: torch.optim.Optimizer
    reference: TrainablePolicy | None = None
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    average: AveragedModel | None = None

    @classmethod
    def build(cls, policy: TrainablePolicy, config: TrainConfig, device: torch.device | str = "cpu") -> Learner:
        """Prepares a policy for learning, in place: flow settings, frozen trunk, device, evaluation mode.

        Raises:
            ValueError: the policy lacks what the settings ask for.
        """
        flow = {name: getattr(config, name) for name in ("noise_level", "num_flow_steps", "last_step")}
        if any(value is not None for value in flow.values()):
            _require(policy, "set_flow", f"{flow}").set_flow(**flow)
        if config.freeze_trunk:
            _require(policy, "trunk", "freeze_trunk").trunk.requires_grad_(False)
        if config.algorithm == "filtered_bc":
            _require(policy, "imitation_loss", "algorithm 'filtered_bc'")
        _require(policy, "save_pretrained", "training")
        policy.to(torch.device(device))
        policy.eval()
        reference = None
        if config.beta > 0:
            reference = copy.deepcopy(policy)
            for parameter in reference.parameters():
                parameter.requires_grad_(False)
        learner = cls(policy, _adamw(policy.parameters(), config.learning_rate), reference)
        if config.ema_decay > 0:
            learner.average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        if config.algorithm == "ppo":
            learner.critic = Critic.for_policy(policy, config.seed).to(device)
            learner.critic_optimizer = _adamw(learner.critic.parameters(), config.ppo.critic_learning_rate)
        return learner

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The policy's trainable weights."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def result(self) -> TrainablePolicy:
        """The policy to evaluate and to save: that of the mean weights, where they are kept."""
        return self.policy if self.average is None else self.average.module

    def note_update(self) -> None:
        """Takes the present weights into the mean; the first are all of it."""
        if self.average is not None:
            self.average.update_parameters(self.policy)

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and strings, fit for ``torch.load(..., weights_only=True)``."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of another algorithm or another policy.
        """
        parts = self._parts()
        if set(state) != set(parts):
            raise ValueError(
                f"the checkpoint holds {sorted(state)}, expected {sorted(parts)}: same algorithm, beta and ema_decay"
            )
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's {name} does not fit: {error}") from error

    def _parts(self) -> dict[str, Any]:
        names = ("policy", "optimizer", "reference", "critic", "critic_optimizer", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay: equal rewards must not move a weight."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=rate, weight_decay=0.0)


def _require(policy: Any, name: str, wanted_by: str) -> Any:
    if not hasattr(policy, name):
        raise ValueError(f"{wanted_by} needs {type(policy).__name__}.{name}, which it has not; see SmallFlowPolicy")
    return policy
