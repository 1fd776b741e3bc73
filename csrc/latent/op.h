// Multi-head latent attention around its absorbed scores. Contracts: r1_megatron/kernels/decode.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor latent_query_cpu(const Tensor& query, const Tensor& latent, const Tensor& up, const Tensor& norm_weight,
                        const Tensor& cos, const Tensor& sin, double eps, Tensor cache, const Tensor& cache_rows);
Tensor latent_values_cpu(const Tensor& mixed, const Tensor& up, int64_t value_width);

}  // namespace r1
