// Which tile of the output comes next. Runs on the device, and on the host in the tests.
//
// The rows of the output are split into groups: one an expert, and for forward and dgrad a last one, the rows past the
// end, which become zero. Every group is cut into tiles of its own, so no tile spans two experts. Only the device knows
// the offsets: each thread block builds the table of groups in shared memory, then walks through it as its tile
// numbers grow, a step or two for each tile.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace r1::grouped_gemm {

// Entry g + 1 of the table describes group g; entry 0 is zero.
struct Group {
  int row_end;    // of the input's rows: the group owns [table[g].row_end, table[g + 1].row_end)
  int tiles_end;  // tile rows of the output up to and with this group
};

struct Tile {
  int group;
  int m, n;  // tile row within the group, tile column
};

R1_HOST_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// The end of an expert's rows, kept within [0, rows]: whatever the offsets hold, no address leaves the tensors.
R1_HOST_DEVICE int read_offset(const void* offsets, bool wide, int expert, int rows) {
  const int64_t end =
      wide ? static_cast<const int64_t*>(offsets)[expert] : static_cast<const int32_t*>(offsets)[expert];
  return end < 0 ? 0 : end > rows ? rows : static_cast<int>(end);
}

// The number of groups is experts + 1 where rows past the end exist in the output, else experts.
R1_HOST_DEVICE Group read_group(const void* offsets, bool wide, int experts, int rows, int group, int tile_rows,
                                int fixed_tile_rows) {
  const int begin = group == 0 ? 0 : read_offset(offsets, wide, group - 1, rows);
  const int end = group == experts ? rows : read_offset(offsets, wide, group, rows);
  return {end, fixed_tile_rows > 0 ? fixed_tile_rows : end > begin ? divide_up(end - begin, tile_rows) : 0};
}

// A walk over the tiles, `columns` of them side by side. It runs down `wave` tile rows before the next tile column, so
// that the blocks of one moment share both operands in L2.
struct TileWalk {
  const Group* table;
  int groups, columns, wave;
  int group = 0;
};

// Tile number `index`; false past the last one. Indices must not decrease from call to call.
R1_HOST_DEVICE bool find_tile(TileWalk& walk, int64_t index, Tile& tile) {
  const int columns = walk.columns;
  while (walk.group < walk.groups && index >= static_cast<int64_t>(walk.table[walk.group + 1].tiles_end) * columns)
    ++walk.group;
  if (walk.group == walk.groups) return false;
  const int first = walk.table[walk.group].tiles_end;
  const int tile_rows = walk.table[walk.group + 1].tiles_end - first;
  const int local = static_cast<int>(index - static_cast<int64_t>(first) * columns);
  const int top = local / (walk.wave * columns) * walk.wave;
  const int height = tile_rows - top < walk.wave ? tile_rows - top : walk.wave;
  const int rest = local - top * columns;
  tile = {walk.group, top + rest % height, rest / height};
  return true;
}

#ifdef __CUDACC__
// Fills table[0 .. groups], all threads of the block together; ends with a barrier.
__device__ inline void build_table(Group* table, const void* offsets, bool wide, int experts, int rows, int groups,
                                   int tile_rows, int fixed_tile_rows) {
  for (int group = threadIdx.x; group < groups; group += blockDim.x)
    table[group + 1] = read_group(offsets, wide, experts, rows, group, tile_rows, fixed_tile_rows);
  if (threadIdx.x == 0) table[0] = {0, 0};
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int first = 1; first <= groups; first += 32) {
      const int entry = first + lane;
      int sum = entry <= groups ? table[entry].tiles_end : 0;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (entry <= groups) table[entry].tiles_end = before + sum;
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
}
#endif

}  // namespace r1::grouped_gemm
