"""Reinforcement learning of flow-head policies: FA-GRPO and FlowScale, in a world model or in any vectorised simulator.

The learning maths are pure functions on tensors (``flow_sde``, ``advantages``, ``flowscale``, ``losses``); policies own
weights and answer one contract (``policies``). This package imports ``prophet_gym``, never the reverse.
"""

from __future__ import annotations

from prophrl_agents.advantages import chunk_mask, dynamic_sampling_mask, group_advantages, zero_variance_groups
from prophrl_agents.flowscale import flowscale_weights
from prophrl_agents.losses import fa_grpo_loss, flow_grpo_loss
from prophrl_agents.policies import FlowPolicy, FlowSample, PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig

__all__ = [
    "FlowPolicy",
    "FlowSample",
    "PolicyStatistics",
    "SmallFlowPolicy",
    "SmallFlowPolicyConfig",
    "chunk_mask",
    "dynamic_sampling_mask",
    "fa_grpo_loss",
    "flow_grpo_loss",
    "flowscale_weights",
    "group_advantages",
    "zero_variance_groups",
]
