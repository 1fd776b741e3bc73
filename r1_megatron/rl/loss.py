"""The loss of one token: GRPO (arXiv 2402.03300, eq. 3) with the options of :class:`RLConfig`.

For a token with log-probability ``l`` and advantage ``A`` ::

    loss = c pg + kl_coef k - entropy_coef H

    r  = exp(l - l_old)                                       the ratio
    pg = max(-A r, -A clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high))
    pg = min(pg, -A clip_ratio_dual)      where A < 0         dual clip (arXiv 1912.09729, eq. 5)
    k  = exp(d) - d - 1,  d = l_ref - l                       k3 estimate of KL(policy || reference)
    c  = min(exp(l_old - l_rollout), tis_cap)                 truncated importance sampling (no gradient: l_old is data)

Averaging over tokens and sequences is none of its business: ``weights.py`` turns it into data. The loss of a step is
``sum_t weights[t] * loss[t]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from r1_megatron.config.schema import RLConfig

# Log-ratios beyond this are clipped (a ratio of 5e8): the exponential stays finite, the gradient beyond is zero.
MAX_LOG_RATIO = 20.0


def policy_loss(
    logprobs: Tensor, entropy: Tensor | None, arrays: Mapping[str, Tensor], cfg: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token and what there is to know about it.

    Where ``loss_mask`` is zero the loss is exactly zero and so are all gradients, whatever the other inputs hold
    there (NaN and Inf included).

    Args:
        logprobs: of the tokens under the policy at the sampling temperature, any shape, with gradient.
        entropy: of the policy's distributions, same shape; ``None`` where it was not computed.
        arrays: by the names of :class:`~r1_megatron.types.TrainSample`, same shape: ``loss_mask``, ``advantages``,
            ``behaviour_logprobs``; ``old_logprobs`` where the policy has moved since the rollout (absent: ``l_old`` is
            ``l`` without gradient); ``reference_logprobs`` where ``kl_coef`` is not zero.
        cfg: which terms there are.

    Returns:
        ``(loss, metrics)``. Metrics are detached scalars over this call's loss tokens: names ending in ``_max`` are
        maxima, all others are sums (of which ``num_tokens`` counts the tokens). See :func:`merge_metrics`.
    """
    mask = arrays["loss_mask"] > 0
    zeros = torch.zeros_like(logprobs)

    def masked(values: Tensor) -> Tensor:
        return torch.where(mask, values.to(logprobs.dtype), zeros)

    l = masked(logprobs)
    l_rollout = masked(arrays["behaviour_logprobs"])
    l_old = masked(arrays["old_logprobs"]) if "old_logprobs" in arrays else l.detach()
    advantages = masked(arrays["advantages"])

    log_ratio = (l - l_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cfg.clip_ratio_low, 1 + cfg.clip_ratio_high)
    is_clipped = clipped > unclipped
    pg = torch.where(is_clipped, clipped, unclipped)
    is_dual_clipped = torch.zeros_like(mask)
    if cfg.clip_ratio_dual is not None:
        cap = -advantages * cfg.clip_ratio_dual
        is_dual_clipped = (advantages < 0) & (pg > cap)
        pg = torch.where(is_dual_clipped, cap, pg)

    tis_weight = torch.ones_like(zeros)
    if cfg.tis_cap is not None:
        tis_weight = (l_old - l_rollout).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cfg.tis_cap)
    loss = tis_weight * pg

    kl = zeros
    if cfg.kl_coef != 0.0 and "reference_logprobs" not in arrays:
        raise ValueError(f"rl.kl_coef={cfg.kl_coef} needs reference_logprobs, and this batch has none")
    if "reference_logprobs" in arrays:
        kl = k3(masked(arrays["reference_logprobs"]) - l)
    if cfg.kl_coef != 0.0:
        loss = loss + cfg.kl_coef * kl

    if cfg.entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"rl.entropy_coef={cfg.entropy_coef} needs the entropy, and none was computed")
    h = zeros if entropy is None else masked(entropy)
    if cfg.entropy_coef != 0.0:
        loss = loss - cfg.entropy_coef * h

    with torch.no_grad():
        probs_diff = (l_old.exp() - l_rollout.exp()).abs()
        logprobs_diff = (l_old - l_rollout).abs()
        metrics = {
            "num_tokens": mask.sum().to(logprobs.dtype),
            "actor/ppo_kl": -(l - l_old).sum(),
            "actor/pg_clipfrac": masked(is_clipped).sum(),
            "actor/pg_clipfrac_dual": masked(is_dual_clipped).sum(),
            "actor/entropy": h.sum(),
            "actor/kl": kl.sum(),
            "actor/ratio": masked(ratio).sum(),
            "actor/tis_weight": masked(tis_weight).sum(),
            "training/rollout_probs_diff_mean": probs_diff.sum(),
            "training/rollout_probs_diff_max": _max(probs_diff),
            "training/rollout_logprobs_diff_mean": logprobs_diff.sum(),
            "training/rollout_logprobs_diff_max": _max(logprobs_diff),
        }
    # One last `where`: with a zero mask even a term that is not zero at l = 0 leaves nothing behind.
    return torch.where(mask, loss, zeros), metrics


def k3(d: Tensor) -> Tensor:
    """``exp(d) - d - 1`` to full precision (http://joschu.net/blog/kl-approx.html, estimator k3).

    The three terms cancel for small ``d``: in float32 the plain form is several per cent wrong at 1e-3. Below 1e-2 its
    Taylor series, nested, is exact to the last bit in float64 too. Above ``MAX_LOG_RATIO`` the value stays constant.
    """
    d = d.clamp(max=MAX_LOG_RATIO)
    small = d.abs() < 1e-2
    s = torch.where(small, d, 0.0)
    series = s * s / 2 * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6 * (1 + s / 7)))))
    return torch.where(small, series, torch.expm1(d) - d)


def is_maximum(name: str) -> bool:
    """Whether a metric of :func:`policy_loss` is reduced by maximum; the others are reduced by sum."""
    return name.endswith("_max")


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of several microbatches (or ranks) as if they had been one."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = torch.maximum(merged[name], value) if is_maximum(name) else merged[name] + value
    return merged


def mean_metrics(totals: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Sums to means per loss token, maxima as they are. Without a single loss token everything is zero."""
    num_tokens = max(float(totals["num_tokens"]), 1.0)
    return {
        name: float(value) if is_maximum(name) else float(value) / num_tokens
        for name, value in totals.items()
        if name != "num_tokens"
    }


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
