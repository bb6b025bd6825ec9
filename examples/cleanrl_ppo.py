"""PPO in one file, as CleanRL writes it, on a batch of imagined worlds: the call that makes ``envs`` is what changes.

``python examples/cleanrl_ppo.py`` takes some minutes on one CPU core. The reward is a hand-written judge of two lines;
take it out and the checkpoint's own judge says whether the instruction was followed, which is far too rare for PPO from
pixels to find in minutes. Departures from ``ppo_continuous_action.py``: a convolutional network for images, and no
normalisation of observations and rewards. An ending at the horizon is treated as the end it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions.normal import Normal

import prophet_gym  # noqa: F401 (registers the worlds)


@dataclass(frozen=True)
class Args:
    """Length of the run and PPO's settings."""

    checkpoint: str = "tabletop"
    """Packaged name, folder or hub id of the world model."""
    seed: int = 0
    """Of policy, starts and noise."""
    total_timesteps: int = 3072
    """Env steps (chunks) over all worlds."""
    num_envs: int = 32
    """Worlds side by side."""
    num_steps: int = 8
    """Env steps of each world between two updates."""
    chunk_length: int = 4
    """Commands of an env step."""
    horizon: int = 8
    """Commands of a rollout, a whole number of chunks."""
    learning_rate: float = 6e-4
    """Of Adam, falling to zero."""
    gamma: float = 1.0
    """Discount per env step."""
    gae_lambda: float = 1.0
    """Of the generalised advantage estimate."""
    num_minibatches: int = 4
    """Parts into which a batch is split."""
    update_epochs: int = 6
    """Passes over a batch."""
    clip_coef: float = 0.2
    """Clip range of the ratio."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Where the gradient is cut."""


def hand_on_the_left(frames: np.ndarray, instruction: str) -> bool:
    """Judges whether the (dark) hand ends in the left third of the picture."""
    columns = np.nonzero(frames[-1].max(axis=-1) < 70)[1]
    return bool(columns.size >= 8 and columns.mean() < frames.shape[2] / 3)


def layer_init(layer: nn.Module, std: float = np.sqrt(2), bias_const: float = 0.0) -> nn.Module:
    """Returns the layer with orthogonal weights and a constant bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """A convolutional network with a Gaussian policy and a value."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        height, width, channels = envs.single_observation_space.shape
        convolutions = nn.Sequential(
            layer_init(nn.Conv2d(channels, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            nn.Flatten(),
        )
        size = convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.network = nn.Sequential(convolutions, layer_init(nn.Linear(size, 128)), nn.ReLU())
        action_dim = int(np.prod(envs.single_action_space.shape))
        self.critic = layer_init(nn.Linear(128, 1), std=1.0)
        self.actor_mean = layer_init(nn.Linear(128, action_dim), std=0.01)
        self.actor_logstd = nn.Parameter(torch.full((1, action_dim), -0.5))

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the value (B, 1) of images (B, H, W, 3) uint8."""
        return self.critic(self.network(x.permute(0, 3, 1, 2) / 255.0))

    def get_action_and_value(
        self, x: torch.Tensor, action: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the action (drawn, if none is given), its log-probability (B,) and the value (B, 1)."""
        hidden = self.network(x.permute(0, 3, 1, 2) / 255.0)
        mean = self.actor_mean(hidden)
        probs = Normal(mean, self.actor_logstd.exp().expand_as(mean))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action).sum(1), self.critic(hidden)


def main(args: Args) -> None:
    """Collect, estimate advantages, update; print the return of every batch."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs = gym.make_vec(
        "Prophet-Tabletop-v0",
        num_envs=args.num_envs,
        interface="flat",
        autoreset_mode="SameStep",
        checkpoint=args.checkpoint,
        chunk_length=args.chunk_length,
        horizon=args.horizon,
        judge=hand_on_the_left,
    )
    agent = Agent(envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(shape + envs.single_observation_space.shape, dtype=torch.uint8)
    actions = torch.zeros(shape + envs.single_action_space.shape)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))

    image, _ = envs.reset(seed=args.seed)
    next_obs, next_done = torch.from_numpy(image), torch.zeros(args.num_envs)
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - iteration / num_iterations)
        returned: list[float] = []
        for step in range(args.num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprobs[step], value = agent.get_action_and_value(next_obs)
            values[step], actions[step] = value.flatten(), action
            image, reward, terminations, truncations, infos = envs.step(action.numpy().clip(-1.0, 1.0))
            ended = terminations | truncations
            next_obs, next_done = torch.from_numpy(image), torch.from_numpy(ended).float()
            rewards[step] = torch.from_numpy(reward)
            returned += reward[ended].tolist()  # reward comes at the end alone: it is the return

        with torch.no_grad():
            advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros(args.num_envs)
            next_value = agent.get_value(next_obs).flatten()
            for t in reversed(range(args.num_steps)):
                nextnonterminal = 1.0 - (next_done if t == args.num_steps - 1 else dones[t + 1])
                nextvalues = next_value if t == args.num_steps - 1 else values[t + 1]
                delta = rewards[t] + args.gamma * nextvalues * nextnonterminal - values[t]
                lastgaelam = delta + args.gamma * args.gae_lambda * nextnonterminal * lastgaelam
                advantages[t] = lastgaelam
            returns = advantages + values

        b_obs, b_actions = obs.flatten(0, 1), actions.flatten(0, 1)
        b_logprobs, b_advantages, b_returns = logprobs.flatten(), advantages.flatten(), returns.flatten()
        for _ in range(args.update_epochs):
            for mb_inds in np.array_split(rng.permutation(batch_size), args.num_minibatches):
                _, newlogprob, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                ratio = (newlogprob - b_logprobs[mb_inds]).exp()
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped).mean()
                v_loss = 0.5 * (newvalue.flatten() - b_returns[mb_inds]).square().mean()
                optimizer.zero_grad()
                (pg_loss + args.vf_coef * v_loss).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        shown = f"{np.mean(returned):.2f} of {len(returned)} rollouts" if returned else "no rollout ended"
        print(f"global_step={(iteration + 1) * batch_size} episodic_return={shown}")
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
