"""An untrained policy of the size of a test, whose chunks follow the observation and the noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prophet_gym.words import build_vocabulary
from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig

CHUNK = 8
INSTRUCTIONS = ["put red green yellow purple block on the blue white plate 0 1 2 3", "push to left right edge", "move"]


def make_policy(cls: type[SmallFlowPolicy] = SmallFlowPolicy, **sizes: Any) -> Any:
    """An untrained policy whose chunks follow the observation and the noise."""
    torch.manual_seed(0)
    config = SmallFlowPolicyConfig(
        build_vocabulary(INSTRUCTIONS),
        trunk_width=8,
        feature_dim=32,
        head_width=32,
        head_blocks=2,
        **{"chunk_length": CHUNK, **sizes},
    )
    d = config.action_dim
    low, high = (
        ([-0.04] * 3 + [-0.25] * 3 + [0.0], [0.04] * 3 + [0.25] * 3 + [1.0]) if d == 7 else ([-1.0] * d, [1.0] * d)
    )
    mean, std = ([0.0] * 6 + [1.0], [0.005] * 3 + [0.02] * 3 + [0.0]) if d == 7 else ([0.0] * d, [0.5] * d)
    statistics = (np.array(x) for x in (mean, std, low, high))
    policy = cls(config, PolicyStatistics(*statistics, np.zeros(8), np.ones(8)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return policy
