"""Policy losses on per-element log-probabilities: FA-GRPO, Flow-GRPO, both with FlowScale weights. Pure functions.

Layout [B, S, K, CH, D]: batch, policy calls, flow steps, commands per chunk, dimensions. Both losses sum the inner
axes and average over the valid commands (b, s, c); a caller that splits a batch passes the count of the whole batch as
``normalizer``, so that the mini-batch losses add up to the batch loss.

Departures from the paper (section 3.3):
- FlowScale is straight-through. Taken literally on the advantages (Eq. 19) it cancels, because the ratio has no k;
  multiplied into both log-probabilities it makes ``r^w``, which is not an importance ratio. Here values, ratios, clip
  decisions and KL are those of the unweighted loss; only the gradient of step k is scaled by w_k (Eq. 26 at r = 1).
- The KL of Eq. 18 is the exact Gaussian one (``flow_sde.kl_divergence``).
- "E" in Eq. 18 is the mean over valid commands, with one denominator for the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prophrl_agents.shapes import check_shape

__all__ = ["LOG_RATIO_LIMIT", "fa_grpo_loss", "flow_grpo_loss"]

LOG_RATIO_LIMIT = 20.0


def fa_grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    weights: Tensor | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """FA-GRPO (Eqs 16-18): one ratio per command and dimension, log-probabilities summed over the flow steps.

    Args:
        log_prob: (B, S, K, CH, D) under the current weights, float32 or float64. Steps with std 0 hold 0 in both.
        old_log_prob: same shape, under the weights that acted.
        advantages: (B, S, CH), one per command, shared by its dimensions and flow steps.
        mask: (B, S, CH) bool; what lies outside is inert, NaN included (its gradient is exactly 0).
        clip_low: lower clip, ratios from 1 - clip_low.
        clip_high: upper clip, ratios to 1 + clip_high.
        weights: (B, S, K) FlowScale weights, straight-through, or None.
        kl: (B, S, K, CH, D) KL per element to the reference policy, or None; never weighted.
        beta: factor of the KL; above 0 it needs ``kl``.
        dual_clip: for negative advantages the objective is at least ``dual_clip * advantage`` (3.0 is customary); None
            for none.
        normalizer: denominator; by default the number of valid commands. With mini-batches, that of the batch.

    Returns:
        (loss, metrics). Metrics are floats over the valid ratios: ``policy_loss``; ``kl`` (sum over k and d, mean over
        valid commands; 0 without ``kl``); ``ratio_mean``, ``ratio_std``, ``ratio_min``, ``ratio_max``;
        ``clip_fraction_low``, ``clip_fraction_high``, ``clip_fraction_dual`` and their sum ``clip_fraction``, the share
        of ratios whose gradient the clip removed; ``approx_kl``, the mean of ``r - 1 - log r``; ``num_valid`` commands.
        Without any valid command the loss is 0, ratios read 1 and ``num_valid`` 0.

    Raises:
        ValueError: shapes that disagree, log-probabilities below float32, a mask that is not bool, clip, dual_clip,
            beta or normalizer out of range, beta without kl.
    """
    batch = _prepare(log_prob, old_log_prob, advantages, mask, weights, kl)
    ratios = _Ratios(batch.log_ratio.sum(dim=2), batch.advantages[..., None], batch.mask[..., None])
    clip = _Clip(clip_low, clip_high, dual_clip)
    return _clipped_loss(ratios, clip, _denominator(normalizer, mask), batch.kl, beta, mask)


def flow_grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    weights: Tensor | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Flow-GRPO: each flow step of a command is an action with its own ratio, joint over the dimensions.

    Arguments, metrics and errors as in :func:`fa_grpo_loss`; summed over k instead of d, so its gradient at r = 1 is
    the same. Steps with std 0 have ratio 1 and no gradient; slice them away to leave them out of the metrics.
    """
    batch = _prepare(log_prob, old_log_prob, advantages, mask, weights, kl)
    ratios = _Ratios(batch.log_ratio.sum(dim=4), batch.advantages[:, :, None], batch.mask[:, :, None])
    clip = _Clip(clip_low, clip_high, dual_clip)
    return _clipped_loss(ratios, clip, _denominator(normalizer, mask), batch.kl, beta, mask)


class _Prepared(NamedTuple):
    """Checked inputs, with zeros in padded slots: ``log_ratio`` (B, S, K, CH, D) before any sum."""

    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    kl: Tensor | None


class _Ratios(NamedTuple):
    """Log-ratios of either loss, with advantages and mask broadcastable to them."""

    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor


class _Clip(NamedTuple):
    low: float
    high: float
    dual: float | None


def _prepare(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None, kl: Tensor | None
) -> _Prepared:
    """Checks the inputs and empties padded slots before any arithmetic, so that NaN there has no gradient either."""
    sizes: dict[str, int] = {}
    check_shape("log_prob", log_prob, "B S K CH D", sizes)
    check_shape("old_log_prob", old_log_prob, "B S K CH D", sizes)
    check_shape("advantages", advantages, "B S CH", sizes)
    check_shape("mask", mask, "B S CH", sizes)
    for name, tensor in (("log_prob", log_prob), ("old_log_prob", old_log_prob)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}, expected float32 or float64: lower precision quantises ratios")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, expected torch.bool; pass mask.bool()")
    element = mask[:, :, None, :, None]
    current = torch.where(element, log_prob, 0.0)
    if weights is not None:
        check_shape("weights", weights, "B S K", sizes)
        # A padded policy call may hold NaN weights.
        scale = torch.where(mask.any(dim=2)[:, :, None], weights.detach(), 1.0).to(log_prob.dtype)[..., None, None]
        # w lp + (1 - w) stopgrad(lp), written so that the value is lp to the bit.
        constant = current.detach()
        current = constant + scale * (current - constant)
    log_ratio = current - torch.where(element, old_log_prob.detach(), 0.0)
    if kl is not None:
        check_shape("kl", kl, "B S K CH D", sizes)
        kl = torch.where(element, kl, 0.0)
    return _Prepared(log_ratio, torch.where(mask, advantages.detach(), 0.0).to(log_prob.dtype), mask, kl)


def _denominator(normalizer: float | Tensor | None, mask: Tensor) -> float | Tensor:
    if normalizer is None:
        return mask.sum().clamp(min=1)
    if not float(normalizer) > 0:
        raise ValueError(f"normalizer is {float(normalizer)}, expected the number of valid commands of the batch, > 0")
    return normalizer


def _clipped_loss(
    ratios: _Ratios, clip: _Clip, denominator: float | Tensor, kl: Tensor | None, beta: float, commands: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 18 on ratios of either layout; ``commands`` (B, S, CH) is the mask that is counted."""
    if not (0 <= clip.low < 1 and clip.high >= 0):
        raise ValueError(f"clip_low={clip.low}, clip_high={clip.high}, expected 0 <= clip_low < 1 and clip_high >= 0")
    if clip.dual is not None and not clip.dual > 1 + clip.high:
        raise ValueError(f"dual_clip is {clip.dual}, expected above 1 + clip_high = {1 + clip.high}; 3.0 is customary")
    if not beta >= 0 or (beta > 0 and kl is None):
        given = "missing" if kl is None else "given"
        raise ValueError(f"beta is {beta} and kl is {given}, expected beta >= 0, and kl wherever beta > 0")
    ratio = ratios.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain = ratio * ratios.advantages
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high) * ratios.advantages
    objective = torch.minimum(plain, clipped)
    floored = torch.zeros_like(plain, dtype=torch.bool)
    if clip.dual is not None:
        floor = clip.dual * ratios.advantages
        floored = (ratios.advantages < 0) & (floor > objective)
        objective = torch.where(floored, floor, objective)
    policy_loss = -torch.where(ratios.mask, objective, 0.0).sum() / denominator
    kl_mean = torch.zeros_like(policy_loss) if kl is None else kl.sum() / denominator
    loss = policy_loss + beta * kl_mean if beta > 0 else policy_loss
    metrics = _ratio_metrics(ratio.detach(), ratios.mask, (clipped < plain).detach(), floored)
    metrics.update(policy_loss=policy_loss, kl=kl_mean, num_valid=commands.sum())
    values = torch.stack([number.detach().double() for number in metrics.values()]).tolist()
    return loss, dict(zip(metrics, values, strict=True))


def _ratio_metrics(ratio: Tensor, mask: Tensor, removed: Tensor, floored: Tensor) -> dict[str, Tensor]:
    """Statistics over the valid ratios; ``removed`` and ``floored`` mark gradients taken out by clip and dual clip."""
    valid = mask.expand_as(ratio)
    count = valid.sum()
    divisor = count.clamp(min=1)
    r = torch.where(valid, ratio.double(), 1.0)
    mean = 1 + (r - 1).sum() / divisor
    low = (removed & (ratio < 1) & valid).sum() / divisor
    high = (removed & (ratio > 1) & valid).sum() / divisor
    dual = (floored & valid).sum() / divisor
    return {
        "ratio_mean": mean,
        "ratio_std": (torch.where(valid, r - mean, 0.0).square().sum() / divisor).sqrt(),
        "ratio_min": torch.where(count > 0, torch.where(valid, r, torch.inf).amin(), 1.0),
        "ratio_max": torch.where(count > 0, torch.where(valid, r, -torch.inf).amax(), 1.0),
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "clip_fraction_dual": dual,
        "clip_fraction": low + high + dual,
        "approx_kl": (r - 1 - r.log()).sum() / divisor,
    }
