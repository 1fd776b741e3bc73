// Launchers of kernel.cu. They return a cudaError_t.
#pragma once

#include "token_statistics/math.h"

extern "C" {
// stats [num_tokens, 4]
int r1_shard_statistics_cuda(const r1::LogitShard* shard, bool is_bfloat16, bool need_entropy, float* stats,
                             void* stream);
// results: four pointers to [num_tokens]
int r1_combine_statistics_cuda(const float* stats, int64_t num_shards, int64_t num_tokens, float* const* results,
                               void* stream);
// All [num_tokens]; the first two may be null.
int r1_shard_gradient_cuda(const r1::LogitShard* shard, bool is_bfloat16, const float* grad_logprobs,
                           const float* grad_entropy, const float* entropy, const float* max, const float* log_sum,
                           void* stream);
}
