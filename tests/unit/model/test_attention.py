"""Grouped queries, packing and rotation of the dense students against plain formulas in float64."""

from __future__ import annotations

import torch

from r1_megatron.model.attention import packed_causal_attention
from r1_megatron.model.dense_attention import rotate_halves


def test_each_key_value_head_serves_its_query_heads() -> None:
    lengths, scale = (5, 1, 3), 0.3
    q, k, v = (torch.randn(9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    found = packed_causal_attention(q, k, v, lengths, scale)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        for head in range(6):
            scores = scale * q[rows, head] @ k[rows, head // 3].T
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ v[rows, head // 3]
            torch.testing.assert_close(found[rows, head], expected)
        first += length


def test_halves_turn_as_complex_numbers() -> None:
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    angle = torch.randn(7, 1, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate_halves(x, angle.cos(), angle.sin()), expected)
