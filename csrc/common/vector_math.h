// Vectors as wide as the registers that a cpu.cpp is compiled for, and their exponential.
//
// For cpu.cpp files only. Everything is in the namespace of the capability (cpu.h), so that no two builds share a
// function, and written with the compiler's vector types: one text for SSE, AVX2, AVX-512 and others.
#pragma once

#include <stdint.h>

#include "common/cpu.h"

#if defined(__GNUC__) && !defined(__clang__)
// Vectors wider than the baseline's registers are passed to inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace r1::R1_CPU_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

struct Bfloat16 {
  uint16_t bits;
};
// In one lane; a vector of them is of Words.
struct Bfloat16Pair {
  uint32_t bits;  // the first of the two is the lower half
};

// What an element type computes in: `Real`, `Vector` of it, and how many elements that holds.
template <class Element>
struct Arithmetic {
  using Real = float;
  using Vector = Floats;
  static constexpr int kLanes = sizeof(Floats) / sizeof(float);
};
template <>
struct Arithmetic<double> {
  using Real = double;
  using Vector = Doubles;
  static constexpr int kLanes = sizeof(Doubles) / sizeof(double);
};

// Loads and stores of a whole vector; no alignment needed.
static inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
static inline Doubles load(const double* from) {
  Doubles x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
static inline Floats load(const Bfloat16* from) {
  HalfWords bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}
static inline Words load(const Bfloat16Pair* from) {
  Words x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
static inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }
static inline void store(double* to, Doubles x) { __builtin_memcpy(to, &x, sizeof x); }
static inline void store(Bfloat16Pair* to, Words x) { __builtin_memcpy(to, &x, sizeof x); }
static inline void store(Bfloat16* to, Floats x) {
  const Words bits = (Words)x;
  const Words nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfWords halves = __builtin_convertvector(x == x ? nearest_even : (bits >> 16) | 0x40, HalfWords);
  __builtin_memcpy(to, &halves, sizeof halves);
}

// The first `count` elements in their usual lanes, the others equal to `fill`.
template <class Element>
static inline auto load_first(const Element* from, int64_t count, typename Arithmetic<Element>::Real fill) {
  Element elements[Arithmetic<Element>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) elements[i] = from[i];
  auto x = load(elements);
  for (int64_t i = count; i < Arithmetic<Element>::kLanes; ++i) x[i] = fill;
  return x;
}
template <class Element>
static inline void store_first(Element* to, int64_t count, typename Arithmetic<Element>::Vector x) {
  Element elements[Arithmetic<Element>::kLanes];
  store(elements, x);
  for (int64_t i = 0; i < count; ++i) to[i] = elements[i];
}

// Over the lanes, as a tree. The maximum passes over NaN.
template <class Vector>
static inline auto sum_of_lanes(Vector x) {
  constexpr int kLanes = sizeof(x) / sizeof(x[0]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
template <class Vector>
static inline auto max_of_lanes(Vector x) {
  constexpr int kLanes = sizeof(x) / sizeof(x[0]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

// Where exp() ends: at the floor it is zero, and a -inf that was raised to it can be multiplied by its exponential.
constexpr float kFloatFloor = -88.03f;  // just below -127 ln 2
constexpr double kDoubleFloor = -750;
static inline Floats at_least_floor(Floats x) { return kFloatFloor > x ? Floats{} + kFloatFloor : x; }
static inline Doubles at_least_floor(Doubles x) { return kDoubleFloor > x ? Doubles{} + kDoubleFloor : x; }

// e^x for x from the floor to 88, to two units in the last place where the result is a normal number. NaN stays NaN.
static inline Floats exp(Floats x) {
  // e^x = 2^n e^r with n the integer nearest to x / ln 2. Adding 1.5 * 2^23 rounds to integers; 127 more puts the
  // exponent field of 2^n into the sum's last eight bits. It is zero at the floor, and so is 2^n then.
  constexpr float kRounder = 0x1.8p23f + 127;
  const Floats shifted = x * 1.44269504f + kRounder;
  const Floats n = shifted - kRounder;
  const Floats power = (Floats)((Words)shifted << 23);
  // ln 2 in two parts, the first so short that its product with n is exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // 1 + r + r^2 q(r): least maximal relative error (3e-9) on |r| <= ln 2 / 2, found by the Remez exchange.
  Floats q = Floats{} + 0x1.6a2434p-10f;
  q = q * r + 0x1.1239e2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return (q * (r * r) + r + 1) * power;
}
static inline Doubles exp(Doubles x) {
  for (int i = 0; i < Arithmetic<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace r1::R1_CPU_NAMESPACE
