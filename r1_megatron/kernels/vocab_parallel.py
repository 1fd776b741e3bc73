"""Log-probability and entropy of every token from logits that are split over the vocabulary.

Under tensor parallelism each rank holds the columns ``[vocab_start, vocab_start + V)`` of the logits. Every rank boils
its shard down to four numbers per token, one all-gather exchanges them, and every rank combines all of them in rank
order: the same bits on every rank and in every run. The gradient needs no communication, since the combined numbers
are all that a shard has to know about the others.

With ``z = logits / temperature``, shard ``k`` contributes ::

    m_k = max z      a_k = sum exp(z - m_k)      b_k = sum exp(z - m_k) (z - m_k)      u_k = z[target], if k owns it

and with ``M = max_k m_k``, ``a = sum_k a_k exp(m_k - M)``, ``b = sum_k exp(m_k - M) (b_k + a_k (m_k - M))`` ::

    logprob = (sum_k u_k - M) - ln a             entropy = ln a - b / a
    d(g logprob + h entropy) / d logits[v] = (g (1[v = target] - p_v) - h p_v (ln p_v + entropy)) / temperature

Shapes: T tokens, R rows of one chunk, V columns of this shard, K shards, 4 statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one row chunk. All temporaries have this size, whatever T is: small enough for a core's cache on CPU,
# large enough to fill a GPU (64 MiB in float32).
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
# exp() of this is zero in float32 and in float64. Logits of -inf stop here, so that 0 * ln 0 is 0, not NaN.
_EXPONENT_FLOOR = -1e4


def token_statistics(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each distribution, both differentiable with respect to the logits.

    Args:
        logits_TV: this rank's columns, any floating dtype. Arithmetic is float64 for float64 logits, else float32, in
            row chunks: no second tensor of this size exists except the gradient, which has the dtype of the logits.
        targets_T: int64, global token ids in ``[0, vocab_size)``. Another id selects nothing: its log-probability is
            finite and meaningless, for positions that carry no weight.
        vocab_start: global id of column 0.
        vocab_size: number of real tokens; ``None``: every column of this (then only) shard. Columns with a global id
            beyond it are padding: whatever they hold, NaN included, they count nothing and their gradient is zero.
        group: the tensor-parallel process group, its ranks in the order of ``vocab_start``; ``None``: one shard.
        temperature: logits are divided by it first, in the arithmetic's dtype.
        need_entropy: without it a pass over the logits is saved, and the second result is ``None``.

    Returns:
        ``(logprobs_T, entropy_T)`` in nats, in the arithmetic's dtype, the same on every rank of the group.
    """
    assert logits_TV.dim() == 2, f"logits must be [T, V], got {tuple(logits_TV.shape)}"
    assert targets_T.shape == logits_TV.shape[:1], f"targets must be [{logits_TV.shape[0]}], got {targets_T.shape}"
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    num_real = logits_TV.shape[1]
    if vocab_size is not None:
        num_real = min(max(vocab_size - vocab_start, 0), num_real)
    else:
        assert group is None or group.size() == 1, "a shard cannot tell the vocabulary's size: pass vocab_size"
    logprobs_T, entropy_T = _TokenStatistics.apply(
        logits_TV, targets_T, vocab_start, num_real, group, temperature, need_entropy
    )
    return logprobs_T, entropy_T if need_entropy else None


def vocab_parallel_cross_entropy(logits_TV: Tensor, targets_T: Tensor, **kwargs: Any) -> Tensor:
    """Negative log-probability of each target, ``[T]``; keywords as in :func:`token_statistics`."""
    logprobs_T, _ = token_statistics(logits_TV, targets_T, need_entropy=False, **kwargs)
    return -logprobs_T


def shard_statistics(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    vocab_start: int,
    num_real: int,
    temperature: float = 1.0,
    need_entropy: bool = True,
) -> Tensor:
    """One shard's ``(m, a, b, u)``, ``[T, 4]``. A shard without real columns gives ``(-inf, 0, 0, 0)``."""
    stats_T4 = logits_TV.new_zeros(logits_TV.shape[0], 4, dtype=_arithmetic_dtype(logits_TV))
    if num_real == 0:
        stats_T4[:, 0] = -torch.inf
        return stats_T4
    for rows in _row_chunks(logits_TV):
        z_RV = _scaled(logits_TV[rows, :num_real], temperature)
        max_R = z_RV.amax(dim=1)
        d_RV = z_RV - max_R[:, None]
        if need_entropy:
            d_RV.clamp_(min=_EXPONENT_FLOOR)
            e_RV = d_RV.exp()
            stats_T4[rows, 1] = e_RV.sum(dim=1)
            stats_T4[rows, 2] = e_RV.mul_(d_RV).sum(dim=1)
        else:
            stats_T4[rows, 1] = d_RV.exp_().sum(dim=1)
        column_R, owned_R = _owned_columns(targets_T[rows], vocab_start, num_real)
        target_R = z_RV.gather(1, column_R[:, None]).squeeze(1)
        stats_T4[rows, 0] = max_R
        stats_T4[rows, 3] = torch.where(owned_R, target_R, 0.0)
    return stats_T4


def combine(stats_KT4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All shards' statistics, in rank order, to ``(logprobs, entropy, max, log_sum)``, each ``[T]``.

    ``max + log_sum`` is the log of the softmax's denominator; kept apart, the logits' offset costs no precision.
    """
    m_KT, a_KT, b_KT, u_KT = stats_KT4.unbind(dim=-1)
    max_T = m_KT.amax(dim=0)
    # A shard of padding only has m = -inf and a = 0: its distance must not meet 0 * inf.
    shift_KT = torch.where(a_KT == 0, 0.0, m_KT - max_T)
    scale_KT = shift_KT.exp()
    a_T = (a_KT * scale_KT).sum(dim=0)
    b_T = (scale_KT * (b_KT + a_KT * shift_KT)).sum(dim=0)
    log_sum_T = a_T.log()
    return (u_KT.sum(dim=0) - max_T) - log_sum_T, log_sum_T - b_T / a_T, max_T, log_sum_T


def shard_gradient(
    logits_TV: Tensor,
    targets_T: Tensor,
    grad_logprobs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    entropy_T: Tensor,
    max_T: Tensor,
    log_sum_T: Tensor,
    *,
    vocab_start: int,
    num_real: int,
    temperature: float = 1.0,
) -> Tensor:
    """Gradient with respect to one shard's logits, ``[T, V]`` in their dtype; ``None`` gradients count as zero.

    The softmax is recomputed chunk by chunk: ``p = exp(d) / a`` with ``d = z - M``, so that both terms become one
    factor per token and one multiple of ``d``.
    """
    grad_TV = torch.empty_like(logits_TV)
    grad_TV[:, num_real:] = 0
    if num_real == 0:
        return grad_TV
    zeros_T = torch.zeros_like(max_T)
    g_T = zeros_T if grad_logprobs_T is None else grad_logprobs_T / temperature
    inverse_a_T = (-log_sum_T).exp()
    factor_T, slope_T = -g_T * inverse_a_T, None
    if grad_entropy_T is not None:
        h_T = grad_entropy_T / temperature
        slope_T = -h_T * inverse_a_T
        factor_T = factor_T + slope_T * (entropy_T - log_sum_T)
    for rows in _row_chunks(logits_TV):
        z_RV = _scaled(logits_TV[rows, :num_real], temperature)
        d_RV = z_RV - max_T[rows, None]
        if slope_T is None:
            out_RV = d_RV.exp_().mul_(factor_T[rows, None])
        else:
            d_RV.clamp_(min=_EXPONENT_FLOOR)
            e_RV = d_RV.exp()
            out_RV = d_RV.mul_(slope_T[rows, None]).add_(factor_T[rows, None]).mul_(e_RV)
        column_R, owned_R = _owned_columns(targets_T[rows], vocab_start, num_real)
        out_RV.scatter_add_(1, column_R[:, None], torch.where(owned_R, g_T[rows], 0.0)[:, None])
        grad_TV[rows, :num_real] = out_RV
    return grad_TV


class _TokenStatistics(torch.autograd.Function):
    """Saves the logits and four numbers per token; never a softmax."""

    @staticmethod
    def forward(ctx, logits_TV, targets_T, vocab_start, num_real, group, temperature, need_entropy):
        shard = dict(vocab_start=vocab_start, num_real=num_real, temperature=temperature)
        stats_T4 = shard_statistics(logits_TV, targets_T, **shard, need_entropy=need_entropy)
        logprobs_T, entropy_T, max_T, log_sum_T = combine(_all_gather(stats_T4, group))
        ctx.shard = shard
        ctx.save_for_backward(logits_TV, targets_T, entropy_T, max_T, log_sum_T)
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        if grad_logprobs_T is None and grad_entropy_T is None:
            return (None,) * 7
        logits_TV, targets_T, entropy_T, max_T, log_sum_T = ctx.saved_tensors
        grad_TV = shard_gradient(
            logits_TV, targets_T, grad_logprobs_T, grad_entropy_T, entropy_T, max_T, log_sum_T, **ctx.shard
        )
        return grad_TV, None, None, None, None, None, None


def _all_gather(stats_T4: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[K, T, 4]``, shard ``k`` from rank ``k`` of the group: the only collective of this file."""
    if group is None or group.size() == 1:
        return stats_T4[None]
    stats_KT4 = stats_T4.new_empty(group.size(), *stats_T4.shape)
    dist.all_gather_into_tensor(stats_KT4.view(-1, 4), stats_T4, group=group)
    return stats_KT4


def _arithmetic_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    """``z`` of one chunk; may be the logits themselves: never written to."""
    z_RV = logits_RV.to(_arithmetic_dtype(logits_RV))
    return z_RV if temperature == 1.0 else z_RV / temperature


def _owned_columns(targets_R: Tensor, vocab_start: int, num_real: int) -> tuple[Tensor, Tensor]:
    """The target's column in this shard (any valid one where it is elsewhere), and whether it is here."""
    column_R = targets_R - vocab_start
    owned_R = (column_R >= 0) & (column_R < num_real)
    return column_R.clamp(0, num_real - 1), owned_R


def _row_chunks(logits_TV: Tensor) -> list[slice]:
    num_rows, width = logits_TV.shape
    step = max(_CHUNK_ELEMENTS.get(logits_TV.device.type, 1 << 20) // max(width, 1), 1)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
