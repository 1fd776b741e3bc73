// A linear layer for a few rows. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor linear_rows_cpu(const Tensor& x, const Tensor& weight);

}  // namespace r1
