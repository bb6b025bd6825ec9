"""One update: a batch of rollouts in, changed weights and a dictionary of numbers out.

Data flow: rewards -> advantages and mask (``lesson.py``) -> mini-batches of whole groups -> micro-batches of policy
calls -> loss (``losses.py``) -> one optimiser step per mini-batch.

What the paper leaves open:
- **Denominator.** Every mini-batch loss is divided by the valid commands of the whole batch (over all processes) times
  the mini-batch's share of the rollouts. So each command weighs the same wherever it lands, the mean of the mini-batch
  losses is the batch loss, and learning rate and gradient clip do not depend on the number of mini-batches.
- **Old log-probabilities** are recomputed under the weights that acted, before the first optimiser step, in the
  micro-batches that the first epoch trains on: matrix products of another shape, and autocast, round differently. The
  ratio is then exactly 1 before the first step, and ``log_prob_gap`` tells what was recorded otherwise.
- **A frozen trunk looks once.** Where the features of the observations depend on no weight that learns, they are
  computed at the start of the update and serve every epoch, the old log-probabilities and the reference.
- **Where nothing is to be learned, nothing moves.** A mini-batch whose gradient is 0 by construction makes no optimiser
  step, since Adam's momentum alone would move the weights; there is no weight decay.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from prophrl_agents import flow_sde
from prophrl_agents.advantages import zero_variance_groups
from prophrl_agents.batch import RolloutBatch
from prophrl_agents.config import TrainConfig
from prophrl_agents.critic import fit_critic, generalised_advantages, standardise
from prophrl_agents.flowscale import flowscale_weights
from prophrl_agents.gradients import Averages, processes, sum_gradients, sum_over_processes
from prophrl_agents.learner import Learner
from prophrl_agents.lesson import make_lesson, mini_batches
from prophrl_agents.losses import fa_grpo_loss, flow_grpo_loss
from prophrl_agents.policies.base import Observation

__all__ = ["update_policy"]


def update_policy(
    learner: Learner, batch: RolloutBatch, config: TrainConfig, update: int, *, failed_batch: Path | None = None
) -> dict[str, float]:
    """Learns from one batch; changes the learner's weights and optimisers in place.

    With several processes every one calls this with its own rollouts, and all end with the same weights: those that
    one process would reach with all rollouts (up to the make-up of the mini-batches).

    Args:
        learner: policy, optimisers, reference, critic. The policy must hold the weights that collected ``batch``.
        batch: rollouts sampled in mode "sde".
        config: settings.
        update: counted from 0; decides learning rate, shuffling and noise.
        failed_batch: where the mini-batch goes (safetensors) when a loss or a gradient is not finite.

    Returns:
        Of the optimiser steps, weighted by the commands that taught (without a KL term, those of groups that differ in
        reward): the metrics of the loss (``imitation_loss`` for
        "filtered_bc"), and ``gradient_norm`` before clipping; they are absent when no step was taken. Of the batch:
        ``reward_mean``, ``success_rate``, ``valid_share``, ``zero_variance_share`` of the groups, ``advantage_std``.
        ``log_prob_gap``, the largest difference between a recomputed and a recorded log-probability, summed over the
        flow steps. ``gradient_norm_flow_step_k`` of the mean loss of the first micro-batch, every ``log_grad_every``
        updates. ``optimizer_steps``, ``learning_rate``, ``seconds_update``; for "ppo" also ``value_loss`` and
        ``explained_variance``.

    Raises:
        ValueError: the batch was sampled without noise, or does not fit the policy.
        FloatingPointError: a loss or gradient is not finite; the weights are those before the failing step.
    """
    began = time.perf_counter()
    if config.algorithm != "filtered_bc" and not (batch.std > 0).any():
        raise ValueError("rollouts sampled in mode 'ode' have no log-probabilities; collect them with mode='sde'")
    numbers = _Update(learner, batch, config, update, failed_batch).run()
    return {**numbers, "seconds_update": time.perf_counter() - began}


class _Update:
    """What the mini-batches of one call of :func:`update_policy` share."""

    def __init__(
        self, learner: Learner, batch: RolloutBatch, config: TrainConfig, update: int, failed_batch: Path | None
    ) -> None:
        self.learner, self.batch, self.config, self.update = learner, batch, config, update
        self.failed_batch = failed_batch
        self.device = learner.parameters[0].device
        self.averages = Averages()
        self.features = self._encode_once() if config.freeze_trunk else None
        self.epochs = mini_batches(batch, config, update, processes().num_processes)
        self.lesson = make_lesson(batch, config, self._call_advantages() if config.algorithm == "ppo" else None)
        (self.commands,) = sum_over_processes([float(self.lesson.mask.sum())])
        # Flow steps without noise have no log-probability; sliced away, they stay out of the ratio statistics.
        self.noisy = batch.std > 0
        self.weights = _flow_weights(batch.std[self.noisy], config)
        self.old_log_prob = batch.log_prob.clone()
        self.measure_flow_steps = bool(config.log_grad_every) and update % config.log_grad_every == 0

    def run(self) -> dict[str, float]:
        rate = self.config.learning_rate_at(self.update)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        imitate = self.config.algorithm == "filtered_bc"
        for rollouts in [] if imitate else self.epochs[0][1:]:  # the first mini-batch meets the acting weights anyway
            for b, s in self.lesson.micro_batches(rollouts, self.config.micro_batch):
                with torch.no_grad():
                    self._note_old_log_prob(b, s, self._log_prob(b, s)[0])
        steps = 0
        for epoch, plan in enumerate(self.epochs):
            for index, rollouts in enumerate(plan):
                normalizer = self.commands * len(rollouts) / len(self.batch)
                if imitate:
                    loss_of = partial(self._imitation_loss, epoch=epoch, normalizer=normalizer)
                else:
                    loss_of = partial(self._policy_loss, acting=epoch == index == 0, normalizer=normalizer)
                steps += self._step(rollouts, loss_of)
        self._describe_batch()
        numbers = self.averages.result()
        if "ratio_square" in numbers:
            numbers["ratio_std"] = max(numbers.pop("ratio_square") - numbers["ratio_mean"] ** 2, 0.0) ** 0.5
        numbers["advantage_std"] = numbers.pop("advantage_square", 0.0) ** 0.5
        return {**numbers, "optimizer_steps": steps, "learning_rate": rate}

    def _step(self, rollouts: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Adds up the gradient of one mini-batch and takes its optimiser step, if any of its calls teaches."""
        learner, loss, calls = self.learner, 0.0, 0
        learner.optimizer.zero_grad(set_to_none=True)
        for b, s in self.lesson.micro_batches(rollouts, self.config.micro_batch):
            part = loss_of(b, s)
            part.backward()
            loss, calls = loss + float(part.detach()), calls + len(b)
        loss, calls_anywhere = sum_over_processes([loss, calls])
        if not calls_anywhere:
            return False
        sum_gradients(learner.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(learner.parameters, self.config.grad_clip))
        if not math.isfinite(loss + norm):
            self._fail(rollouts, loss, norm)
        learner.optimizer.step()
        self.averages.add([("gradient_norm", norm)])
        return True

    def _autocast(self) -> torch.autocast:
        enabled = self.config.mixed_precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _encode_once(self) -> Tensor | None:
        """Returns the features (B, S, F) of all policy calls; None for a policy that learns or hides them."""
        encode: Any = getattr(self.learner.policy, "encode", None)
        b, s = self.batch.called.nonzero(as_tuple=True)
        if encode is None or not len(b):
            return None
        with torch.enable_grad():
            if encode(self.batch.observations(b[:1], s[:1])).requires_grad:
                return None  # some of what is in front of the features learns
        features: Tensor | None = None
        for rows in torch.arange(len(b)).split(self.config.micro_batch):
            with self._autocast():
                part = encode(self.batch.observations(b[rows], s[rows]))
            if features is None:
                features = part.new_zeros(*self.batch.called.shape, part.shape[1])
            features[b[rows], s[rows]] = part
        return features

    def _observations(self, b: Tensor, s: Tensor) -> Observation:
        seen = self.batch.observations(b, s)
        return seen if self.features is None else {**seen, "features": self.features[b, s]}

    def _log_prob(self, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns log-probabilities and, with a reference, the exact KL to it, both (M, K, CH, D)."""
        policy, reference = self.learner.policy, self.learner.reference
        obs, path = self._observations(b, s), self.batch.path[b, s].to(self.device)
        with self._autocast():
            if reference is None:
                return policy.log_prob(obs, path), None
            mean = policy.step_mean(obs, path)
            with torch.no_grad():
                mean_reference = reference.step_mean(obs, path)
        std = self.batch.std.to(self.device)[:, None, None]
        log_prob = flow_sde.log_prob(path[:, 1:].to(mean.dtype), mean, std)
        return log_prob, flow_sde.kl_divergence(mean, mean_reference, std)

    def _note_old_log_prob(self, b: Tensor, s: Tensor, log_prob: Tensor) -> None:
        recomputed = log_prob.detach().to(self.old_log_prob)
        gap = (recomputed - self.batch.log_prob[b, s]).sum(dim=1).abs()
        gap = torch.where(self.lesson.mask[b, s][..., None], gap, 0.0)
        self.averages.add_highest("log_prob_gap", float(gap.amax()))
        self.old_log_prob[b, s] = recomputed

    def _policy_loss(self, b: Tensor, s: Tensor, acting: bool, normalizer: float) -> Tensor:
        """Returns the loss of some policy calls; ``acting``: under the weights that acted."""
        config = self.config
        log_prob, kl = self._log_prob(b, s)
        if acting:
            self._note_old_log_prob(b, s, log_prob)
        mask = self.lesson.mask[b, s][:, None].to(self.device)
        advantages = self.lesson.advantages[b, s].to(self.device)[:, None, None].expand(mask.shape)
        old_log_prob = self.old_log_prob[b, s].to(log_prob)

        def loss_with(weights: Tensor | None, **options: Any) -> tuple[Tensor, dict[str, float]]:
            return (flow_grpo_loss if config.algorithm == "flow_grpo" else fa_grpo_loss)(
                log_prob[:, None, self.noisy],
                old_log_prob[:, None, self.noisy],
                advantages,
                mask,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                weights=None if weights is None else weights.to(self.device).expand(len(b), 1, -1),
                **options,
            )

        if self.measure_flow_steps:
            self.measure_flow_steps = False
            self._measure_flow_steps(lambda weights: loss_with(weights)[0])
        kl = None if kl is None else kl[:, None, self.noisy]
        loss, metrics = loss_with(self.weights, kl=kl, beta=config.beta, normalizer=normalizer)
        self._add_loss_metrics(metrics, normalizer)
        return loss

    def _imitation_loss(self, b: Tensor, s: Tensor, epoch: int, normalizer: float) -> Tensor:
        """Returns the flow-matching loss of executed chunks; a call's noise follows from its own identity."""
        batch, mask = self.batch, self.lesson.mask[b, s]
        generators = []
        for rollout, call in zip(b.tolist(), s.tolist(), strict=True):
            group, member = divmod(rollout, batch.group_size)
            identity = self.config.seed, self.update, epoch, batch.starts[group].seed, member, call
            seed = np.random.SeedSequence(identity).generate_state(1, np.uint64)[0]
            generators.append(torch.Generator().manual_seed(int(seed)))
        policy: Any = self.learner.policy
        with self._autocast():
            loss = policy.imitation_loss(self._observations(b, s), batch.actions[b, s], generators, mask=mask)
        commands = float(mask.sum())
        self.averages.add([("imitation_loss", float(loss.detach()))], commands)
        return loss * (commands / normalizer)

    def _call_advantages(self) -> Tensor:
        """Trains the critic and returns the standardised advantages (B, S) that it gave before (algorithm "ppo")."""
        batch, config, learner = self.batch, self.config, self.learner
        assert learner.critic is not None and learner.critic_optimizer is not None  # Learner.build
        policy: Any = learner.policy
        called = batch.called & batch.valid[:, None]
        b, s = called.nonzero(as_tuple=True)
        features = torch.zeros(len(b), learner.critic.feature_dim, device=self.device)
        with torch.no_grad(), self._autocast():
            for rows in torch.arange(len(b)).split(config.micro_batch) if len(b) else ():
                features[rows] = policy.encode(self._observations(b[rows], s[rows])).float()
        values, index = torch.zeros(called.shape), torch.zeros(called.shape, dtype=torch.long)
        with torch.no_grad():
            values[b, s], index[b, s] = learner.critic(features).cpu(), torch.arange(len(b))
        rewards = torch.where(batch.valid, batch.rewards, 0.0)
        advantages, returns = generalised_advantages(
            values, rewards, called, gamma=config.ppo.gamma, gae_lambda=config.ppo.gae_lambda
        )
        steps = [index[rollouts][called[rollouts]] for plan in self.epochs for rollouts in plan]
        fit_critic(
            learner.critic, learner.critic_optimizer, features, returns[b, s].to(self.device), steps, self.averages,
            config.grad_clip,
        )  # fmt: skip
        return standardise(advantages, called)

    def _measure_flow_steps(self, loss_with: Callable[[Tensor], Tensor]) -> None:
        """Notes the gradient norm of each flow step: straight-through weights that are 0 elsewhere select it."""
        steps = self.noisy.nonzero().flatten().tolist()
        weights = torch.ones(len(steps)) if self.weights is None else self.weights
        for k, only in zip(steps, torch.diag(weights), strict=True):
            gradients = torch.autograd.grad(
                loss_with(only), self.learner.parameters, retain_graph=True, allow_unused=True
            )
            norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
            self.averages.add([(f"gradient_norm_flow_step_{k + 1}", float(norm))])

    def _add_loss_metrics(self, metrics: dict[str, float], normalizer: float) -> None:
        count = metrics.pop("num_valid")
        self.averages.add_lowest("ratio_min", metrics.pop("ratio_min"))
        self.averages.add_highest("ratio_max", metrics.pop("ratio_max"))
        metrics["ratio_square"] = metrics.pop("ratio_std") ** 2 + metrics["ratio_mean"] ** 2
        for name in ("policy_loss", "kl"):  # from a share of the mini-batch's mean to the mean of these commands
            metrics[name] *= normalizer / max(count, 1.0)
        self.averages.add(metrics.items(), count)

    def _describe_batch(self) -> None:
        batch, valid = self.batch, self.batch.valid
        flat = zero_variance_groups(batch.rewards, batch.group_size, valid=valid)
        square = torch.where(self.lesson.mask.any(dim=2), self.lesson.advantages.float().square(), 0.0)
        rated, calls = int(valid.sum()), int(self.lesson.mask.any(dim=2).sum())
        self.averages.add([("valid_share", rated / len(batch))], len(batch))
        self.averages.add([("zero_variance_share", float(flat.float().mean()))], len(flat))
        self.averages.add([("reward_mean", float(batch.rewards[valid].mean()))], rated)
        self.averages.add([("success_rate", float(batch.success[valid].float().mean()))], rated)
        self.averages.add([("advantage_square", float(square.sum()) / max(calls, 1))], calls)

    def _fail(self, rollouts: Tensor, loss: float, norm: float) -> NoReturn:
        where = ""
        if self.failed_batch is not None:
            _save_mini_batch(self.batch, rollouts, self.lesson.advantages, self.update, self.failed_batch)
            where = f"; its mini-batch is in {self.failed_batch}"
        raise FloatingPointError(
            f"update {self.update}: loss {loss}, gradient norm {norm}, expected finite numbers{where}. The weights are "
            "those before this step. Look for infinite log-probabilities there; a lower learning_rate or noise_level "
            "above 0.1 often helps"
        )


def _flow_weights(std: Tensor, config: TrainConfig) -> Tensor | None:
    """FlowScale weights (K,) of the noisy flow steps; None when off."""
    scale = config.flowscale
    if not scale.enabled or not len(std):
        return None
    return flowscale_weights(
        std, p=scale.p, alpha=scale.alpha, w_min=scale.w_min, w_max=scale.w_max, renorm=scale.renorm
    )


def _save_mini_batch(batch: RolloutBatch, rollouts: Tensor, advantages: Tensor, update: int, path: Path) -> None:
    names = ("image", "state", "actions", "path", "log_prob", "mask", "rewards", "success", "valid", "scores")
    tensors = {name: getattr(batch, name)[rollouts].contiguous() for name in names}
    tensors |= {"std": batch.std, "advantages": advantages[rollouts].contiguous(), "rollouts": rollouts}
    instructions = [batch.instructions[b] for b in rollouts.tolist()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"update": str(update), "instructions": json.dumps(instructions)}
    temporary.write_bytes(safetensors.torch.save(tensors, metadata))
    temporary.replace(path)
