// Grouped GEMM for everything that the Hopper kernel does not take: other GPUs, float32, sizes that are no multiple of
// eight, unaligned pointers. One tiled loop for the three products and both dtypes: bfloat16 tiles are multiplied by
// the tensor cores (mma.sync, compute capability 8.0), float32 tiles by fused multiply-adds in full precision.
//
// Bits: an element is one chain in the order of the reduction index, whatever the tile and the neighbours. What lies
// outside of the expert's rows, of K or of N is never read: it enters the tiles as zero.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "grouped_gemm/cuda.h"
#include "grouped_gemm/device.h"
#include "grouped_gemm/matrix.cuh"
#include "grouped_gemm/scheduler.h"

namespace r1::grouped_gemm {
namespace {

using bfloat16 = __nv_bfloat16;

constexpr int kTile = 128;  // a tile of the output is 128 x 128
constexpr int kWave = 12;   // of the about 132 tiles under way, in rows
constexpr int kThreads = 256;

struct Arguments {
  const void *left, *right, *offsets;
  void* out;
  int experts, rows, n, k;
  int groups, tile_columns;
  bool wide_offsets, float_out, accumulate;
  bool whole_chunks;  // 16-byte loads are aligned everywhere
};

// One operand of one tile: `lines` of memory, each `length` elements, `pitch` apart. Lines run along the reduction
// (K-major) or along M or N; `origin` is where the tile begins.
template <class T>
struct Source {
  const T* origin;
  int pitch, lines, length;
};

// Sixteen bytes of a line, zero where it ends.
template <class T>
__device__ __forceinline__ uint4 load_chunk(const Source<T>& source, int line, int at, bool whole_chunks) {
  constexpr int kCount = 16 / sizeof(T);
  uint4 chunk = {0, 0, 0, 0};
  if (line >= source.lines || at >= source.length) return chunk;
  const T* from = source.origin + static_cast<int64_t>(line) * source.pitch + at;
  if (whole_chunks && at + kCount <= source.length) return *reinterpret_cast<const uint4*>(from);
  T elements[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements[i] = at + i < source.length ? from[i] : T(0.f);
  memcpy(&chunk, elements, sizeof(chunk));
  return chunk;
}

// The loop's dtype: how a tile lies in shared memory and what a step does with it. Both operands have 128 lines of
// kStep (K-major) or kStep lines of 128.
template <class T, bool kAIsKMajor, bool kBIsKMajor>
struct Multiply;

// Lines are padded by one chunk, so that eight of them start in different banks.
constexpr int pitch_of(int length, int chunk) { return length + chunk; }

template <bool kAIsKMajor, bool kBIsKMajor>
struct Multiply<bfloat16, kAIsKMajor, kBIsKMajor> {
  static constexpr int kStep = 32;
  static constexpr int kPitchA = pitch_of(kAIsKMajor ? kStep : kTile, 8);
  static constexpr int kPitchB = pitch_of(kBIsKMajor ? kStep : kTile, 8);

  // Eight warps, 2 x 4: each has 64 x 32 of the tile, in products of 16 x 8.
  float sums[4][4][4] = {};

  __device__ __forceinline__ void step(const bfloat16* a, const bfloat16* b) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / 4 * 64, column = warp % 4 * 32;
    // Which row of which 8 x 8 matrix this lane names: matrices run down first, then right (A: m, k; B: k, n).
    const int low = lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;
    const int inner = lane % 8, down = lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t right[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = column + j * 16;
        if (kBIsKMajor)
          load_matrices(right[j], shared_address(b + (n + high + inner) * kPitchB + k + down));
        else
          load_matrices_transposed(right[j], shared_address(b + (k + low) * kPitchB + n + high));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = row + i * 16;
        uint32_t left[4];
        if (kAIsKMajor)
          load_matrices(left, shared_address(a + (m + low) * kPitchA + k + high));
        else
          load_matrices_transposed(left, shared_address(a + (k + high + inner) * kPitchA + m + down));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_16x8x16(sums[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  template <class Store>
  __device__ __forceinline__ void for_each(Store store) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / 4 * 64 + lane / 4, column = warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int at = 0; at < 4; ++at) store(row + i * 16 + at / 2 * 8, column + j * 8 + at % 2, sums[i][j][at]);
  }
};

template <bool kAIsKMajor, bool kBIsKMajor>
struct Multiply<float, kAIsKMajor, kBIsKMajor> {
  static constexpr int kStep = 16;
  static constexpr int kPitchA = pitch_of(kAIsKMajor ? kStep : kTile, 4);
  static constexpr int kPitchB = pitch_of(kBIsKMajor ? kStep : kTile, 4);

  // 16 x 16 threads, each with rows y + 16 i and columns x + 16 j.
  float sums[8][8] = {};

  __device__ __forceinline__ void step(const float* a, const float* b) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 4
    for (int k = 0; k < kStep; ++k) {
      float left[8], right[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        left[i] = kAIsKMajor ? a[(y + 16 * i) * kPitchA + k] : a[k * kPitchA + y + 16 * i];
        right[i] = kBIsKMajor ? b[(x + 16 * i) * kPitchB + k] : b[k * kPitchB + x + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
  }

  template <class Store>
  __device__ __forceinline__ void for_each(Store store) const {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) store(y + 16 * i, x + 16 * j, sums[i][j]);
  }
};

// Moves one operand's tile: from memory to registers while the previous step is multiplied, then to shared memory.
template <class T, bool kKMajor, int kStep, int kPitch>
struct Carrier {
  static constexpr int kCount = 16 / sizeof(T);
  static constexpr int kLines = kKMajor ? kTile : kStep, kLength = kKMajor ? kStep : kTile;
  static constexpr int kChunks = kTile * kStep / kCount / kThreads;
  static constexpr int kElements = kLines * kPitch;

  uint4 chunks[kChunks];

  __device__ __forceinline__ void load(const Source<T>& source, int k, bool whole_chunks) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      const int line = chunk / (kLength / kCount), at = chunk % (kLength / kCount) * kCount;
      chunks[i] = load_chunk(source, kKMajor ? line : k + line, kKMajor ? k + at : at, whole_chunks);
    }
  }

  __device__ __forceinline__ void store(T* tile) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      const int line = chunk / (kLength / kCount), at = chunk % (kLength / kCount) * kCount;
      *reinterpret_cast<uint4*>(tile + line * kPitch + at) = chunks[i];
    }
  }
};

template <class T>
__device__ __forceinline__ void put(T* at, float value, bool accumulate) {
  *at = T(accumulate ? static_cast<float>(*at) + value : value);
}

template <class T, Product kProduct>
struct Kernel {
  // forward: x [m, k] and weight [n, k]; dgrad: dy [m, n] and weight [n, k]; wgrad: dy [rows, n] and x [rows, k].
  static constexpr bool kAIsKMajor = kProduct != Product::wgrad, kBIsKMajor = kProduct == Product::forward;
  using Work = Multiply<T, kAIsKMajor, kBIsKMajor>;
  using CarrierA = Carrier<T, kAIsKMajor, Work::kStep, Work::kPitchA>;
  using CarrierB = Carrier<T, kBIsKMajor, Work::kStep, Work::kPitchB>;
  static constexpr int kStageElements = CarrierA::kElements + CarrierB::kElements;
  static constexpr size_t kTableOffset = 2 * kStageElements * sizeof(T);
};

template <class T, Product kProduct>
__global__ void __launch_bounds__(kThreads, 1) portable_kernel(const __grid_constant__ Arguments p) {
  using K = Kernel<T, kProduct>;
  constexpr int kStep = K::Work::kStep;
  uint8_t* const memory = shared_memory();
  T* const stages = reinterpret_cast<T*>(memory);
  Group* const table = reinterpret_cast<Group*>(memory + K::kTableOffset);
  build_table(table, p.offsets, p.wide_offsets, p.experts, p.rows, p.groups, kTile,
              kProduct == Product::wgrad ? divide_up(p.n, kTile) : 0);

  const T* const left = static_cast<const T*>(p.left);
  const T* const right = static_cast<const T*>(p.right);
  TileWalk walk{table, p.groups, p.tile_columns, kWave};
  Tile tile;
  for (int64_t index = blockIdx.x; find_tile(walk, index, tile); index += gridDim.x) {
    const int begin = table[tile.group].row_end, end = table[tile.group + 1].row_end;
    const int rows = end > begin ? end - begin : 0;
    const int64_t expert = static_cast<int64_t>(tile.group) * p.n * p.k;
    const int m = tile.m * kTile, column = tile.n * kTile;
    Source<T> a, b;
    int reduction;
    if (kProduct == Product::wgrad) {
      a = {left + static_cast<int64_t>(begin) * p.n + m, p.n, rows, p.n - m};
      b = {right + static_cast<int64_t>(begin) * p.k + column, p.k, rows, p.k - column};
      reduction = rows;
    } else if (kProduct == Product::dgrad) {
      a = {left + static_cast<int64_t>(begin + m) * p.n, p.n, rows - m, p.n};
      b = {right + expert + column, p.k, p.n, p.k - column};
      reduction = p.n;
    } else {
      a = {left + static_cast<int64_t>(begin + m) * p.k, p.k, rows - m, p.k};
      b = {right + expert + static_cast<int64_t>(column) * p.k, p.k, p.n - column, p.k};
      reduction = p.k;
    }
    if (tile.group == p.experts) reduction = 0;  // the rows past the end become zero
    if (kProduct == Product::wgrad && p.accumulate && reduction == 0) continue;

    typename K::Work work;
    typename K::CarrierA carrier_a;
    typename K::CarrierB carrier_b;
    const int steps = divide_up(reduction, kStep);
    if (steps > 0) {
      carrier_a.load(a, 0, p.whole_chunks);
      carrier_b.load(b, 0, p.whole_chunks);
    }
    for (int step = 0; step < steps; ++step) {
      T* const tile_a = stages + step % 2 * K::kStageElements;
      T* const tile_b = tile_a + K::CarrierA::kElements;
      carrier_a.store(tile_a);
      carrier_b.store(tile_b);
      // The other stage's readers are past this barrier before anybody writes there again.
      __syncthreads();
      if (step + 1 < steps) {
        carrier_a.load(a, (step + 1) * kStep, p.whole_chunks);
        carrier_b.load(b, (step + 1) * kStep, p.whole_chunks);
      }
      work.step(tile_a, tile_b);
    }
    __syncthreads();

    // The group's part of the output: height x columns from element `out` on.
    const int height = kProduct == Product::wgrad ? p.n : rows;
    const int columns = kProduct == Product::forward ? p.n : p.k;
    const int64_t out = kProduct == Product::wgrad ? expert : static_cast<int64_t>(begin) * columns;
    work.for_each([&](int row, int x, float value) {
      if (m + row >= height || column + x >= columns) return;
      const int64_t at = out + static_cast<int64_t>(m + row) * columns + column + x;
      if (p.float_out)
        put(static_cast<float*>(p.out) + at, value, p.accumulate);
      else
        put(static_cast<bfloat16*>(p.out) + at, value, p.accumulate);
    });
  }
}

template <class T, Product kProduct>
cudaError_t launch(Arguments arguments, int multiprocessors, cudaStream_t stream) {
  const int height = kProduct == Product::wgrad ? arguments.n : arguments.rows;
  const int columns = kProduct == Product::forward ? arguments.n : arguments.k;
  arguments.groups = arguments.experts + (kProduct == Product::wgrad ? 0 : 1);
  arguments.tile_columns = divide_up(columns, kTile);
  // More tile rows than there can be: every group may have one that is not full.
  const int64_t tile_rows = kProduct == Product::wgrad ? int64_t(arguments.groups) * divide_up(height, kTile)
                                                       : int64_t(height) / kTile + arguments.groups;
  const int64_t blocks = std::min<int64_t>(multiprocessors, tile_rows * arguments.tile_columns);
  if (height == 0 || blocks == 0) return cudaSuccess;
  const size_t shared = Kernel<T, kProduct>::kTableOffset + (arguments.groups + 1) * sizeof(Group);
  const auto kernel = portable_kernel<T, kProduct>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <class T>
cudaError_t launch(Product product, const Arguments& arguments, int multiprocessors, cudaStream_t stream) {
  const auto launch_product = product == Product::forward ? launch<T, Product::forward>
                              : product == Product::dgrad ? launch<T, Product::dgrad>
                                                          : launch<T, Product::wgrad>;
  return launch_product(arguments, multiprocessors, stream);
}

}  // namespace
}  // namespace r1::grouped_gemm

extern "C" int r1_grouped_gemm_portable(const r1::grouped_gemm::Problem* problem, void* stream) {
  using namespace r1::grouped_gemm;
  const Problem& p = *problem;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const int chunk = p.bfloat16_operands ? 8 : 4;
  const bool aligned = (reinterpret_cast<uintptr_t>(p.left) | reinterpret_cast<uintptr_t>(p.right)) % 16 == 0;
  Arguments arguments = {};
  arguments.left = p.left;
  arguments.right = p.right;
  arguments.offsets = p.offsets;
  arguments.out = p.out;
  arguments.experts = static_cast<int>(p.experts);
  arguments.rows = static_cast<int>(p.rows);
  arguments.n = static_cast<int>(p.n);
  arguments.k = static_cast<int>(p.k);
  arguments.wide_offsets = p.wide_offsets;
  arguments.float_out = !p.bfloat16_out;
  arguments.accumulate = p.accumulate;
  arguments.whole_chunks = aligned && p.n % chunk == 0 && p.k % chunk == 0;
  const auto launch_dtype = p.bfloat16_operands ? launch<bfloat16> : launch<float>;
  return launch_dtype(p.product, arguments, device.multiprocessors, static_cast<cudaStream_t>(stream));
}

extern "C" int r1_grouped_gemm(const r1::grouped_gemm::Problem* problem, void* stream) {
  r1::grouped_gemm::Device device;
  if (const cudaError_t error = r1::grouped_gemm::current_device(device); error != cudaSuccess) return error;
  const bool hopper = device.major == 9 && device.minor == 0 && r1::grouped_gemm::fits_hopper(*problem);
  return hopper ? r1_grouped_gemm_hopper(problem, stream) : r1_grouped_gemm_portable(problem, stream);
}
