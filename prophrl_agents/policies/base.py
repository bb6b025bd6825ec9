"""What a flow policy promises: sample actions with the path that led to them, and score that path again.

Rollouts call ``sample``, losses call ``log_prob``; nothing else of a policy is seen by the learner. Under the weights
that sampled, ``log_prob(obs, sample.path)`` equals ``sample.log_prob`` to the bit for the same batch, so the ratio is
exactly 1 before the first update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prophrl_agents.flow_sde import Generators
from prophrl_agents.shapes import check_shape

__all__ = ["FlowPolicy", "FlowSample", "Observation", "SampleMode"]

Observation = Mapping[str, Any]
"""A batch of observations: "image" uint8 (B, H, W, 3), "state" float32 (B, 8N), "instruction" sequence of B strings."""

SampleMode = Literal["sde", "ode"]


@dataclass(frozen=True, eq=False)
class FlowSample:
    """One batch of sampled action chunks and what the loss needs of them.

    Attributes:
        actions: (B, CH, D) float32 commands in the environment's native units, inside its bounds.
        path: (B, K+1, CH, D) flow path in the policy's normalised space, from noise to chunk; float32 or better.
        log_prob: (B, K, CH, D) log-probability of each flow step per element; 0 for steps without noise.
        std: (K,) standard deviation of each flow step; 0 for steps without noise.

    Raises:
        ValueError: shapes that disagree, or a path, log_prob or std below float32.
    """

    actions: Tensor
    path: Tensor
    log_prob: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        """Checks that the shapes belong together."""
        sizes: dict[str, int] = {}
        check_shape("log_prob", self.log_prob, "B K CH D", sizes)
        sizes["K+1"] = sizes["K"] + 1
        check_shape("path", self.path, "B K+1 CH D", sizes)
        check_shape("actions", self.actions, "B CH D", sizes)
        check_shape("std", self.std, "K", sizes)
        for name in ("path", "log_prob", "std"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} is {dtype}, expected float32 or float64: lower precision quantises ratios")


@runtime_checkable
class FlowPolicy(Protocol):
    """A policy with a flow action head. Randomness comes only from the generators passed in."""

    @property
    def chunk_length(self) -> int:
        """Commands per call, CH."""
        ...

    @property
    def action_dim(self) -> int:
        """Numbers per command, D."""
        ...

    @property
    def num_flow_steps(self) -> int:
        """Flow steps, K."""
        ...

    def sample(self, obs: Observation, generator: Generators, mode: SampleMode = "sde") -> FlowSample:
        """Samples one chunk per observation, without gradient; "ode" injects no noise after the initial one."""
        ...

    def step_mean(self, obs: Observation, path: Tensor) -> Tensor:
        """Returns the means (B, K, CH, D) of the flow steps along a path (B, K+1, CH, D): for the exact KL."""
        ...

    def log_prob(self, obs: Observation, path: Tensor) -> Tensor:
        """Returns log-probabilities (B, K, CH, D) of a path (B, K+1, CH, D) under the current weights."""
        ...

    def predict_action_chunk(self, obs: Observation, generator: Generators, mode: SampleMode = "ode") -> Tensor:
        """Returns commands (B, CH, D) in native units."""
        ...

    def select_action(self, obs: Observation, generator: Generators, mode: SampleMode = "ode") -> Tensor:
        """Returns the next command (B, D); a new chunk is predicted when the last one is used up."""
        ...

    def reset(self) -> None:
        """Forgets the rest of the current chunk; call it when an episode begins."""
        ...
