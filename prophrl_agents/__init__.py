"""Reinforcement learning of flow-head policies: FA-GRPO and FlowScale, in a world model or in any vectorised simulator.

The learning maths are pure functions on tensors (``flow_sde``, ``advantages``, ``flowscale``, ``losses``); policies own
weights and answer one contract (``policies``). This package imports ``prophet_gym``, never the reverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophet_gym.lazy import load_when_used
from prophrl_agents.advantages import chunk_mask, dynamic_sampling_mask, group_advantages, zero_variance_groups
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.config import TrainConfig
from prophrl_agents.flowscale import flowscale_weights
from prophrl_agents.governor import Governor, GovernorReport, GovernorRules, JudgeReference, SimulatorReference
from prophrl_agents.losses import fa_grpo_loss, flow_grpo_loss
from prophrl_agents.policies import FlowPolicy, FlowSample, PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig

if TYPE_CHECKING:
    from prophrl_agents.evaluate import Comparison, Evaluation, compare, evaluate_policy, evaluate_starts
    from prophrl_agents.rollout import collect_groups
    from prophrl_agents.trainer import GRPOTrainer, TrainResult

_HOMES = {  # loaded when first used: they bring the world model's libraries with them
    "Comparison": "evaluate",
    "Evaluation": "evaluate",
    "GRPOTrainer": "trainer",
    "TrainResult": "trainer",
    "collect_groups": "rollout",
    "compare": "evaluate",
    "evaluate_policy": "evaluate",
    "evaluate_starts": "evaluate",
}

__all__ = [
    "Comparison",
    "Evaluation",
    "FlowPolicy",
    "FlowSample",
    "GRPOTrainer",
    "Governor",
    "GovernorReport",
    "GovernorRules",
    "JudgeReference",
    "PolicyStatistics",
    "RolloutBatch",
    "SimulatorReference",
    "SmallFlowPolicy",
    "SmallFlowPolicyConfig",
    "Start",
    "TrainConfig",
    "TrainResult",
    "chunk_mask",
    "collect_groups",
    "compare",
    "dynamic_sampling_mask",
    "evaluate_policy",
    "evaluate_starts",
    "fa_grpo_loss",
    "flow_grpo_loss",
    "flowscale_weights",
    "group_advantages",
    "zero_variance_groups",
]

__getattr__, __dir__ = load_when_used(__name__, _HOMES)
