"""The steps of decoding that are worth an operator each: attention over a paged cache, and what stands around it.

They are for generation only: none of them has a gradient, and a call that would record one raises. A row's bits depend
on nothing but the row and what it attends to: batch, pages and neighbours change nothing.

A page is ``page_size`` consecutive positions of one sequence in ``cache [num_pages, page_size, W]``. The token at
``position`` of a sequence lies in row ``page * page_size + position % page_size`` of ``cache.view(-1, W)``, where
``page`` is entry ``position // page_size`` of the sequence's page table.

Shapes: D rows (tokens), H heads of this rank, G groups of heads that share keys and values, K width of a key, V width
of a value, W numbers kept of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

    Scores, softmax and sums are float32 (float64 for float64). What lies behind a row's length is not read. On the CPU
    a page or a length out of range raises; on CUDA nobody reads them before the kernel does.
    """
    _refuse_gradient("paged_attention", query_DHK, cache)
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


def _refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} has no gradient: call it within torch.no_grad()")
