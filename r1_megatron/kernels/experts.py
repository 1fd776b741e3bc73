"""The expert layer as one differentiable function: two grouped products around SwiGLU, for all experts at once.

The tokens lie sorted by expert; ``offsets`` says where each expert's rows end. Per token, with its expert's weights ::

    h = w1 x        a = silu(h[:F]) h[F:] prob        y = w2 a

Kept for the gradient are ``x`` and ``h``. The activation is computed again in the pass that differentiates it, which
reads ``h`` anyway: keeping it would save nothing but arithmetic that the memory traffic hides.

Shapes: M tokens (each counted once per chosen expert), H hidden, E local experts, F width of one expert on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1_megatron.kernels.ops import ops
from r1_megatron.kernels.weight_grad import weight_gradient


def grouped_swiglu_experts(x_MH: Tensor, probs_M: Tensor, w1_EGH: Tensor, w2_EHF: Tensor, offsets_E: Tensor) -> Tensor:
    """``[M, H]``, differentiable with respect to tokens, probabilities and both weights.

    Args:
        x_MH: the tokens, sorted by expert; float32, bfloat16 (or float64 on CPU), like the weights.
        probs_M: the router's probability of each row, usually float32.
        w1_EGH: gate and up projection stacked, ``G = 2 F`` rows.
        w2_EHF: down projection.
        offsets_E: int32 or int64, end of each expert's rows; on CUDA it is read by the kernels only.

    Rows past the last offset answer zero. Weight gradients go to ``main_grad`` where there is one
    (:mod:`~r1_megatron.kernels.weight_grad`).
    """
    return _GroupedExperts.apply(x_MH, probs_M, w1_EGH, w2_EHF, offsets_E)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probs, w1, w2, offsets):
        x = x.contiguous()
        h = ops.grouped_mm(x, w1, offsets)
        y = ops.grouped_mm(ops.swiglu(h, probs), w2, offsets)
        ctx.save_for_backward(x, h, probs, offsets)
        ctx.weights = (w1, w2)  # the parameters themselves: main_grad is an attribute of theirs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, probs, offsets = ctx.saved_tensors
        w1, w2 = ctx.weights
        needs_x, needs_probs, needs_w1, needs_w2, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        da = ops.grouped_mm_dgrad(dy, w2, offsets)
        dh, a, dprobs = ops.swiglu_backward(da, h, probs)
        dx = dw1 = dw2 = None
        if needs_w2:
            dw2 = weight_gradient(w2, lambda out, add: ops.grouped_mm_wgrad(dy, a, offsets, out, add))
        if needs_x:
            dx = ops.grouped_mm_dgrad(dh, w1, offsets)
        if needs_w1:
            dw1 = weight_gradient(w1, lambda out, add: ops.grouped_mm_wgrad(dh, x, offsets, out, add))
        return dx, dprobs if needs_probs else None, dw1, dw2, None
