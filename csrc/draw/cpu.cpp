// Gumbel noise is hashed from the row's key and the vocabulary id, bit for bit as in r1_megatron/rollout/sampler.py:
// whoever holds a column computes the same noise. From there on it is float32, whatever the logits' type.
#include "draw/cpu.h"

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

constexpr int kLanes = Arithmetic<float>::kLanes;
constexpr float kInfinity = __builtin_inff();

template <class T>
inline Floats load_floats(const T* from, int64_t count) {
  if constexpr (sizeof(T) == sizeof(double)) {
    Floats x = {};
    for (int64_t i = 0; i < (count < kLanes ? count : kLanes); ++i) x[i] = static_cast<float>(from[i]);
    return x;
  } else {
    return count < kLanes ? load_first(from, count, 0) : load(from);
  }
}

// ln x of a normal number, to two units in the last place.
inline Floats log(Floats x) {
  // x = 2^n m with m from sqrt(1/2) to sqrt(2), and ln m = 2 artanh(s), s = (m - 1) / (m + 1): |s| < 0.172, so that
  // five terms of the series leave an error of 2e-9.
  constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  const Ints n = (Ints)((Words)x - kRootOfHalf) >> 23;
  const Floats f = (Floats)((Words)x - ((Words)n << 23)) - 1;
  const Floats s = f / (f + 2), square = s * s;
  Floats series = Floats{} + 2.0f / 9;
  series = series * square + 2.0f / 7;
  series = series * square + 2.0f / 5;
  series = series * square + 2.0f / 3;
  const Floats whole = __builtin_convertvector(n, Floats);
  // 2 s = f - s f, which keeps the last digits of f. ln 2 in two parts, the first so short that its product is exact.
  return whole * 0.693359375f + ((f - s * (f - square * series)) - whole * 2.12194440e-4f);
}

inline Words mix(Words x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline Floats gumbel(Words ids, uint32_t low, uint32_t high) {
  const Words bits = mix(mix((ids * 0x9E3779B1u) ^ low) + high);
  Floats uniform = (__builtin_convertvector(bits, Floats) + 0.5f) * 0x1p-32f;
  uniform = uniform > 1 - 0x1p-24f ? Floats{} + (1 - 0x1p-24f) : uniform;
  // ln(1 - u) from the rounded 1 - u, and what rounding took from it.
  const Floats rest = 1 - uniform;
  const Floats exponential = (uniform - (1 - rest)) / rest - log(rest);
  return -log(exponential);
}

template <class T>
void draw_row(const Draw& draw, int64_t row) {
  const T* logits = static_cast<const T*>(draw.logits) + row * draw.columns;
  const bool greedy = draw.temperature == 0, divides = !greedy && draw.temperature != 1;
  const auto load_scaled = [&](int64_t column) __attribute__((always_inline)) {
    const Floats z = load_floats(logits + column, draw.num_real - column);
    return divides ? z / draw.temperature : z;
  };
  Words lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto low = static_cast<uint32_t>(draw.keys[row]), high = static_cast<uint32_t>(draw.keys[row] >> 32);

  Floats max = Floats{} - kInfinity, best = max;
  Ints winner = {};  // a column; of equal ones each lane keeps its first
  for (int64_t column = 0; column < draw.num_real; column += kLanes) {
    const Words columns = lane + static_cast<uint32_t>(column);
    const auto inside = columns < static_cast<uint32_t>(draw.num_real);
    const Floats z = inside ? load_scaled(column) : Floats{} - kInfinity;
    const Floats score = greedy ? z : z + gumbel(columns + static_cast<uint32_t>(draw.vocab_start), low, high);
    max = z > max ? z : max;
    winner = score > best ? (Ints)columns : winner;
    best = score > best ? score : best;
  }
  const float largest = max_of_lanes(max), best_score = max_of_lanes(best);
  int64_t first = draw.num_real;
  for (int i = 0; i < kLanes; ++i)
    if (best[i] == best_score && winner[i] < first) first = winner[i];
  if (best_score == -kInfinity) first = 0;

  // Finite, so that -inf has a distance to it.
  const float shift = largest == -kInfinity ? -__FLT_MAX__ : largest;
  Floats sum = {};
  for (int64_t column = 0; column < draw.num_real; column += kLanes) {
    const Words columns = lane + static_cast<uint32_t>(column);
    const auto inside = columns < static_cast<uint32_t>(draw.num_real);
    sum += exp(at_least_floor(inside ? load_scaled(column) - shift : Floats{} - kInfinity));
  }
  double* out = draw.out + row * 5;
  out[0] = best_score;
  out[1] = static_cast<double>(draw.vocab_start + first);
  out[2] = draw.num_real > 0 ? load_scaled(first)[0] : -kInfinity;
  out[3] = largest;
  out[4] = sum_of_lanes(sum);
}

template <class T>
void draw_all(const Draw& draw, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) draw_row<T>(draw, row);
}

}  // namespace

void draw_rows(const Draw& draw, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) draw_all<float>(draw, begin, end);
  if (element == Element::bfloat16) draw_all<Bfloat16>(draw, begin, end);
  if (element == Element::float64) draw_all<double>(draw, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
