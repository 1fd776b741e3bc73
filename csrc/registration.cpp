// The table of contents. Schemas, shapes and the plain PyTorch forms are r1_megatron/kernels/ops.py's; what is here
// attaches to them: one folder an operator, op.cpp its checks and dispatch, cpu.cpp and *.cu its arithmetic.
#include "common/cpu.h"
#include "common/tensor.h"
#include "draw/op.h"
#include "grouped_gemm/op.h"
#include "latent/op.h"
#include "linear_rows/op.h"
#include "mixture/op.h"
#include "paged_attention/op.h"
#include "policy_loss/op.h"
#include "rms_norm/op.h"
#include "routing/op.h"
#include "swiglu/op.h"
#include "token_statistics/op.h"

namespace r1 {

// 0 baseline, 1 AVX2, 2 AVX-512
int64_t capability_of_cpu() { return static_cast<int64_t>(cpu_capability()); }

bool compiled_with_cuda() {
#ifdef R1_WITH_CUDA
  return true;
#else
  return false;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(r1_megatron, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm_cpu));
  m.impl("grouped_mm_dgrad", TORCH_BOX(&grouped_mm_dgrad_cpu));
  m.impl("grouped_mm_wgrad", TORCH_BOX(&grouped_mm_wgrad_cpu));
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
  m.impl("shard_statistics", TORCH_BOX(&shard_statistics_cpu));
  m.impl("combine_statistics", TORCH_BOX(&combine_statistics_cpu));
  m.impl("shard_gradient_", TORCH_BOX(&shard_gradient_cpu));
  m.impl("policy_surrogate", TORCH_BOX(&policy_surrogate_cpu));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
  m.impl("route_tokens", TORCH_BOX(&route_tokens_cpu));
  m.impl("mixture_of_experts", TORCH_BOX(&mixture_of_experts_cpu));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("latent_query", TORCH_BOX(&latent_query_cpu));
  m.impl("latent_values", TORCH_BOX(&latent_values_cpu));
  m.impl("linear_rows", TORCH_BOX(&linear_rows_cpu));
  m.impl("draw_tokens", TORCH_BOX(&draw_tokens_cpu));
}

#ifdef R1_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(r1_megatron, CUDA, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm_cuda));
  m.impl("grouped_mm_dgrad", TORCH_BOX(&grouped_mm_dgrad_cuda));
  m.impl("grouped_mm_wgrad", TORCH_BOX(&grouped_mm_wgrad_cuda));
  m.impl("swiglu", TORCH_BOX(&swiglu_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cuda));
  m.impl("shard_statistics", TORCH_BOX(&shard_statistics_cuda));
  m.impl("combine_statistics", TORCH_BOX(&combine_statistics_cuda));
  m.impl("shard_gradient_", TORCH_BOX(&shard_gradient_cuda));
  m.impl("policy_surrogate", TORCH_BOX(&policy_surrogate_cuda));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(r1_megatron, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capability_of_cpu));
  m.impl("compiled_with_cuda", TORCH_BOX(&compiled_with_cuda));
}

}  // namespace r1
