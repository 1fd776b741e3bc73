// Products of a few rows with a weight that is read once and not packed. For cpu.cpp files only (dot_tile.h).
#pragma once

#include <type_traits>

#include "common/dot_tile.h"

namespace r1::R1_CPU_NAMESPACE {

// At most a vector of them.
template <class Real, class T>
static inline void store_numbers(const Real* from, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, Real>)
    __builtin_memcpy(to, from, count * sizeof(T));
  else
    store_first(to, count, load_first(from, count, 0));
}

// The dot products of kLeft left rows with as many right ones as make a vector, of which `rights` are stored.
template <int kLeft, class T, class Out>
static void multiply_tile(const T* const* left, const T* const* right, int64_t depth, int64_t rights, Out* const* out) {
  constexpr int kRight = Arithmetic<T>::kLanes / kLeft;
  const auto dots = dot_tile<kLeft>(left, right, depth);
  Out numbers[kLeft * kRight];
  store(numbers, dots);
  if (rights >= kRight) {  // a width that the compiler knows
    for (int l = 0; l < kLeft; ++l) __builtin_memcpy(out[l], numbers + l * kRight, kRight * sizeof(Out));
  } else {
    for (int l = 0; l < kLeft; ++l) __builtin_memcpy(out[l], numbers + l * kRight, rights * sizeof(Out));
  }
}

template <class T>
static inline void fetch_rows(const T* from, int64_t count) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// out[row][column] = left[row] . weight row `column`. A weight row is in the L1 cache while all rows meet it, and the
// next ones are fetched meanwhile, at the end those of `then`.
template <class T, class Out>
static void multiply_rows(const T* const* left, int64_t rows, const T* weight, int64_t columns, int64_t depth,
                          const T* then, Out* const* out) {
  // As many rows share a register of the weight as there are, at most kMost.
  constexpr int kLanes = Arithmetic<T>::kLanes, kMost = kLanes < 4 ? kLanes : 4;
  for (int64_t column = 0; column < columns; column += kLanes) {
    for (int64_t row = 0, taken; row < rows; row += taken) {
      const int64_t count = rows - row;
      taken = count >= kMost ? kMost : count >= 2 ? 2 : 1;
      const auto tile = taken == 1   ? multiply_tile<1, T, Out>
                        : taken == 2 ? multiply_tile<2, T, Out>
                                     : multiply_tile<kMost, T, Out>;
      const int64_t step = kLanes / taken;
      for (int64_t c = column; c < columns && c < column + kLanes; c += step) {
        const T* right[kLanes];
        Out* to[kMost];
        for (int64_t i = 0; i < step; ++i) right[i] = weight + (c + i < columns ? c + i : columns - 1) * depth;
        for (int64_t i = 0; i < taken; ++i) to[i] = out[row + i] + c;
        if (row == 0) {
          const int64_t soon = c + kLanes;
          fetch_rows(soon < columns ? weight + soon * depth : then + (soon - columns) * depth, step * depth);
        }
        tile(left + row, right, depth, columns - c, to);
      }
    }
  }
}

}  // namespace r1::R1_CPU_NAMESPACE
