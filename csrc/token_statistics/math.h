// What the CPU and the CUDA kernels share: the shard they read and the arithmetic of one token.
// The formulae: r1_megatron/kernels/vocab_parallel.py.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace r1 {

// One rank's columns: logits [num_tokens, vocab], contiguous, of which the first num_real count.
struct LogitShard {
  void* logits;
  const int64_t* targets;
  int64_t num_tokens, vocab, vocab_start, num_real;
  double temperature;
};

// The column of a target, or -1 where this shard does not own it. Any id is safe.
R1_HOST_DEVICE int64_t owned_column(const LogitShard& shard, int64_t token) {
  const int64_t target = shard.targets[token];
  const int64_t owned = target >= shard.vocab_start && target < shard.vocab_start + shard.num_real;
  return owned ? target - shard.vocab_start : -1;
}

// sum = sum of exp(z - reference) and weighted = sum of exp(z - reference) (z - reference) become those for a
// reference that lies `-shift` higher; scale = exp(shift).
template <class Real>
R1_HOST_DEVICE void move_reference(Real& sum, Real& weighted, Real shift, Real scale) {
  weighted = scale * (weighted + sum * shift);
  sum = scale * sum;
}

// stats [num_shards, num_tokens, 4] -> results[0..3][token]: log-probability, entropy, max, log_sum.
template <class Real>
R1_HOST_DEVICE void combine_token(const Real* stats, int64_t num_shards, int64_t num_tokens, int64_t token,
                                  Real* const results[4]) {
  const int64_t stride = 4 * num_tokens;
  const Real* own = stats + 4 * token;
  Real max = own[0];
  for (int64_t k = 1; k < num_shards; ++k) max = own[k * stride] > max ? own[k * stride] : max;
  Real sum = 0, weighted = 0, target = 0;
  for (int64_t k = 0; k < num_shards; ++k) {
    const Real* shard = own + k * stride;
    Real shard_sum = shard[1], shard_weighted = shard[2];
    // A shard of padding only has max = -inf and sum = 0: its distance must not meet 0 * inf.
    const Real shift = shard_sum == 0 ? Real(0) : shard[0] - max;
    move_reference(shard_sum, shard_weighted, shift, exp_of(shift));
    sum += shard_sum;
    weighted += shard_weighted;
    target += shard[3];
  }
  const Real log_sum = log_of(sum);
  results[0][token] = (target - max) - log_sum;
  results[1][token] = log_sum - weighted / sum;
  results[2][token] = max;
  results[3][token] = log_sum;
}

// With d = z - max, a logit's gradient is exp(d) (factor + slope d), and at_target more at the target.
template <class Real>
struct RowGradient {
  Real factor, slope, at_target;
};

template <class Real>
R1_HOST_DEVICE RowGradient<Real> row_gradient(Real grad_logprob, Real grad_entropy, Real entropy, Real log_sum,
                                              Real temperature) {
  const Real g = grad_logprob / temperature, h = grad_entropy / temperature;
  const Real inverse_sum = exp_of(-log_sum);
  RowGradient<Real> row{-g * inverse_sum, -h * inverse_sum, g};
  // Without a gradient of the entropy, nobody computed the entropy either.
  if (h != 0) row.factor += row.slope * (entropy - log_sum);
  return row;
}

}  // namespace r1
