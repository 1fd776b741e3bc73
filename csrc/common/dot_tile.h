// Dot products of a few left rows with a few right rows, both contiguous along the sum: as many as a vector has lanes.
//
// For cpu.cpp files only. Neither operand is packed, so this is for products of few rows, where reading the right one
// is most of the work. Determinism: a dot product runs over the lanes of its vectors in the order of the rows' memory
// and then over a tree of them, whatever tile it is in.
#pragma once

#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {

// Lanes whose number has the bit kDistance from b, the others from a; as they stand, or from the place at that
// distance.
template <int kDistance, bool kAcross, class V, int... lane>
static inline V choose(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int kCount = sizeof...(lane);
  constexpr auto source = [](int l) { return (l & kDistance ? kCount : 0) + (kAcross ? l ^ kDistance : l); };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(lane)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Indices{source(lane)...});
#endif
}

// Lane i of the result is the sum of all lanes of sums[i]: neighbours at a distance of half a vector first.
template <int kDistance, class V>
static inline V sums_of_lanes(V* sums) {
  if constexpr (kDistance == 0) {
    return sums[0];
  } else {
    constexpr auto kAll = std::make_integer_sequence<int, sizeof(V) / sizeof(sums[0][0])>{};
#pragma GCC unroll 8
    for (int i = 0; i < kDistance; ++i) {
      const V a = sums[i], b = sums[i + kDistance];
      sums[i] = choose<kDistance, false>(a, b, kAll) + choose<kDistance, true>(a, b, kAll);
    }
    return sums_of_lanes<kDistance / 2>(sums);
  }
}

// Lane l * kRight + r of the result is left[l] . right[r], where kLeft * kRight is the number of lanes.
template <int kLeft, class L, class R>
static inline auto dot_tile(const L* const* left, const R* const* right, int64_t width) {
  using Vector = typename Arithmetic<R>::Vector;
  constexpr int kLanes = Arithmetic<R>::kLanes, kRight = kLanes / kLeft;
  Vector sums[kLanes] = {};
  const auto add = [&](auto load_left, auto load_right, auto multiply) __attribute__((always_inline)) {
    decltype(load_left(left[0])) l[kLeft];
#pragma GCC unroll 4
    for (int i = 0; i < kLeft; ++i) l[i] = load_left(left[i]);
#pragma GCC unroll 16
    for (int j = 0; j < kRight; ++j) {
      const auto r = load_right(right[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kLeft; ++i) sums[i * kRight + j] = multiply(l[i], r, sums[i * kRight + j]);
    }
  };
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<L, Bfloat16> && std::is_same_v<R, Bfloat16>) {
    // Both products of a pair are added. The instruction takes denormal numbers for zero, and makes none.
    const auto multiply = [](__m512i a, __m512i b, Floats c) {
      return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    };
    for (int64_t k = 0; k < width; k += 2 * kLanes) {
      const int64_t count = width - k;
      const auto load_pairs = [=](const Bfloat16* from) {
        return count < 2 * kLanes ? _mm512_maskz_loadu_epi16((1u << count) - 1, from + k)
                                  : _mm512_loadu_si512(from + k);
      };
      add(load_pairs, load_pairs, multiply);
    }
    return sums_of_lanes<kLanes / 2>(sums);
  }
#endif
  const auto multiply = [](Vector a, Vector b, Vector c) { return a * b + c; };
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    const auto load_whole = [=](const auto* from) { return load(from + k); };
    add(load_whole, load_whole, multiply);
  }
  if (whole < width) {
    const auto load_rest = [=](const auto* from) { return load_first(from + whole, width - whole, 0); };
    add(load_rest, load_rest, multiply);
  }
  return sums_of_lanes<kLanes / 2>(sums);
}

// to[l] gets the dot products of left[l].
template <int kLeft, class Vector, class Real>
static inline void store_tile(Vector tile, Real* const* to) {
  constexpr int kRight = sizeof(Vector) / sizeof(Real) / kLeft;
#pragma GCC unroll 4
  for (int i = 0; i < kLeft; ++i)
    __builtin_memcpy(to[i], reinterpret_cast<const Real*>(&tile) + i * kRight, kRight * sizeof(Real));
}

}  // namespace r1::R1_CPU_NAMESPACE
