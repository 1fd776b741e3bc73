"""Grouped queries, packing and rotation of the dense students against plain formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from r1_megatron.model import attention
from r1_megatron.model.attention import CausalAttention, attends_to_beginnings, packed_causal_attention
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


def test_another_attention_is_not_asked_to_share() -> None:
    """Transformer Engine's is told of boundaries only, and there may be both kinds in a model."""
    ours = CausalAttention(
        SimpleNamespace(context_parallel_size=1, attention_dropout=0, kv_channels=8), 1, None, "self"
    )

    def layers(*cores: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.ModuleList(torch.nn.ModuleDict({"core_attention": core}) for core in cores)

    assert attends_to_beginnings(layers(ours, ours))
    assert not attends_to_beginnings(layers(ours, torch.nn.Identity()))


@pytest.mark.parametrize("groups", [6, 2])
def test_pieces_go_on_behind_a_beginning(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beginnings and a whole sequence, against every sequence by itself: the answer and all gradients."""
    monkeypatch.setattr(attention, "_MASKED_ROWS", 3)  # so that a piece is attended in several parts
    lengths, starts = (4, 7, 1, 3, 5, 2, 4), (0, 4, 4, 4, 0, 0, 2)
    rows = torch.arange(sum(lengths)).split(lengths)
    sequences = [(rows[0], rows[1]), (rows[0], rows[2]), (rows[0], rows[3]), (rows[4][:0], rows[4]), (rows[5], rows[6])]
    q, k, v = (torch.randn(26, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, groups, groups))
    pull = torch.randn(26, 6, 8, dtype=torch.float64)
    found = packed_causal_attention(q, k, v, lengths, 0.3, starts)
    found_gradients = torch.autograd.grad(found, (q, k, v), pull)
    expected, total, left = torch.zeros_like(pull), torch.zeros(()), pull.clone()
    for beginning, rest in sequences:
        whole = torch.cat([beginning, rest])
        alone = packed_causal_attention(q[whole], k[whole], v[whole], (len(whole),), 0.3)
        expected[whole] = alone.detach()
        total = total + (alone * left[whole]).sum()
        left[whole] = 0.0  # the rows of a beginning are pulled once
    torch.testing.assert_close(found, expected)
    for a, b in zip(found_gradients, torch.autograd.grad(total, (q, k, v))):
        torch.testing.assert_close(a, b)


def test_masks_lie_where_the_kernel_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and the first element at multiples of 8 elements: otherwise PyTorch's kernel on CUDA copies the mask, or
    raises "attn_bias_ptr is not correctly aligned". Prompts may end anywhere."""
    monkeypatch.setattr(attention, "_MASKED_ROWS", 32)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watch(*inputs: torch.Tensor, attn_mask: torch.Tensor | None, **options):
        if attn_mask is not None:
            masks.append((attn_mask.storage_offset(), *attn_mask.stride()))
        return attend(*inputs, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    lengths, starts = (5, 70, 3, 59, 11, 13, 9), (0, 5, 5, 5, 0, 11, 11)
    x_TNK = torch.randn(sum(lengths), 2, 8)
    packed_causal_attention(x_TNK, x_TNK, x_TNK, lengths, 0.3, starts)
    assert len(masks) == 3 + 1 + 2 + 1 + 1
    assert all(offset % 8 == 0 and row % 8 == 0 and column == 1 for offset, row, column in masks)


def test_halves_turn_as_complex_numbers() -> None:
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    angle = torch.randn(7, 1, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate_halves(x, angle.cos(), angle.sin()), expected)
