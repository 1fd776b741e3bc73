#pragma once

#include "common/cpu.h"
#include "token_statistics/math.h"

namespace r1 {

enum class Logits { float32, bfloat16, float64 };

// The per-token tensors of the gradient. `void` is float, or double for Logits::float64; null gradients count as zero.
struct TokenGradients {
  const void *logprobs, *entropy_gradients, *entropy, *max, *log_sum;
};

// Tokens [begin, end) of the shard; stats is [num_tokens, 4] of float, or of double for Logits::float64.
R1_DECLARE_CPU(void shard_statistics(Logits dtype, const LogitShard& shard, bool need_entropy, void* stats,
                                     int64_t begin, int64_t end))
R1_DECLARE_CPU(void shard_gradient(Logits dtype, const LogitShard& shard, const TokenGradients& gradients,
                                   int64_t begin, int64_t end))
R1_DECLARE_CPU(void combine_statistics(bool is_double, const void* stats, int64_t num_shards, int64_t num_tokens,
                                       void* const results[4], int64_t begin, int64_t end))

}  // namespace r1
