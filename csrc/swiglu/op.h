// SwiGLU times the router's probability, and its gradient. Contracts: r1_megatron/kernels/ops.py.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace r1 {

Tensor swiglu_cpu(const Tensor& h, std::optional<Tensor> probs);
std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cpu(const Tensor& da, const Tensor& h, std::optional<Tensor> probs);

#ifdef R1_WITH_CUDA
Tensor swiglu_cuda(const Tensor& h, std::optional<Tensor> probs);
std::tuple<Tensor, Tensor, Tensor> swiglu_backward_cuda(const Tensor& da, const Tensor& h, std::optional<Tensor> probs);
#endif

}  // namespace r1
