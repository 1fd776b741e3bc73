"""Attention behind a shared beginning on a GPU: ``pytest -m gpu tests/kernels/test_cuda_attention.py``."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from r1_megatron.model.attention import packed_causal_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("start", [130, 128, 121])
def test_pieces_behind_a_beginning_on_cuda(start: int, groups: int) -> None:
    """In bfloat16 against float64 on the CPU, and never by the kernel that writes all scores down."""
    lengths, starts = (start, 1030, 6, 600), (0, start, start, start)
    shapes = [(sum(lengths), heads, width) for heads, width in ((4, 192), (groups, 192), (groups, 128))]
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    pull = torch.randn(sum(lengths), 4, 128, dtype=torch.bfloat16, device="cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = packed_causal_attention(*inputs, lengths, 0.07, starts)
        gradients = torch.autograd.grad(found, inputs, pull)
    expected = packed_causal_attention(*exact, lengths, 0.07, starts)
    for got, want in zip(
        (found, *gradients), (expected, *torch.autograd.grad(expected, exact, pull.cpu().double())), strict=True
    ):
        assert (got.cpu().double() - want).norm() <= 1e-2 * want.norm()
