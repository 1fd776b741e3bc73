"""The steps of decoding on CUDA for which ``csrc/`` has no kernel: PyTorch, arranged for that device.

The functions of ``reference.py``, with two promises that the plain forms do not make. Weights are multiplied as they
are: a product of bfloat16 is one of the tensor cores, summed in float32 and rounded once, not a float32 product of
widened copies. And nothing waits for the device or has a shape that depends on values, so that a CUDA graph can hold
it. Experts are read if a token chose them, not all of them.

Shapes: those of ``decode.py``; P = T K pairs of a token and an expert it chose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1_megatron.kernels import library, reference


def mixture_of_experts(x: Tensor, gates: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, first_expert: int) -> Tensor:
    """Pairs sorted by expert between two grouped products; those of other ranks' experts come last and add nothing."""
    if not library.load().with_cuda:  # the plain grouped product asks the device how many rows each expert has
        return reference.mixture_of_experts(x, gates, experts, w1, w2, first_expert)
    ops = torch.ops.r1_megatron
    num_experts, topk = w1.shape[0], experts.shape[1]
    expert_P = experts.flatten() - first_expert
    expert_P = torch.where((expert_P >= 0) & (expert_P < num_experts), expert_P, num_experts)
    sorted_P, order_P = expert_P.sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, torch.arange(num_experts, device=x.device), right=True)
    h_PG = ops.grouped_mm(x[order_P // topk], w1, ends_E)
    y_PH = ops.grouped_mm(ops.swiglu(h_PG, gates.flatten()[order_P]), w2, ends_E)  # zero past the last end
    back_PH = torch.empty_like(y_PH).index_copy_(0, order_P, y_PH)
    return back_PH.unflatten(0, (-1, topk)).sum(1, dtype=_arithmetic(x)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    normed = F.rms_norm(summed, (x.shape[1],), weight, eps)  # float32 inside
    return normed, x.new_empty(0) if residual is None else summed


def latent_query(
    query: Tensor,
    latent: Tensor,
    up: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    cache: Tensor,
    cache_rows: Tensor,
) -> Tensor:
    rank, rope = len(norm_weight), 2 * cos.shape[1]
    nope = query.shape[2] - rope
    kept_TW = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    kept_TW[:, :rank] = F.rms_norm(latent[:, :rank], (rank,), norm_weight, eps)
    kept_TW[:, rank:] = _rotate(latent[:, None, rank:], cos, sin)[:, 0]
    cache.view(-1, cache.shape[-1]).index_copy_(0, cache_rows, kept_TW[: len(cache_rows)])
    absorbed_THW = query.new_empty(*query.shape[:2], rank + rope)
    absorbed_THW[..., :rank] = torch.bmm(query[..., :nope].transpose(0, 1), up[:, :nope]).transpose(0, 1)
    absorbed_THW[..., rank:] = _rotate(query[..., nope:], cos, sin)
    return absorbed_THW


def latent_values(mixed: Tensor, up: Tensor, value_width: int) -> Tensor:
    value_HTV = torch.bmm(mixed.transpose(0, 1), up[:, -value_width:].transpose(1, 2))
    return value_HTV.transpose(0, 1).flatten(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[T, heads, P]`` rotated in float32: pairs in, halves out."""
    dtype = _arithmetic(x)
    cos_T1P, sin_T1P = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    return torch.cat([even * cos_T1P - odd * sin_T1P, odd * cos_T1P + even * sin_T1P], -1)


def _arithmetic(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
