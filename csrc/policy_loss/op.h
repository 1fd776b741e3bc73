// The surrogate of one token and its gradient. Contract: r1_megatron/kernels/ops.py.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace r1 {

using PolicySurrogate = std::tuple<Tensor, Tensor, Tensor, Tensor>;

#define R1_POLICY_SURROGATE_ARGUMENTS                                                                               \
  const Tensor &logprobs, std::optional<Tensor> entropy, const Tensor &loss_mask, const Tensor &weights,            \
      const Tensor &advantages, const Tensor &behaviour_logprobs, std::optional<Tensor> old_logprobs,               \
      std::optional<Tensor> reference_logprobs, std::optional<Tensor> cu_seqlens, std::string variant,              \
      double clip_low, double clip_high, std::optional<double> dual_clip, std::string kl_estimator, double kl_coef, \
      double entropy_coef, std::optional<double> tis_cap

PolicySurrogate policy_surrogate_cpu(R1_POLICY_SURROGATE_ARGUMENTS);

#ifdef R1_WITH_CUDA
PolicySurrogate policy_surrogate_cuda(R1_POLICY_SURROGATE_ARGUMENTS);
#endif

}  // namespace r1
