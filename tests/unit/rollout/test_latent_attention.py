"""Pieces of the generation path of latent attention against plain formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from r1_megatron.model.generation import pack_prompts, scores_float32
from r1_megatron.model.latent_attention import norm_before, rotate


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    angle = torch.randn(7, 1, 4, dtype=torch.float64)
    turned = torch.view_as_complex(x.view(7, 3, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected)


def test_scores_keep_float32_whatever_the_input() -> None:
    """bfloat16 inputs: rounding the scores themselves to bfloat16 would be off by 2**-8 of their size."""
    q, k = torch.randn(3, 4, 16) * 4, torch.randn(3, 5, 16) * 4
    bias = torch.zeros(3, 1, 5)
    bias[1, 0, 3:] = -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        scores = scores_float32(q.to(dtype), k.to(dtype), 0.3, bias)
        expected = 0.3 * q.to(dtype).double() @ k.to(dtype).double().transpose(1, 2) + bias.double()
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)


def test_norm_of_a_fused_projection() -> None:
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    fused = SimpleNamespace(layer_norm_weight=weight)
    torch.testing.assert_close(norm_before(fused, torch.nn.Identity(), x), normed * weight)
    assert norm_before(SimpleNamespace(), lambda y: y + 1, x).equal(x + 1)


def test_prompts_are_packed() -> None:
    assert pack_prompts((), torch.device("cpu")) is None
    packed = pack_prompts((4, 1, 3), torch.device("cpu"))
    assert packed.cu_seqlens_q.tolist() == [0, 4, 5, 8] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_kv == 4 and packed.lengths == (4, 1, 3)
