// Grouped GEMM: E products whose rows are split at `offsets`. Contracts: r1_megatron/kernels/ops.py.
#pragma once

#include "common/tensor.h"

namespace r1 {

Tensor grouped_mm_cpu(const Tensor& x, const Tensor& weight, const Tensor& offsets);
Tensor grouped_mm_dgrad_cpu(const Tensor& dy, const Tensor& weight, const Tensor& offsets);
void grouped_mm_wgrad_cpu(const Tensor& dy, const Tensor& x, const Tensor& offsets, Tensor out, bool accumulate);

#ifdef R1_WITH_CUDA
Tensor grouped_mm_cuda(const Tensor& x, const Tensor& weight, const Tensor& offsets);
Tensor grouped_mm_dgrad_cuda(const Tensor& dy, const Tensor& weight, const Tensor& offsets);
void grouped_mm_wgrad_cuda(const Tensor& dy, const Tensor& x, const Tensor& offsets, Tensor out, bool accumulate);
#endif

}  // namespace r1
