// Grouped GEMM for compute capability 9.0: TMA loads, wgmma products, one persistent block on every multiprocessor.
//
// A block is three warpgroups. The third one's first warp is the producer: it loads boxes of both operands into a ring
// of kStages stages. The first two are consumers: each multiplies its 64 of the 128 rows of the tile with all 256
// columns. A stage goes around with two barriers: `full` completes when its bytes have come, `free` when every
// consumer warp of every block that it is loaded for has let go of it.
//
// Pairs. Two blocks (a cluster) with neighbouring tiles need one operand in common: A in the same tile row, B in the
// same tile column. Each block loads half of it into both (multicast): of six boxes a step, one or two less leave L2
// for every block. B is the better one to share, but then the tile rows of a group come in twos, and half a pair of a
// small expert would idle.
//
// Bits. A row of y or dx, an element of out, is one chain of products in the order of the reduction index, whatever the
// tile, the block and the neighbours: rows of a wgmma do not mix. A tile may read rows of the next expert (TMA boxes
// do not know where an expert ends); in forward and dgrad they stay in rows that are not stored. In wgrad they would be
// summed: the tail of the last step is overwritten with zero in both operands, so NaN there does no harm.
//
// Assumed: pointers that are multiples of 16 bytes, N and K multiples of 8 (fits_hopper), M, N, K below 2^31.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "grouped_gemm/cuda.h"
#include "grouped_gemm/device.h"
#include "grouped_gemm/layout.h"
#include "grouped_gemm/matrix.cuh"
#include "grouped_gemm/scheduler.h"
#include "grouped_gemm/tma.cuh"
#include "grouped_gemm/wgmma.cuh"

namespace r1::grouped_gemm {
namespace {

constexpr int kConsumerThreads = kConsumerWarps * 32, kThreads = kConsumerThreads + 128;
// Pairs share B from this many rows per expert on: the half pair costs 1/16 of the work of 1024 rows, on average.
constexpr int64_t kRowsToShareB = 1024;

enum class Shared { nothing, a, b };

// The blocks of a cluster, down and across.
template <Shared kShared>
struct Pair {
  static constexpr int kDown = kShared == Shared::b ? 2 : 1, kAcross = kShared == Shared::a ? 2 : 1;
  static constexpr int kBlocks = kDown * kAcross;
};

struct Arguments {
  const void* offsets;
  void* out;
  int experts, rows;         // E, M
  int height, columns;       // the output's: M x N (forward), M x K (dgrad), N x K of each expert (wgrad)
  int reduction;             // K (forward), N (dgrad), unused (wgrad: the expert's rows)
  int groups, tile_columns;  // tile rows and columns are those of a cluster
  bool wide_offsets, float_out, accumulate;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// 2 x 128 x 232 + 128 x 40 registers are a multiprocessor's 65536, less 1024.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;

// Walks around the ring: the stage, and the parity of the phase that its barriers are in.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Rows [valid, 64) of the reduction become zero in all boxes of a stage, whose boxes are [k][64 of M or N].
__device__ __forceinline__ void clear_tail(uint32_t stage, int valid) {
  for (int box = 0; box < kBoxesOfA + kBoxesOfB; ++box)
    for (int at = valid * kRowBytes + threadIdx.x * 16; at < kBoxBytes; at += kConsumerThreads * 16)
      clear_shared(stage + box * kBoxBytes + at);
  fence_async_proxy();
  sync_first<kConsumerThreads>();
}

// A warp's 16 x 256 results as bfloat16 to rows [row, row_end) of out, whole 128-byte lines where there are any.
__device__ __forceinline__ void store_rows(const float (&d)[128], uint32_t staging, __nv_bfloat16* out, int row,
                                           int row_end, int column, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < kTileN / kStagingColumns; ++part) {
#pragma unroll
    for (int pair = 0; pair < kStagingColumns / 16; ++pair) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = part * 32 + pair * 8 + i * 2;
        const __nv_bfloat162 both = __floats2bfloat162_rn(d[first], d[first + 1]);
        memcpy(&packed[i], &both, sizeof(both));
      }
      store_matrices(staging + staging_store(lane, pair), packed);
    }
    __syncwarp();
    const int chunk_column = column + part * kStagingColumns + staging_chunk(lane) * 8;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int block_row = staging_row(lane, step);
      const uint4 chunk = load_shared(staging + swizzled(block_row, staging_chunk(lane)));
      if (row + block_row < row_end && chunk_column < columns)
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row + block_row) * columns + chunk_column) = chunk;
    }
    __syncwarp();
  }
}

__device__ __forceinline__ float2 widen(float2 pair) { return pair; }
__device__ __forceinline__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ void narrow(float x, float y, float2& pair) { pair = make_float2(x, y); }
__device__ __forceinline__ void narrow(float x, float y, __nv_bfloat162& pair) { pair = __floats2bfloat162_rn(x, y); }

// A warpgroup's 64 x 256 results of wgrad; Pair is two neighbouring elements of out. One addition for every element.
template <class Pair>
__device__ __forceinline__ void store_gradient(const float (&d)[128], Pair* out, int row, int height, int column,
                                               int columns, bool accumulate) {
  constexpr int kBatch = 16;  // loads under way before the first is needed
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = row + accumulator_row(thread, half * 2);
    if (m >= height) continue;
    const int first = column + accumulator_column(thread, 0);
    Pair* line = out + (static_cast<int64_t>(m) * columns + first) / 2;
#pragma unroll
    for (int batch = 0; batch < 32; batch += kBatch) {
      Pair old[kBatch];
      if (accumulate) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (first + (batch + i) * 8 < columns) old[i] = line[(batch + i) * 4];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + (batch + i) * 8 >= columns) continue;
        const float2 before = accumulate ? widen(old[i]) : make_float2(0.f, 0.f);
        const int at = (batch + i) * 4 + half * 2;
        narrow(before.x + d[at], before.y + d[at + 1], line[(batch + i) * 4]);
      }
    }
  }
}

// Where a tile lies: first row (forward, dgrad: of all rows; wgrad: of the expert's output) and column, reduction.
struct Place {
  int row, row_end, column, reduction_begin, reduction, steps;
};

template <Product kProduct, Shared kShared>
__device__ __forceinline__ Place place_of(const Arguments& p, const Group* table, const Tile& tile, int rank) {
  const int begin = table[tile.group].row_end, end = table[tile.group + 1].row_end;
  const int row = (tile.m * Pair<kShared>::kDown + (kShared == Shared::b ? rank : 0)) * kTileM;
  const int column = (tile.n * Pair<kShared>::kAcross + (kShared == Shared::a ? rank : 0)) * kTileN;
  if (kProduct == Product::wgrad) {
    const int count = end > begin ? end - begin : 0;
    return {row, p.height, column, begin, count, divide_up(count, kTileK)};
  }
  const int reduction = tile.group < p.experts ? p.reduction : 0;  // rows past the end are zero
  return {begin + row, end, column, 0, reduction, divide_up(reduction, kTileK)};
}

// Loads one operand's boxes of a stage; of a shared one this block's half, for both blocks.
template <bool kKMajor, bool kIsShared, int kBoxes>
__device__ __forceinline__ void load_operand(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int mn,
                                             int k, int expert, int rank) {
  constexpr int kCount = kIsShared ? kBoxes / 2 : kBoxes;
  const int first = kIsShared ? rank * kCount : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int box = first + i, at = mn + box * kBox;
    const uint32_t place = destination + box * kBoxBytes;
    if (kIsShared)
      load_box_to(0b11, place, map, barrier, kKMajor ? k : at, kKMajor ? at : k, expert);
    else
      load_box(place, map, barrier, kKMajor ? k : at, kKMajor ? at : k, expert);
  }
}

template <Product kProduct, Shared kShared>
__device__ __forceinline__ void produce(const Arguments& p, const CUtensorMap* map_a, const CUtensorMap* map_b,
                                        TileWalk walk, uint32_t stages, uint32_t full, uint32_t free, int rank) {
  constexpr int kCluster = Pair<kShared>::kBlocks;
  const int lane = threadIdx.x % 32;
  Ring ring;
  Tile tile;
  for (int64_t index = blockIdx.x / kCluster; find_tile(walk, index, tile); index += gridDim.x / kCluster) {
    const Place place = place_of<kProduct, kShared>(p, walk.table, tile, rank);
    if (kProduct == Product::wgrad && p.accumulate && place.steps > 0) {
      // The old gradient of this tile comes to L2 while its products run.
      const int size = p.float_out ? 4 : 2;
      const int width = min(kTileN, p.columns - place.column);
      for (int row = place.row + lane; width > 0 && row < min(place.row + kTileM, p.height); row += 32) {
        const int64_t line = static_cast<int64_t>(tile.group) * p.height + row;
        prefetch_to_l2(static_cast<const char*>(p.out) + (line * p.columns + place.column) * size, width * size);
      }
    }
    if (lane == 0) {
      const int expert = kProduct == Product::wgrad ? 0 : tile.group;
      for (int step = 0; step < place.steps; ++step, ring.advance()) {
        const uint32_t stage = stages + ring.stage * kStageBytes, barrier = full + ring.stage * 8;
        const int k = place.reduction_begin + step * kTileK;
        barrier_wait(free + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(barrier, kStageBytes);
        load_operand<a_is_k_major(kProduct), kShared == Shared::a, kBoxesOfA>(stage, map_a, barrier, place.row, k, 0,
                                                                              rank);
        load_operand<b_is_k_major(kProduct), kShared == Shared::b, kBoxesOfB>(stage + kBytesOfA, map_b, barrier,
                                                                              place.column, k, expert, rank);
      }
    }
    __syncwarp();
  }
}

template <Product kProduct, Shared kShared>
__device__ __forceinline__ void consume(const Arguments& p, TileWalk walk, uint32_t stages, uint32_t staging,
                                        uint32_t full, uint32_t free, int rank) {
  constexpr bool kAIsKMajor = a_is_k_major(kProduct), kBIsKMajor = b_is_k_major(kProduct);
  constexpr int kCluster = Pair<kShared>::kBlocks;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp lets go of a stage in every block of the cluster that it was loaded for.
  const auto release = [&](int stage) {
    if (kCluster == 1 && lane == 0) barrier_arrive(free + stage * 8);
    if (kCluster > 1 && lane < kCluster) barrier_arrive(free + stage * 8, lane);
  };
  Ring ring;
  Tile tile;
  for (int64_t index = blockIdx.x / kCluster; find_tile(walk, index, tile); index += gridDim.x / kCluster) {
    const Place place = place_of<kProduct, kShared>(p, walk.table, tile, rank);
    if (kProduct == Product::wgrad && p.accumulate && place.steps == 0) continue;
    float d[128];
    if (place.steps == 0) {
#pragma unroll
      for (int i = 0; i < 128; ++i) d[i] = 0.f;
    }
    int previous = 0;
    for (int step = 0; step < place.steps; ++step, ring.advance()) {
      const uint32_t stage = stages + ring.stage * kStageBytes;
      barrier_wait(full + ring.stage * 8, ring.parity);
      if (kProduct == Product::wgrad && place.reduction - step * kTileK < kTileK)
        clear_tail(stage, place.reduction - step * kTileK);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileK; k += kMmaK)
        wgmma_64x256x16<kAIsKMajor, kBIsKMajor>(d, mma_descriptor(kAIsKMajor, stage + warpgroup * kBoxBytes, k),
                                                mma_descriptor(kBIsKMajor, stage + kBytesOfA, k), step > 0 || k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(previous);
      previous = ring.stage;
    }
    wgmma_wait<0>();
    keep_in_place(d);
    if (place.steps > 0) release(previous);

    if constexpr (kProduct == Product::wgrad) {
      const int64_t expert = static_cast<int64_t>(tile.group) * p.height * p.columns;
      const int row = place.row + warpgroup * kWarpgroupM;
      if (p.float_out)
        store_gradient(d, reinterpret_cast<float2*>(static_cast<float*>(p.out) + expert), row, p.height, place.column,
                       p.columns, p.accumulate);
      else
        store_gradient(d, reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + expert), row, p.height,
                       place.column, p.columns, p.accumulate);
    } else {
      store_rows(d, staging + warp * kStagingBytes, static_cast<__nv_bfloat16*>(p.out), place.row + warp * 16,
                 place.row_end, place.column, p.columns);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <Product kProduct, Shared kShared>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                  const __grid_constant__ Arguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kCluster = Pair<kShared>::kBlocks, kTileRow = kTileM * Pair<kShared>::kDown;
  uint8_t* const memory = shared_memory();
  const uint32_t stages = shared_address(memory), staging = stages + kStagingOffset;
  const uint32_t full = stages + kBarrierOffset, free = full + kStages * 8;
  Group* table = reinterpret_cast<Group*>(memory + kTableOffset);
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  if (stages % 1024 != 0) __trap();  // the swizzle and the descriptors count on it

  if (threadIdx.x == kConsumerThreads) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(free + stage * 8, kConsumerWarps * kCluster);
    }
    fence_barrier_init();
  }
  build_table(table, p.offsets, p.wide_offsets, p.experts, p.rows, p.groups, kTileRow,
              kProduct == Product::wgrad ? divide_up(p.height, kTileRow) : 0);
  if (kCluster > 1) cluster_sync();

  // 16 x 8 tiles, 2048 x 2048, are about what 132 blocks have under way.
  const TileWalk walk{table, p.groups, p.tile_columns, 16 / Pair<kShared>::kDown};
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    give_registers<kProducerRegisters>();
    if (__shfl_sync(~0u, threadIdx.x / 32, 0) == kConsumerWarps)
      produce<kProduct, kShared>(p, &map_a, &map_b, walk, stages, full, free, rank);
  } else {
    take_registers<kConsumerRegisters>();
    consume<kProduct, kShared>(p, walk, stages, staging, full, free, rank);
  }
  // A block's memory must outlive what the other one still sends to its barriers.
  if (kCluster > 1) cluster_sync();
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library needs no libcuda to load.
Encode tensor_map_encoder() {
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  return encode;
}

// A contiguous [outer, rows, inner] bfloat16 tensor in boxes of 64 x 64, as layout.h wants them.
cudaError_t make_map(CUtensorMap* map, const void* data, int64_t outer, int64_t rows, int64_t inner) {
  const Encode encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(inner), cuuint64_t(rows), cuuint64_t(outer)};
  const cuuint64_t strides[] = {cuuint64_t(inner) * 2, cuuint64_t(rows) * inner * 2};
  const cuuint32_t box[] = {kBox, kBox, 1}, every[] = {1, 1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), sizes, strides, box,
                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <Product kProduct, Shared kShared>
cudaError_t launch(const CUtensorMap& map_a, const CUtensorMap& map_b, Arguments arguments, int multiprocessors,
                   cudaStream_t stream) {
  constexpr int kCluster = Pair<kShared>::kBlocks, kTileRow = kTileM * Pair<kShared>::kDown;
  arguments.tile_columns = divide_up(arguments.columns, kTileN * Pair<kShared>::kAcross);
  // More tile rows than there can be: every group may have one that is not full.
  const int64_t tile_rows = kProduct == Product::wgrad
                                ? int64_t(arguments.groups) * divide_up(arguments.height, kTileRow)
                                : int64_t(arguments.height) / kTileRow + arguments.groups;
  const int64_t clusters = std::min<int64_t>(multiprocessors / kCluster, tile_rows * arguments.tile_columns);
  const auto kernel = hopper_kernel<kProduct, kShared>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kTableOffset + (arguments.groups + 1) * sizeof(Group);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, arguments);
}

template <Product kProduct>
cudaError_t launch(const CUtensorMap& map_a, const CUtensorMap& map_b, const Arguments& arguments, int multiprocessors,
                   cudaStream_t stream) {
  // A pair across or (wgrad) down is formed only where no tile is left over.
  const bool share_b = kProduct == Product::wgrad ? divide_up(arguments.height, kTileM) % 2 == 0
                                                  : arguments.rows >= kRowsToShareB * arguments.experts;
  const bool share_a = divide_up(arguments.columns, kTileN) % 2 == 0;
  const auto launch_shared = share_b   ? launch<kProduct, Shared::b>
                             : share_a ? launch<kProduct, Shared::a>
                                       : launch<kProduct, Shared::nothing>;
  return launch_shared(map_a, map_b, arguments, multiprocessors, stream);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool fits_hopper(const Problem& problem) {
  return problem.bfloat16_operands && problem.rows > 0 && problem.experts > 0 && problem.n > 0 && problem.k > 0 &&
         problem.n % 8 == 0 && problem.k % 8 == 0 && aligned(problem.left) && aligned(problem.right) &&
         aligned(problem.out);
}

}  // namespace r1::grouped_gemm

extern "C" int r1_grouped_gemm_hopper(const r1::grouped_gemm::Problem* problem, void* stream) {
  using namespace r1::grouped_gemm;
  const Problem& p = *problem;
  Device device;
  CUtensorMap map_a, map_b;
  const bool wgrad = p.product == Product::wgrad, forward = p.product == Product::forward;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = make_map(&map_a, p.left, 1, p.rows, forward ? p.k : p.n);
  if (error == cudaSuccess)
    error = wgrad ? make_map(&map_b, p.right, 1, p.rows, p.k) : make_map(&map_b, p.right, p.experts, p.n, p.k);
  if (error != cudaSuccess) return error;

  Arguments arguments = {};
  arguments.offsets = p.offsets;
  arguments.out = p.out;
  arguments.experts = static_cast<int>(p.experts);
  arguments.rows = static_cast<int>(p.rows);
  arguments.height = static_cast<int>(wgrad ? p.n : p.rows);
  arguments.columns = static_cast<int>(forward ? p.n : p.k);
  arguments.reduction = static_cast<int>(forward ? p.k : p.n);
  arguments.groups = arguments.experts + (wgrad ? 0 : 1);
  arguments.wide_offsets = p.wide_offsets;
  arguments.float_out = !p.bfloat16_out;
  arguments.accumulate = p.accumulate;
  const auto launch_product = forward ? launch<Product::forward>
                              : wgrad ? launch<Product::wgrad>
                                      : launch<Product::dgrad>;
  return launch_product(map_a, map_b, arguments, device.multiprocessors, static_cast<cudaStream_t>(stream));
}
