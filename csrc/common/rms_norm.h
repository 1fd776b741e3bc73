// RMSNorm of one row. For cpu.cpp files only (vector_math.h).
#pragma once

#include <stdint.h>

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {

// to = x / sqrt(mean of x^2 + eps) * weight, in float32 (float64 for float64); `to` may be x.
template <class T>
static inline void rms_norm_row(const T* x, const T* weight, double eps, int64_t width, T* to) {
  using Real = typename Arithmetic<T>::Real;
  using Vector = typename Arithmetic<T>::Vector;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t whole = width / kLanes * kLanes;
  Vector squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vector value = load(x + i);
    squares += value * value;
  }
  if (whole < width) {
    const Vector value = load_first(x + whole, width - whole, 0);
    squares += value * value;
  }
  const Real mean = sum_of_lanes(squares) / Real(width) + Real(eps);
  const Real scale = 1 / (sizeof(Real) == sizeof(float) ? __builtin_sqrtf(mean) : __builtin_sqrt(mean));
  for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(x + i) * scale * load(weight + i));
  if (whole < width) {
    const int64_t count = width - whole;
    store_first(to + whole, count, load_first(x + whole, count, 0) * scale * load_first(weight + whole, count, 0));
  }
}

}  // namespace r1::R1_CPU_NAMESPACE
