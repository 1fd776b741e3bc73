"""The expert layer as one function: its gradients, where they go, and what it keeps for them."""

from __future__ import annotations

import torch

from r1_megatron.kernels.experts import grouped_swiglu_experts

M, H, E, F = 11, 6, 4, 3
# The second expert has no row, and two rows belong to none.
OFFSETS = torch.tensor([4, 4, 8, 9])


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = (M, H), (M,), (E, 2 * F, H), (E, H, F)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tuple(tensor.requires_grad_() for tensor in tensors)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *tensors: grouped_swiglu_experts(*tensors, OFFSETS), inputs())


def test_rows_of_no_expert_are_zero() -> None:
    assert (grouped_swiglu_experts(*inputs(), OFFSETS)[9:] == 0).all()


def test_weight_gradients_are_added_to_main_grad() -> None:
    plain, buffered = inputs(), inputs()
    for weight in buffered[2:]:
        weight.main_grad = torch.ones_like(weight)
    grouped_swiglu_experts(*plain, OFFSETS).square().sum().backward()
    grouped_swiglu_experts(*buffered, OFFSETS).square().sum().backward()
    for mine, theirs in zip(buffered[2:], plain[2:]):
        assert mine.grad_added_to_main_grad
        torch.testing.assert_close(mine.main_grad, theirs.grad + 1, rtol=1e-12, atol=1e-12)
        assert (mine.main_grad[1] == 1).all()
    for mine, theirs in zip(buffered[:2], plain[:2]):
        assert torch.equal(mine.grad, theirs.grad)


def test_the_activation_is_not_kept() -> None:
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        grouped_swiglu_experts(*inputs(), OFFSETS)
    assert sorted(kept) == sorted([(M, H), (M, 2 * F), (M,), (E,)])
