// One block of one expert's product on the CPU. All three products are this one, with different strides.
#pragma once

#include <stdint.h>

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

// out(i, j) (+)= sum over d of left(i, d) right(d, j), for i < rows, j < columns, d < depth. Strides count elements;
// of each operand one of the two is 1.
struct GemmBlock {
  const void* left;
  int64_t left_row_stride, left_depth_stride;
  const void* right;
  int64_t right_column_stride, right_depth_stride;
  void* out;
  int64_t out_row_stride;
  int64_t rows, columns, depth;
  bool accumulate;
};

// The largest block: what it packs is small against its arithmetic, and its scratch (0.6 MB in float32) fits into L2.
inline constexpr int64_t kGemmBlockRows = 336;  // a multiple of every micro kernel's rows
inline constexpr int64_t kGemmBlockColumns = 256;
// Of 64-byte aligned memory, for one block at a time; its contents mean nothing before and after.
inline constexpr int64_t kGemmScratchBytes = 7 << 18;

// The result is of the operands' type, or float32.
R1_DECLARE_CPU(void gemm_block(const GemmBlock& block, Element operands, Element result, void* scratch))

}  // namespace r1
