"""Where the gradient of a weight goes: straight into the data-parallel buffer where there is one.

megatron-core's data parallelism keeps a ``main_grad`` for every parameter, float32 whatever the parameter is. An
operator that adds its product there itself saves a copy of the weight's size, and for bf16 weights also the rounding.
The protocol is the one of megatron-core's own fused gradient accumulation: ``grad_added_to_main_grad`` tells its hook
that the sum is done, and some gradient must still be answered, since it is the hook that reports the parameter as
ready.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def weight_gradient(weight: Tensor, add_product: Callable[[Tensor, bool], None]) -> Tensor:
    """Run ``add_product(out, accumulate)`` where it belongs; answers what backward() must return for ``weight``.

    ``out`` has the shape of ``weight``; with ``accumulate`` the product is added to it, else written.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        grad = torch.empty_like(weight)
        add_product(grad, False)
        return grad
    add_product(main_grad, True)
    weight.grad_added_to_main_grad = True
    return placeholder(weight)


def placeholder(weight: Tensor) -> Tensor:
    """A gradient that nobody reads; zeros where megatron-core adds it all the same (tied embeddings)."""
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
