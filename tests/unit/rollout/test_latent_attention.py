"""Pieces of the generation path of latent attention against plain formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from r1_megatron.model.generation import pack_prompts
from r1_megatron.model.latent_attention import norm_before, rotate


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    angle = torch.randn(7, 1, 4, dtype=torch.float64)
    turned = torch.view_as_complex(x.view(7, 3, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected)


def test_norm_of_a_fused_projection() -> None:
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    fused = SimpleNamespace(layer_norm_weight=weight)
    torch.testing.assert_close(norm_before(fused, torch.nn.Identity(), x), normed * weight)
    torch.testing.assert_close(norm_before(SimpleNamespace(), SimpleNamespace(weight=weight), x), normed * weight)


def test_prompts_are_packed() -> None:
    assert pack_prompts((), torch.device("cpu")) is None
    packed = pack_prompts((4, 1, 3), torch.device("cpu"))
    assert packed.cu_seqlens_q.tolist() == [0, 4, 5, 8] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_kv == 4 and packed.lengths == (4, 1, 3)
