"""FA-GRPO + FlowScale in one file: a flow policy gets better inside an imagined world. Reads from top to bottom.

``python examples/fa_grpo_single_file.py --policy runs/sft/policy`` reinforces a policy in Prophet-Tabletop and leaves
it in ``runs/examples/fa_grpo``. Everything that learns is here: the flow as a stochastic policy, rollouts in groups,
advantages, FlowScale weights, the loss, the loop. From the library come the environment and the policy's network.
``prophrl train`` is the same mathematics with what a long run needs: resume, evaluation, logs, several processes.

The test suite holds this file's loss, and its gradient, against ``prophrl_agents.fa_grpo_loss`` on a frozen batch.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

import prophet_gym
from prophrl_agents import SmallFlowPolicy

gym.register_envs(prophet_gym)


@dataclass(frozen=True)
class Config:
    """One run. Axes in comments: B rollouts, S policy calls, K flow steps, CH commands of a chunk, D dimensions."""

    policy: Path
    """Folder of a policy (SmallFlowPolicy) that succeeds now and then; `prophrl sft` makes one."""
    checkpoint: str = "tabletop"
    """World model: packaged name, folder or hub id."""
    out: Path = Path("runs/examples/fa_grpo")
    """Folder of the reinforced policy and of metrics.jsonl."""
    updates: int = 20
    """Iterations of: collect rollouts, learn from them."""
    groups: int = 32
    """Groups of an update; the members of a group start from the same snapshot."""
    group_size: int = 8
    """Members of a group."""
    horizon: int = 40
    """Commands of a rollout."""
    epochs: int = 2
    """Passes over the rollouts of an update."""
    mini_batch: int = 128
    """Rollouts of one optimiser step."""
    learning_rate: float = 1.5e-4
    """Of AdamW."""
    warmup_updates: int = 6
    """Updates over which the learning rate rises."""
    clip_low: float = 0.2
    """Ratios are clipped from 1 - this."""
    clip_high: float = 0.28
    """Ratios are clipped to 1 + this."""
    noise_level: float = 0.5
    """Noise a of the flow SDE."""
    flowscale: bool = True
    """Balance the flow steps' share of the gradient."""
    seed: int = 0
    """Of everything."""


# 1. The flow head as a stochastic policy --------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """K flow steps from noise (t = 1) to actions (t = 0); step k is Normal(c_x x + c_v v, std). All tensors (K,)."""

    t: Tensor
    std: Tensor
    c_x: Tensor
    c_v: Tensor


def make_flow(num_steps: int, noise_level: float) -> Flow:
    """The SDE whose marginals are those of the ODE ``dx/dt = v``; noise level 0 is that ODE."""
    t = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    now, dt = t[:-1], t[:-1] - t[1:]
    sigma = noise_level * torch.sqrt(now / (1 - torch.where(now < 1, now, t[1:])))
    g = sigma**2 / (2 * now)
    numbers = now, sigma * dt.sqrt(), 1 - g * dt, -(1 + g * (1 - now)) * dt
    return Flow(*(x.float() for x in numbers))


def step_log_prob(policy: SmallFlowPolicy, features: Tensor, flow: Flow, path: Tensor, k: int) -> Tensor:
    """Log-probability (B, CH, D), per element, of step k of a path (B, K+1, CH, D)."""
    x, x_next = path[:, k], path[:, k + 1]
    mean = flow.c_x[k] * x + flow.c_v[k] * policy.head(x, flow.t[k], features)
    return -0.5 * ((x_next - mean) / flow.std[k]) ** 2 - flow.std[k].log() - 0.5 * math.log(2 * math.pi)


@torch.no_grad()
def act(policy: SmallFlowPolicy, obs: dict, flow: Flow, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample: native commands (B, CH, D), and the path (B, K+1, CH, D) that led to them."""
    features = policy.encode(obs)
    x = torch.randn(len(features), policy.chunk_length, policy.action_dim, generator=generator)
    path = [x]
    for k in range(len(flow.t)):
        mean = flow.c_x[k] * x + flow.c_v[k] * policy.head(x, flow.t[k], features)
        x = mean + flow.std[k] * torch.randn(x.shape, generator=generator)
        path.append(x)
    return policy.normalizer.denormalize_actions(x), torch.stack(path, dim=1)


# 2. Rollouts in groups --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """One update's rollouts; members of a group lie side by side. All rollouts of this world have S policy calls."""

    obs: list[dict]  # S observations of B slots
    path: Tensor  # (B, S, K+1, CH, D)
    reward: Tensor  # (B,)
    valid: Tensor  # (B,) False where the judge abstained


def collect(env: gym.vector.VectorEnv, policy: SmallFlowPolicy, flow: Flow, config: Config, update: int) -> Rollouts:
    """One rollout in every slot: a group is one reset seed, so its members see the same first image."""
    rng = np.random.default_rng([config.seed, update])
    seeds = np.repeat(rng.integers(2**31, size=config.groups), config.group_size)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    observation, info = env.reset(seed=seeds.tolist())
    instructions, seen, paths, done = list(info["instruction"]), [], [], False
    while not done:
        seen.append({**observation, "instruction": instructions})
        actions, path = act(policy, seen[-1], flow, generator)
        paths.append(path)
        # The world judges once, at the horizon, which all slots reach together.
        observation, reward, terminated, truncated, info = env.step(actions.numpy())
        done = bool((terminated | truncated).all())
    valid = torch.from_numpy(info["judge_valid"].astype(bool))
    return Rollouts(seen, torch.stack(paths, dim=1), torch.from_numpy(reward).float(), valid)


def group_advantages(reward: Tensor, valid: Tensor, group_size: int) -> Tensor:
    """(B,) rewards relative to the other members of the group (Eq. 31); 0 where a group has no contrast."""
    reward, valid = reward.reshape(-1, group_size), valid.reshape(-1, group_size)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, reward, 0).sum(dim=1, keepdim=True) / count
    centred = torch.where(valid, reward - mean, 0)
    std = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    return (centred / (std + 1e-6)).flatten()


# 3. The loss ------------------------------------------------------------------------------------------------------


def flowscale_weights(std: Tensor, alpha: float = 0.1, w_min: float = 0.1, w_max: float = 5.0) -> Tensor:
    """(K,) weights proportional to the noise, mixed with uniform, of mean 1 inside their bounds (Eqs 20-22, 29).

    Late flow steps are quiet, and the gradient of a Gaussian's log-probability grows as 1 / std: unweighted, they
    would decide the update alone.
    """
    mixed = alpha + (1 - alpha) * std / std.mean()
    low, high = 0.0, 1.0 / float(mixed.min())
    for _ in range(60):  # the scale at which the clipped weights have mean 1
        scale = (low + high) / 2
        too_small = float((scale * mixed).clamp(w_min, w_max).mean()) < 1
        low, high = (scale, high) if too_small else (low, scale)
    return (scale * mixed).clamp(w_min, w_max)


def fa_grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """FA-GRPO (Eqs 16-18): one ratio per command and dimension, log-probabilities summed over the flow steps.

    Args:
        log_prob: (M, K, CH, D) of M policy calls under the current weights.
        old_log_prob: the same under the weights that acted.
        advantages: (M,).
        weights: (K,) FlowScale, straight-through: they change the gradient of a step, never a value or a ratio.
        clip_low: ratios are clipped from 1 - this.
        clip_high: ratios are clipped to 1 + this.

    Returns:
        Mean over policy calls and commands, summed over dimensions; and the ratios (M, CH, D).
    """
    w = weights[:, None, None]
    scaled = log_prob.detach() + w * (log_prob - log_prob.detach())
    ratio = (scaled - old_log_prob).sum(dim=1).clamp(-20, 20).exp()
    advantages = advantages[:, None, None]
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return -objective.sum(dim=2).mean(), ratio.detach()


def all_log_probs(policy: SmallFlowPolicy, rollouts: Rollouts, members: Tensor, flow: Flow) -> Tensor:
    """Log-probabilities (S m, K, CH, D) of m rollouts, call after call."""
    rows = []
    for s, obs in enumerate(rollouts.obs):
        chosen = {key: obs[key][members.numpy()] for key in ("image", "state")}
        chosen["instruction"] = [obs["instruction"][i] for i in members.tolist()]
        features, path = policy.encode(chosen), rollouts.path[members, s]
        steps = [step_log_prob(policy, features, flow, path, k) for k in range(len(flow.t))]
        rows.append(torch.stack(steps, dim=1))
    return torch.cat(rows)


# 4. The loop ------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Reinforce the policy and save it."""
    slots = config.groups * config.group_size
    if slots % config.mini_batch:
        raise ValueError(f"mini_batch {config.mini_batch} does not divide {slots} rollouts (groups x group_size)")
    policy = SmallFlowPolicy.from_pretrained(config.policy)
    policy.trunk.requires_grad_(False)  # the head learns; the trunk's features stay those of imitation
    env = gym.make_vec(
        "Prophet-Tabletop-v0", num_envs=slots, checkpoint=config.checkpoint, horizon=config.horizon,
        chunk_length=policy.chunk_length, autoreset_mode="Disabled",
    )  # fmt: skip
    flow = make_flow(policy.num_flow_steps, config.noise_level)
    weights = flowscale_weights(flow.std) if config.flowscale else torch.ones_like(flow.std)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    config.out.mkdir(parents=True, exist_ok=True)
    metrics = config.out / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    for update in range(config.updates):
        began = time.perf_counter()
        rollouts = collect(env, policy, flow, config, update)
        collected = time.perf_counter()
        advantages = group_advantages(rollouts.reward, rollouts.valid, config.group_size)
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (update + 1) / config.warmup_updates)
        shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + update)
        with torch.no_grad():  # under the weights that acted
            old = all_log_probs(policy, rollouts, torch.arange(slots), flow).unflatten(0, (len(rollouts.obs), slots))
        clipped = []
        for _ in range(config.epochs):
            for members in torch.randperm(slots, generator=shuffle).split(config.mini_batch):
                members = members[rollouts.valid[members]]
                if not advantages[members].any():
                    continue  # every group all right or all wrong: nothing to learn
                log_prob = all_log_probs(policy, rollouts, members, flow)
                old_log_prob = old[:, members].flatten(0, 1)
                repeated = advantages[members].repeat(len(rollouts.obs))
                loss, ratio = fa_grpo_loss(log_prob, old_log_prob, repeated, weights, config.clip_low, config.clip_high)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                outside = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
                clipped.append(float(outside.float().mean()))
        line = {
            "update": update + 1,
            "judged_success": float(rollouts.reward.mean()),
            "groups_with_contrast": float((advantages.reshape(-1, config.group_size) != 0).any(dim=1).float().mean()),
            "outside_clip": float(np.mean(clipped)) if clipped else 0.0,
            "collect_seconds": collected - began,
            "learn_seconds": time.perf_counter() - collected,
        }
        with metrics.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print("  ".join(f"{key} {value:.3g}" for key, value in line.items()))
    policy.save_pretrained(config.out / "policy")
    env.close()
    print(f"policy: {config.out / 'policy'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
