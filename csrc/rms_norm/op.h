// A residual sum and its RMSNorm. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace r1 {

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps,
                                        std::optional<Tensor> residual);

}  // namespace r1
