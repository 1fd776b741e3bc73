// One vocabulary shard's part of drawing a token a row. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor draw_tokens_cpu(const Tensor& logits, const Tensor& keys, int64_t vocab_start, int64_t vocab_size,
                       double temperature);

}  // namespace r1
