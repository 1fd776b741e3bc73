// The CUDA half of the grouped GEMM, without torch: raw pointers and a stream.
#pragma once

#include <cstdint>

namespace r1::grouped_gemm {

enum class Product { forward, dgrad, wgrad };

// left and right are x and weight (forward), dy and weight (dgrad), dy and x (wgrad); all contiguous, shapes as in
// r1_megatron/kernels/ops.py. Both operands are bfloat16, or both float32; out has their dtype, for wgrad float32 too.
struct Problem {
  Product product;
  int64_t rows, experts, n, k;
  const void* left;
  const void* right;
  const void* offsets;
  void* out;
  bool bfloat16_operands, bfloat16_out, wide_offsets, accumulate;
};

// The most experts that a call may have: their row and tile counts lie in shared memory.
constexpr int64_t kMaxExperts = 2048;

// Whether the Hopper kernel can run the problem on a device of compute capability 9.0. Depends on dtype, K, N and the
// alignment of the pointers, not on M or the offsets (but for M = 0): every row of a weight meets the same kernel.
bool fits_hopper(const Problem& problem);

}  // namespace r1::grouped_gemm

// Launches on `stream` of the current device and returns a cudaError_t. Never waits for the device.
extern "C" int r1_grouped_gemm(const r1::grouped_gemm::Problem* problem, void* stream);
// The two kernels that it chooses from.
extern "C" int r1_grouped_gemm_hopper(const r1::grouped_gemm::Problem* problem, void* stream);
extern "C" int r1_grouped_gemm_portable(const r1::grouped_gemm::Problem* problem, void* stream);
