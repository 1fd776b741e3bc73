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

Where the logits are not there yet, ``linear_head.py`` computes the same from the hidden states, a few rows at a time.

Shapes: T tokens, V columns of this shard, K shards, 4 statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1_megatron.kernels.ops import ops


def token_statistics(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    need_entropy: bool = True,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each distribution, both differentiable with respect to the logits.

    Args:
        logits_TV: this rank's columns, float32, bfloat16 or float64. Arithmetic is float64 for float64 logits, else
            float32: no second tensor of this size exists except the gradient, which has the dtype of the logits.
        targets_T: int64, global token ids in ``[0, vocab_size)``. Another id selects nothing: its log-probability is
            finite and meaningless, for positions that carry no weight.
        vocab_start: global id of column 0.
        vocab_size: number of real tokens; ``None``: every column of this (then only) shard. Columns with a global id
            beyond it are padding: whatever they hold, NaN included, they count nothing and their gradient is zero.
        group: the tensor-parallel process group, its ranks in the order of ``vocab_start``; ``None``: one shard.
        temperature: logits are divided by it first, in the arithmetic's dtype.
        need_entropy: without it less is computed, and the second result is ``None``.
        in_place: backward() writes the gradient over the logits, so that it costs no memory: for logits that nobody
            reads any more by then. A second backward() through the same results raises.

    Returns:
        ``(logprobs_T, entropy_T)`` in nats, in the arithmetic's dtype, the same on every rank of the group.
    """
    assert logits_TV.dim() == 2, f"logits must be [T, V], got {tuple(logits_TV.shape)}"
    assert targets_T.shape == logits_TV.shape[:1], f"targets must be [{logits_TV.shape[0]}], got {targets_T.shape}"
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    assert not in_place or logits_TV.is_contiguous(), "in_place needs contiguous logits"
    num_real = real_columns(logits_TV.shape[1], vocab_start, vocab_size, group)
    logprobs_T, entropy_T = _TokenStatistics.apply(
        logits_TV, targets_T, vocab_start, num_real, group, temperature, need_entropy, in_place
    )
    return logprobs_T, entropy_T if need_entropy else None


def vocab_parallel_cross_entropy(logits_TV: Tensor, targets_T: Tensor, **kwargs: Any) -> Tensor:
    """Negative log-probability of each target, ``[T]``; keywords as in :func:`token_statistics`."""
    logprobs_T, _ = token_statistics(logits_TV, targets_T, need_entropy=False, **kwargs)
    return -logprobs_T


def real_columns(width: int, vocab_start: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> int:
    """How many of a shard's ``width`` columns stand for tokens; the others, at its end, are padding."""
    if vocab_size is not None:
        return min(max(vocab_size - vocab_start, 0), width)
    assert group is None or group.size() == 1, "a shard cannot tell the vocabulary's size: pass vocab_size"
    return width


def combine_shards(stats_T4: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everybody's statistics of the same tokens to ``(logprobs, entropy, max, log_sum)``, each ``[T]``.

    ``max + log_sum`` is the log of the softmax's denominator; kept apart, the logits' offset costs no precision.
    """
    if group is None or group.size() == 1:
        return ops.combine_statistics(stats_T4[None])
    stats_KT4 = stats_T4.new_empty(group.size(), *stats_T4.shape)
    dist.all_gather_into_tensor(stats_KT4.view(-1, 4), stats_T4, group=group)
    return ops.combine_statistics(stats_KT4)


class _TokenStatistics(torch.autograd.Function):
    """Saves the logits and four numbers per token; never a softmax."""

    @staticmethod
    def forward(ctx, logits_TV, targets_T, vocab_start, num_real, group, temperature, need_entropy, in_place):
        logits_TV = logits_TV.contiguous()
        stats_T4 = ops.shard_statistics(logits_TV, targets_T, vocab_start, num_real, temperature, need_entropy)
        logprobs_T, entropy_T, max_T, log_sum_T = combine_shards(stats_T4, group)
        ctx.shard = vocab_start, num_real, temperature
        ctx.in_place, ctx.overwritten = in_place, False
        ctx.save_for_backward(logits_TV, targets_T, entropy_T, max_T, log_sum_T)
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        if grad_logprobs_T is None and grad_entropy_T is None:
            return (None,) * 8
        if ctx.overwritten:
            raise RuntimeError(
                "backward() a second time through token_statistics(in_place=True): the logits hold their gradient by "
                "now. Use in_place=False, or compute them again."
            )
        logits_TV, targets_T, entropy_T, max_T, log_sum_T = ctx.saved_tensors
        ctx.overwritten = ctx.in_place
        grad_TV = logits_TV.detach() if ctx.in_place else logits_TV.clone()
        ops.shard_gradient_(
            grad_TV, targets_T, contiguous(grad_logprobs_T), contiguous(grad_entropy_T), entropy_T, max_T, log_sum_T,
            *ctx.shard,
        )  # fmt: skip
        return grad_TV, *(None,) * 7


def contiguous(grad_T: Tensor | None) -> Tensor | None:
    """What autograd hands to backward() may be expanded, as after ``sum()``."""
    return None if grad_T is None else grad_T.contiguous()
