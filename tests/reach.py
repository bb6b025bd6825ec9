"""A real environment of the size of a test: a point that has to reach one of two targets, and a policy for it."""

import zlib

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode

from prophet_gym.sims.vector import make_sync_vector_env
from prophrl_agents import PolicyStatistics, SmallFlowPolicy, SmallFlowPolicyConfig


class Reach(gym.Env):
    """Chunks of two velocity commands; over when the target is reached, or after ``calls`` chunks.

    With ``random_judge`` success is a coin thrown by the commands, whatever they lead to.
    """

    observation_space = Dict(image=Box(0, 255, (8, 8, 3), np.uint8), state=Box(-np.inf, np.inf, (4,), np.float32))
    action_space = Box(-1, 1, (2, 2), np.float32)
    metadata = {"render_fps": 5}

    def __init__(self, calls=2, random_judge=False):
        self.calls, self.random_judge = calls, random_judge

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.target = np.zeros(2), np.array([self.np_random.choice([-0.8, 0.8]), 0.0])
        self.called, self.coin = 0, 0
        return self.observe(), {"instruction": "go"}

    def observe(self):
        image = np.zeros((8, 8, 3), np.uint8)
        for channel, point in enumerate((self.position, self.target)):
            column, row = np.clip(np.round(3.5 + 3 * point), 0, 7).astype(int)
            image[row, column, channel] = 255
        return {"image": image, "state": np.concatenate([self.position, self.target]).astype(np.float32)}

    def step(self, chunk):
        self.called += 1
        self.coin = zlib.crc32(chunk.tobytes(), self.coin)
        executed, reached = 0, False
        while executed < len(chunk) and not reached:
            self.position = self.position + 0.4 * chunk[executed]
            reached, executed = bool(np.linalg.norm(self.position - self.target) < 0.3), executed + 1
        over = reached or self.called == self.calls
        success = over and self.coin % 2 == 0 if self.random_judge else reached
        info = {"instruction": "go", "is_success": success, "judge_valid": True, "num_executed": executed}
        return self.observe(), float(success), reached, over and not reached, info


def make_reach(num_envs, **options):
    return make_sync_vector_env(lambda: Reach(**options), num_envs, AutoresetMode.DISABLED)


def make_reach_policy(seed=0):
    """Knows nothing: its commands are noise."""
    config = SmallFlowPolicyConfig(
        ("go",), image_size=8, state_dim=4, chunk_length=2, action_dim=2, num_flow_steps=3,
        trunk_width=8, feature_dim=32, head_width=64, head_blocks=1,
    )  # fmt: skip
    one, four = np.ones(2), np.ones(4)
    torch.manual_seed(seed)
    return SmallFlowPolicy(config, PolicyStatistics(0 * one, 0.6 * one, -one, one, 0 * four, four))
