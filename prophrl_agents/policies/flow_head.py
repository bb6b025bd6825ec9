"""The flow head: a velocity network over an action chunk, conditioned on the features of one observation.

A residual MLP over the flattened chunk. Flow time and features modulate every block (adaptive layer norm); gates and
the last layer start at zero, so an untrained head has velocity 0. The features are computed once per observation and
serve all K flow steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prophrl_agents.flow_sde import FlowSchedule, Generators, draw_noise, log_prob, path_mean, sample_path
from prophrl_agents.shapes import check_shape

__all__ = ["FlowHead"]


class FlowHead(nn.Module):
    """Velocity network and the flow policy it defines, in normalised action space.

    Args:
        chunk_length: CH, commands per chunk.
        action_dim: D, numbers per command.
        feature_dim: length F of the feature vector.
        width: hidden width, even.
        num_blocks: residual blocks.
    """

    def __init__(
        self, chunk_length: int, action_dim: int, feature_dim: int, width: int = 256, num_blocks: int = 4
    ) -> None:
        super().__init__()
        self.chunk_length, self.action_dim = chunk_length, action_dim
        # Geometric periods from 0.004 to 4 flow-time units, as in pi0: fine enough for K = 100.
        periods = torch.logspace(math.log10(4e-3), math.log10(4.0), width // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(feature_dim, width)
        self.inputs = nn.Linear(chunk_length * action_dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.Linear(width, chunk_length * action_dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """Returns the velocity (B, CH, D).

        Args:
            x: (B, CH, D) noisy chunk, any float dtype; cast to that of the weights.
            t: flow times, scalar or (B,), 1 is noise and 0 the chunk.
            features: (B, F).
        """
        sizes = {"CH": self.chunk_length, "D": self.action_dim, "B": len(features)}
        check_shape("x", x, "B CH D", sizes)
        dtype = self.inputs.weight.dtype
        angles = t.expand(len(x)).to(self.frequencies.dtype)[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype))
        condition = F.silu(time + self.condition(features))
        h = self.inputs(x.to(dtype).flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.outputs(self.norm(h)).reshape(x.shape)

    def sample(self, features: Tensor, flow: FlowSchedule, generator: Generators) -> tuple[Tensor, Tensor]:
        """Samples paths (B, K+1, CH, D) and log-probabilities (B, K, CH, D); a schedule of noise level 0 is the ODE."""
        shape = len(features), self.chunk_length, self.action_dim
        return sample_path(lambda x, t: self(x, t, features), shape, flow, generator)

    def step_mean(self, features: Tensor, path: Tensor, flow: FlowSchedule) -> Tensor:
        """Returns the means (B, K, CH, D) of the flow steps along a path (B, K+1, CH, D)."""
        sizes = {"B": len(features), "K+1": len(flow.t), "CH": self.chunk_length, "D": self.action_dim}
        check_shape("path", path, "B K+1 CH D", sizes)
        return path_mean(lambda x, t: self(x, t, features), path.to(flow.std.dtype), flow)

    def log_prob(self, features: Tensor, path: Tensor, flow: FlowSchedule) -> Tensor:
        """Returns the log-probabilities (B, K, CH, D) of a path (B, K+1, CH, D) under the current weights."""
        mean = self.step_mean(features, path, flow)
        return log_prob(path[:, 1:].to(mean.dtype), mean, flow.std[:, None, None])

    def matching_error(self, features: Tensor, chunk: Tensor, generator: Generators) -> Tensor:
        """Returns the squared velocity errors (B, CH, D) of flow matching at random times, for imitation.

        Args:
            features: (B, F).
            chunk: (B, CH, D) normalised actions a; the target at ``x_t = (1 - t) a + t eps`` is ``eps - a``.
            generator: see :func:`prophrl_agents.flow_sde.draw_noise`.
        """
        noise = draw_noise(chunk.shape, generator, device=chunk.device, dtype=chunk.dtype)
        # The normal distribution function of a normal is uniform on [0, 1]: one kind of draw serves both.
        t = torch.special.ndtr(draw_noise((len(chunk), 1), generator, device=chunk.device, dtype=chunk.dtype))
        x = (1 - t[..., None]) * chunk + t[..., None] * noise
        return (self(x, t[:, 0], features).to(chunk.dtype) - (noise - chunk)).square()


class _Block(nn.Module):
    """Residual MLP block, modulated by a condition vector; the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)
