// The choice of experts for single tokens. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace r1 {

std::tuple<Tensor, Tensor> route_tokens_cpu(const Tensor& scores, std::optional<Tensor> bias, int64_t topk,
                                            int64_t num_groups, int64_t group_topk, double scaling);

}  // namespace r1
