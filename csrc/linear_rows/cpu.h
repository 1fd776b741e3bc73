#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

struct LinearRows {
  const void *x, *weight;  // [rows, depth] with x_stride between rows; [columns, depth]
  void* out;               // [rows, columns]
  int64_t rows, columns, depth, x_stride;
};

// Rows that meet a weight row while it is in the L1 cache.
inline constexpr int64_t kLinearRows = 64;

// The columns [begin, end) of the result.
R1_DECLARE_CPU(void linear_columns(const LinearRows& linear, Element element, int64_t begin, int64_t end))

}  // namespace r1
