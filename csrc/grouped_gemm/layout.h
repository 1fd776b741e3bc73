// The Hopper kernel's shared memory as arithmetic, free of CUDA: the kernel takes every constant from here, and
// tests/kernels/test_device_model.py runs it on the host against a model of the hardware's rules.
//
// Rules (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Tensor swizzling modes"):
// - TMA with 128-byte swizzle writes row r of a box of 128-byte rows at r * 128; the 16-byte chunk c of that row goes
//   to chunk c ^ (r % 8). The box starts at a multiple of 1024.
// - wgmma reads 8 x 128 byte atoms of the same pattern. K-major operand: an atom is 8 rows of M or N by 64 of K; the
//   stride offset leads to the next 8 rows, the leading offset is not used. MN-major: an atom is 64 of M or N by 8 of
//   K; the stride offset leads to the next 8 of K, the leading offset to the next 64 of M or N.
// - The swizzle is a function of the address bits, so a descriptor may start inside an atom.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "grouped_gemm/cuda.h"

namespace r1::grouped_gemm {

// A tile of the output is 128 x 256: each of two consumer warpgroups has 64 of its rows. A step of the reduction is 64.
constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kWarpgroupM = 64;
constexpr int kMmaK = 16;
constexpr int kStages = 4;

// Every operand is a row of boxes: 64 of its M or N by 64 of K, 8 KiB, one TMA load each.
constexpr int kBox = 64;
constexpr int kRowBytes = kBox * 2;
constexpr int kBoxBytes = kBox * kRowBytes;
constexpr int kAtomRows = 8;
constexpr int kBoxesOfA = kTileM / kBox, kBoxesOfB = kTileN / kBox;
constexpr int kBytesOfA = kBoxesOfA * kBoxBytes, kBytesOfB = kBoxesOfB * kBoxBytes;
constexpr int kStageBytes = kBytesOfA + kBytesOfB;

// Whether the operand's memory runs along the reduction: x, dy and weight do in forward, dy in dgrad.
R1_HOST_DEVICE constexpr bool a_is_k_major(Product product) { return product != Product::wgrad; }
R1_HOST_DEVICE constexpr bool b_is_k_major(Product product) { return product == Product::forward; }

// Where the chunk of 16 bytes with number `chunk` of row `row` lies in a swizzled block of 128-byte rows.
R1_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (row % kAtomRows)) << 4);
}

// The descriptor of an operand whose boxes start at `address`, for the 16 reduction indices from `k` on.
R1_HOST_DEVICE constexpr uint64_t mma_descriptor(bool k_major, uint32_t address, int k) {
  const uint32_t start = address + (k_major ? k * 2 : k * kRowBytes);
  const uint64_t leading = k_major ? 16 : kBoxBytes;
  const uint64_t stride = kAtomRows * kRowBytes;
  const uint64_t swizzle_128_bytes = 1;
  return ((start & 0x3FFFFu) >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle_128_bytes << 62;
}

// Accumulator i of a thread of a 64 x 256 product: its row and column.
R1_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + (i % 4 / 2) * 8;
}
R1_HOST_DEVICE constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The way of a result to memory: each warp's 16 x 64 block goes through 2 KiB of shared memory, swizzled. stmatrix
// stores four 8 x 8 matrices a time, `pair` of 16 columns; lane `lane` names the place of one 16-byte row.
constexpr int kStagingColumns = 64;
constexpr int kStagingBytes = 16 * kRowBytes;
R1_HOST_DEVICE constexpr uint32_t staging_store(int lane, int pair) {
  return swizzled(lane % 16, pair * 2 + lane / 16);
}
// Read back in whole rows: in step `step` (of 4), a lane takes 8 columns of a row.
R1_HOST_DEVICE constexpr int staging_row(int lane, int step) { return step * 4 + lane / 8; }
R1_HOST_DEVICE constexpr int staging_chunk(int lane) { return lane % 8; }

// Shared memory from its start, which the kernel checks to be a multiple of 1024.
constexpr int kConsumerWarps = 8;
constexpr int kStagingOffset = kStages * kStageBytes;
constexpr int kBarrierOffset = kStagingOffset + kConsumerWarps * kStagingBytes;
constexpr int kTableOffset = kBarrierOffset + 2 * kStages * 8;
constexpr int kMaxSharedBytes = 232448;
static_assert(kTableOffset + (kMaxExperts + 2) * 8 <= kMaxSharedBytes, "the table of groups must fit");

}  // namespace r1::grouped_gemm
