// Attention of single rows over a paged cache. Contract: r1_megatron/kernels/decode.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor paged_attention_cpu(const Tensor& query, const Tensor& cache, const Tensor& page_table, const Tensor& lengths,
                           int64_t num_groups, int64_t value_start, int64_t value_width, double scale);

#ifdef R1_WITH_CUDA
Tensor paged_attention_cuda(const Tensor& query, const Tensor& cache, const Tensor& page_table, const Tensor& lengths,
                            int64_t num_groups, int64_t value_start, int64_t value_width, double scale);
#endif

}  // namespace r1
