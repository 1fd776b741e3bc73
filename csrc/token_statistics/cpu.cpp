#include "token_statistics/cpu.h"

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {

// Columns that are read for their maximum first and for the sums then: small enough to be still in the L1 cache.
constexpr int64_t kBlock = 2048;

template <class Real>
struct Sums {
  Real max, sum, weighted;  // of d = (logit - max) / temperature: sum of exp(d), sum of exp(d) d
};

template <class Element>
static inline typename Arithmetic<Element>::Real block_max(const Element* logits, int64_t count) {
  using Vector = typename Arithmetic<Element>::Vector;
  constexpr int kLanes = Arithmetic<Element>::kLanes;
  constexpr auto kLowest = -__builtin_inff();
  Vector max0 = Vector{} + kLowest, max1 = max0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vector x0 = load(logits + i), x1 = load(logits + i + kLanes);
    max0 = x0 > max0 ? x0 : max0;
    max1 = x1 > max1 ? x1 : max1;
  }
  for (; i < count; i += kLanes) {
    const Vector x = i + kLanes <= count ? load(logits + i) : load_first(logits + i, count - i, kLowest);
    max0 = x > max0 ? x : max0;
  }
  return max_of_lanes(max0 > max1 ? max0 : max1);
}

// A lane's columns depend on their index alone, and sums are taken within blocks first: the same bits wherever the row
// lies, and rounding errors that do not grow with the vocabulary.
template <bool kWeighted, class Element>
static inline Sums<typename Arithmetic<Element>::Real> row_sums(const Element* logits, int64_t count,
                                                                double temperature) {
  using Real = typename Arithmetic<Element>::Real;
  using Vector = typename Arithmetic<Element>::Vector;
  constexpr int kLanes = Arithmetic<Element>::kLanes;
  constexpr Real kInfinity = __builtin_inf();
  const Real scale = 1 / temperature;
  // Finite from the start, so that -inf has a distance to it.
  Real max = sizeof(Real) == sizeof(float) ? -__FLT_MAX__ : -__DBL_MAX__;
  Vector sum = {}, weighted = {};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const Element* block = logits + begin;
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    if (const Real highest = block_max(block, size); highest > max) {
      const Vector shift = at_least_floor(Vector{} + (max - highest) * scale);
      const Vector shrink = exp(shift);
      weighted = shrink * (weighted + sum * shift);
      sum = shrink * sum;
      max = highest;
    }
    Vector block_sum = {}, block_weighted = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vector x = i + kLanes <= size ? load(block + i) : load_first(block + i, size - i, -kInfinity);
      const Vector d = at_least_floor((x - max) * scale);
      const Vector e = exp(d);
      block_sum += e;
      if (kWeighted) block_weighted += e * d;
    }
    sum += block_sum;
    weighted += block_weighted;
  }
  const Real total = sum_of_lanes(sum);
  // Nothing but -inf, or no column at all.
  if (total == 0) return {-kInfinity, 0, 0};
  return {max, total, kWeighted ? sum_of_lanes(weighted) : Real(0)};
}

template <class Element>
static void statistics_of_rows(const LogitShard& shard, bool need_entropy, void* stats, int64_t begin, int64_t end) {
  using Real = typename Arithmetic<Element>::Real;
  const Real temperature = shard.temperature;
  for (int64_t token = begin; token < end; ++token) {
    const Element* row = static_cast<const Element*>(shard.logits) + token * shard.vocab;
    const auto sums = need_entropy ? row_sums<true>(row, shard.num_real, shard.temperature)
                                   : row_sums<false>(row, shard.num_real, shard.temperature);
    const int64_t column = owned_column(shard, token);
    Real* out = static_cast<Real*>(stats) + 4 * token;
    out[0] = sums.max / temperature;
    out[1] = sums.sum;
    out[2] = sums.weighted;
    out[3] = column < 0 ? Real(0) : load_first(row + column, 1, 0)[0] / temperature;
  }
}

template <class Element>
static void gradient_of_rows(const LogitShard& shard, const TokenGradients& gradients, int64_t begin, int64_t end) {
  using Real = typename Arithmetic<Element>::Real;
  using Vector = typename Arithmetic<Element>::Vector;
  constexpr int kLanes = Arithmetic<Element>::kLanes;
  const auto at = [](const void* values, int64_t token) {
    return values == nullptr ? Real(0) : static_cast<const Real*>(values)[token];
  };
  const Real scale = 1 / shard.temperature;
  for (int64_t token = begin; token < end; ++token) {
    Element* row = static_cast<Element*>(shard.logits) + token * shard.vocab;
    const Real g = at(gradients.logprobs, token), h = at(gradients.entropy_gradients, token);
    // Tokens outside the loss: whatever their logits are.
    const int64_t count = g == 0 && h == 0 ? 0 : shard.num_real;
    const auto factors = row_gradient(g, h, at(gradients.entropy, token), at(gradients.log_sum, token),
                                      static_cast<Real>(shard.temperature));
    const Real max = at(gradients.max, token);
    const auto gradient = [&](Vector x) {
      const Vector d = at_least_floor(x * scale - max);
      return exp(d) * (d * factors.slope + factors.factor);
    };
    const int64_t column = count == 0 ? -1 : owned_column(shard, token);
    const Vector target = column < 0 ? Vector{} : gradient(load_first(row + column, 1, 0));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(row + i, gradient(load(row + i)));
    if (i < count) store_first(row + i, count - i, gradient(load_first(row + i, count - i, 0)));
    if (column >= 0) store_first(row + column, 1, target + factors.at_target);
    __builtin_memset(row + count, 0, (shard.vocab - count) * sizeof(Element));
  }
}

void shard_statistics(Logits dtype, const LogitShard& shard, bool need_entropy, void* stats, int64_t begin,
                      int64_t end) {
  if (dtype == Logits::float32) statistics_of_rows<float>(shard, need_entropy, stats, begin, end);
  if (dtype == Logits::bfloat16) statistics_of_rows<Bfloat16>(shard, need_entropy, stats, begin, end);
  if (dtype == Logits::float64) statistics_of_rows<double>(shard, need_entropy, stats, begin, end);
}

void shard_gradient(Logits dtype, const LogitShard& shard, const TokenGradients& gradients, int64_t begin,
                    int64_t end) {
  if (dtype == Logits::float32) gradient_of_rows<float>(shard, gradients, begin, end);
  if (dtype == Logits::bfloat16) gradient_of_rows<Bfloat16>(shard, gradients, begin, end);
  if (dtype == Logits::float64) gradient_of_rows<double>(shard, gradients, begin, end);
}

template <class Real>
static void combine_tokens(const void* stats, int64_t num_shards, int64_t num_tokens, void* const results[4],
                           int64_t begin, int64_t end) {
  Real* out[4];
  for (int i = 0; i < 4; ++i) out[i] = static_cast<Real*>(results[i]);
  for (int64_t token = begin; token < end; ++token)
    combine_token(static_cast<const Real*>(stats), num_shards, num_tokens, token, out);
}

void combine_statistics(bool is_double, const void* stats, int64_t num_shards, int64_t num_tokens,
                        void* const results[4], int64_t begin, int64_t end) {
  if (is_double) combine_tokens<double>(stats, num_shards, num_tokens, results, begin, end);
  if (!is_double) combine_tokens<float>(stats, num_shards, num_tokens, results, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
