// Log-probability and entropy of a token from vocabulary-sharded logits. Contracts: r1_megatron/kernels/ops.py.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace r1 {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor shard_statistics_cpu(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_real,
                            double temperature, bool need_entropy);
FourTensors combine_statistics_cpu(const Tensor& stats);
void shard_gradient_cpu(Tensor logits, const Tensor& targets, std::optional<Tensor> grad_logprobs,
                        std::optional<Tensor> grad_entropy, const Tensor& entropy, const Tensor& max,
                        const Tensor& log_sum, int64_t vocab_start, int64_t num_real, double temperature);

#ifdef R1_WITH_CUDA
Tensor shard_statistics_cuda(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_real,
                             double temperature, bool need_entropy);
FourTensors combine_statistics_cuda(const Tensor& stats);
void shard_gradient_cuda(Tensor logits, const Tensor& targets, std::optional<Tensor> grad_logprobs,
                         std::optional<Tensor> grad_entropy, const Tensor& entropy, const Tensor& max,
                         const Tensor& log_sum, int64_t vocab_start, int64_t num_real, double temperature);
#endif

}  // namespace r1
