"""The steps of decoding that are worth an operator each: attention over a paged cache, and what stands around it.

They are for generation only: none of them has a gradient, and a call that would record one raises. A row's bits depend
on nothing but the row and what it attends to: batch, pages and neighbours change nothing.

A page is ``page_size`` consecutive positions of one sequence in ``cache [num_pages, page_size, W]``. The token at
``position`` of a sequence lies in row ``page * page_size + position % page_size`` of ``cache.view(-1, W)``, where
``page`` is entry ``position // page_size`` of the sequence's page table.

Shapes: D rows (tokens), H heads of this rank, G groups of heads that share keys and values, K width of a key, V width
of a value, W numbers kept of a token. Of experts: T tokens, H hidden, E experts of this rank, F width of one.
Of latent attention: R latent, P rotary, N other channels of a key; A rows of the up-projection a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1_megatron.kernels import flash
from r1_megatron.kernels.ops import ops


def paged_attention(
    query_DHK: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    num_groups: int,
    value_start: int,
    value_width: int,
    scale: float,
    schedule: flash.Schedule | None = None,
) -> Tensor:
    """Attention of each row over the first positions of its sequence: ``[D, H, V]`` in the query's dtype.

    Rows know nothing of each other: a row is a decode token, or one token of a prompt's later chunk, in which case
    several rows have the same page table. The H / G heads of a group stand together in ``query_DHK``. Group ``g`` has
    the key ``cache[..., g K : (g + 1) K]`` and the value ``cache[..., value_start + g V : value_start + (g + 1) V]``.
    The two may overlap: latent attention (DeepSeek-V2, arXiv 2405.04434) has one group, K = latent + rotary part,
    V = latent and ``value_start = 0``.

    Args:
        query_DHK: float32, bfloat16, or on CPU float64.
        cache: ``[num_pages, page_size, W]``, the query's dtype.
        page_table: int32 ``[D, max_pages]``, each row's pages in the order of positions; unused entries are 0.
        lengths: int32 ``[D]``, positions a row looks back on, its own included; a row of length 0 answers zero.
        num_groups: G, a divisor of H.
        value_start, value_width: where the values lie, in numbers.
        scale: of the scores.
        schedule: a dictionary that belongs to these ``lengths``, empty at first: whoever shares the work out by them
            does it once for all layers of a step. ``None``: once a call.

    On CUDA the libraries of ``flash.py`` come first, where they are installed and take the case.

    Scores, softmax and sums are float32 (float64 for float64). What lies behind a row's length is not read. On the CPU
    a page or a length out of range raises; on CUDA nobody reads them before the kernel does.
    """
    _refuse_gradient("paged_attention", query_DHK, cache)
    libraries = flash.load(query_DHK.device.type)
    if attention := flash.choose(libraries, query_DHK, cache, num_groups, value_start, value_width):
        return attention(query_DHK, cache, page_table, lengths, scale, {} if schedule is None else schedule)
    return ops.paged_attention(
        query_DHK,
        cache,
        page_table,
        lengths,
        num_groups=num_groups,
        value_start=value_start,
        value_width=value_width,
        scale=scale,
    )


def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    topk: int,
    *,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16): gates float32 and experts int64, each ``[T, topk]``.

    Scores are the sigmoids of the logits. The bias counts for the choice only. With ``group_topk < num_groups`` a
    group is worth its two best ``score + bias`` together, and only the experts of the best groups compete. The best
    expert comes first; among equals the lowest number, for groups too (``torch.topk``, which the training router asks,
    promises no order there). Gates are ``score / (sum of the chosen scores + 1e-20) * scaling``.

    Args:
        logits_TE: float32 (or float64), E experts in groups of neighbours.
        bias_E: the logits' dtype, or ``None``.
    """
    _refuse_gradient("route_tokens", logits_TE, bias_E)
    # PyTorch's own sigmoid, which training uses: a choice that hangs on the last bit is made alike.
    return ops.route_tokens(logits_TE.sigmoid(), bias_E, topk, num_groups or 1, group_topk or num_groups or 1, scaling)


def mixture_of_experts(
    x_TH: Tensor, gates_TK: Tensor, experts_TK: Tensor, w1_EGH: Tensor, w2_EHF: Tensor, first_expert: int
) -> Tensor:
    """What this rank's experts add for each token: ``[T, H]`` in the dtype of x.

    ``sum over k of w2 (gate_k * silu(h[:F]) * h[F:])`` with ``h = w1 x`` of expert ``experts_TK[t, k]``, the function
    of :func:`~r1_megatron.kernels.experts.grouped_swiglu_experts` for few tokens: nothing is sorted or packed in
    memory, weights are read once. Experts outside ``[first_expert, first_expert + E)`` add nothing; so does -1, for
    rows that are padding. One token's choices differ from each other.

    Args:
        x_TH: float32, bfloat16, or on CPU float64, like the weights.
        gates_TK: float32.
        experts_TK: int64, numbers of all ranks' experts.
        w1_EGH: gate and up projection stacked, ``G = 2 F`` rows.
        w2_EHF: down projection.

    Products and the sum over k are float32 (float64 for float64); the activation is rounded to the dtype of x.
    """
    _refuse_gradient("mixture_of_experts", x_TH, gates_TK, w1_EGH, w2_EHF)
    return ops.mixture_of_experts(x_TH, gates_TK, experts_TK, w1_EGH, w2_EHF, first_expert)


def rms_norm(x_TN: Tensor, weight_N: Tensor, eps: float, residual_TN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(RMSNorm of ``x + residual``, that sum), each ``[T, N]`` in the dtype of x; without a residual the sum is x.

    The function of ``torch.nn.RMSNorm`` (arXiv 1910.07467), in float32 for bfloat16. The sum is rounded before it is
    normed, as where the two are separate steps. The rows of x may stand apart (a slice of columns).
    """
    _refuse_gradient("rms_norm", x_TN, weight_N, residual_TN)
    normed_TN, summed_TN = ops.rms_norm(x_TN, weight_N, eps, residual_TN)
    return normed_TN, x_TN if residual_TN is None else summed_TN


def latent_query(
    query_THK: Tensor,
    latent_TW: Tensor,
    up_HAR: Tensor,
    norm_weight_R: Tensor,
    cos_TP: Tensor,
    sin_TP: Tensor,
    eps: float,
    cache: Tensor,
    cache_rows: Tensor,
) -> Tensor:
    """Latent attention up to its scores: writes the tokens into the cache, answers absorbed queries ``[T, H, R + P]``.

    A token is kept as its latent, normed, and its key's rotary part, rotated. A query's first N numbers are multiplied
    by the keys' up-projection (so that they meet latents), its last P are rotated: what :func:`paged_attention` takes
    as query with ``num_groups=1``. Rotation takes pairs (2i, 2i + 1) and leaves halves, as megatron-core's MLA.

    Args:
        query_THK: K = N + P, before rotation.
        latent_TW: W = R + P, before norm and rotation; its rows may stand apart (a slice of columns).
        up_HAR: A = N + V rows a head, those of the keys first: a view of ``linear_kv_up_proj.weight``.
        norm_weight_R: of the latent's RMSNorm; ``eps`` is its epsilon.
        cos_TP, sin_TP: ``[T, P / 2]``, by position.
        cache: ``[num_pages, page_size, R + P]``, is written.
        cache_rows: int64 ``[C]``, rows of ``cache.view(-1, R + P)`` for the first C <= T tokens; others are not kept.

    All of the query's dtype; float32 inside for bfloat16, rounded once.
    """
    _refuse_gradient("latent_query", query_THK, latent_TW, up_HAR, norm_weight_R)
    return ops.latent_query(query_THK, latent_TW, up_HAR, norm_weight_R, cos_TP, sin_TP, eps, cache, cache_rows)


def latent_values(mixed_THR: Tensor, up_HAR: Tensor, value_width: int) -> Tensor:
    """Latent attention behind its scores: mixed latents times each head's last ``value_width`` rows, ``[T, H * V]``.

    ``up_HAR`` as in :func:`latent_query`; products are summed in float32 (float64 for float64).
    """
    _refuse_gradient("latent_values", mixed_THR, up_HAR)
    return ops.latent_values(mixed_THR, up_HAR, value_width)


def linear_rows(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` for the few rows of a decode step: ``[T, N]`` in the dtype of x.

    The weight is read once and not packed, and a row's bits depend on the row alone, which a general product does not
    promise. Sums are float32 (float64 for float64). The rows of x may stand apart (a slice of columns).
    """
    _refuse_gradient("linear_rows", x_TK, weight_NK)
    return ops.linear_rows(x_TK, weight_NK)


def draw_tokens(logits_BV: Tensor, keys_B: Tensor, vocab_start: int, vocab_size: int, temperature: float) -> Tensor:
    """One vocabulary shard's part of Gumbel-max sampling without truncation: float64 ``[B, 5]``.

    Columns: best score, its vocabulary id, its logit, the largest logit, the sum of ``exp(logit - largest)``; logits at
    the temperature. The score is the logit plus the Gumbel noise of ``rollout/sampler.py`` (the same hashed bits of row
    key and vocabulary id, its float32 to rounding); at temperature 0 it is the logit. Among equals the lowest id wins.

    Args:
        logits_BV: this shard's columns, vocabulary ids ``[vocab_start, vocab_start + V)``, used in float32.
        keys_B: int64, of :func:`r1_megatron.rollout.sampler.position_keys`.
        vocab_size: columns of ids from here on are padding and are not read.

    A row with NaN or +inf has NaN in its sum, so that its log-probability is NaN. A shard of padding only answers
    (-inf, vocab_start, -inf, -inf, 0).
    """
    _refuse_gradient("draw_tokens", logits_BV)
    return ops.draw_tokens(logits_BV, keys_B, vocab_start, vocab_size, temperature)


def _refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} has no gradient: call it within torch.no_grad()")
