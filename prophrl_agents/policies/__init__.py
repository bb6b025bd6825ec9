"""Policies with a flow action head, behind one contract."""

from __future__ import annotations

from prophrl_agents.policies.base import FlowPolicy, FlowSample, Observation
from prophrl_agents.policies.flow_head import FlowHead
from prophrl_agents.policies.normalization import PolicyStatistics
from prophrl_agents.policies.small import SmallFlowPolicy, SmallFlowPolicyConfig

__all__ = [
    "FlowHead",
    "FlowPolicy",
    "FlowSample",
    "Observation",
    "PolicyStatistics",
    "SmallFlowPolicy",
    "SmallFlowPolicyConfig",
]
