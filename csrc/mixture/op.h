// The routed experts of one rank for a few tokens. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor mixture_of_experts_cpu(const Tensor& x, const Tensor& gates, const Tensor& experts, const Tensor& w1,
                              const Tensor& w2, int64_t first_expert);

}  // namespace r1
