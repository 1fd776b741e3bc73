#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/host_device.h"
#include "paged_attention/cuda.h"

namespace r1 {
namespace {

// A block works on kHeads heads of one row and group and on kThreads * kColumns numbers of their values. Softmax is
// online over blocks of positions: warps take positions for the scores, then heads for the weights; threads take
// columns for the sums. Every order is decided by the row alone.
constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kHeads = 8, kColumns = 4;
constexpr int kPositions = 64;
constexpr int kHeadsOfWarp = kHeads / kWarps;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  return x;
}

__device__ __forceinline__ float max_of_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = at_least(__shfl_xor_sync(0xffffffff, x, distance), x);
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads) attention_kernel(PagedAttention attention) {
  extern __shared__ float query[];  // [kHeads, key_width], zero for heads that the group does not have
  __shared__ float weights[kHeads][kPositions];
  __shared__ float factors[kHeads];
  __shared__ const T* tokens[kPositions];

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int64_t head_blocks = (attention.heads + kHeads - 1) / kHeads;
  const int64_t first_head = blockIdx.x % head_blocks * kHeads;
  const int64_t group = blockIdx.x / head_blocks % attention.groups;
  const int64_t row = blockIdx.x / head_blocks / attention.groups;
  const int64_t head = (row * attention.groups + group) * attention.heads + first_head;
  const int heads = static_cast<int>(attention.heads - first_head < kHeads ? attention.heads - first_head : kHeads);
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kThreads * kColumns + thread;
  const int64_t key_width = attention.key_width, value_width = attention.value_width;
  const int64_t key_start = group * key_width, value_start = attention.value_start + group * value_width;
  const int32_t* pages = attention.page_table + row * attention.max_pages;
  const int64_t length = attention.lengths[row];

  for (int64_t i = thread; i < kHeads * key_width; i += kThreads)
    query[i] = i < heads * key_width ? to_float(static_cast<const T*>(attention.query)[head * key_width + i]) : 0.0f;

  float max[kHeadsOfWarp], total[kHeadsOfWarp], sums[kHeads][kColumns] = {};
#pragma unroll
  for (int i = 0; i < kHeadsOfWarp; ++i) max[i] = -INFINITY, total[i] = 0;

  for (int64_t start = 0; start < length; start += kPositions) {
    const int positions = static_cast<int>(length - start < kPositions ? length - start : kPositions);
    __syncthreads();
    if (thread < positions) {
      const int64_t position = start + thread;
      const int64_t at = pages[position / attention.page_size] * attention.page_size + position % attention.page_size;
      tokens[thread] = static_cast<const T*>(attention.cache) + at * attention.row_width;
    }
    __syncthreads();
    for (int p = warp; p < positions; p += kWarps) {
      float scores[kHeads] = {};
      for (int64_t k = lane; k < key_width; k += kWarp) {
        const float key = to_float(tokens[p][key_start + k]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) scores[h] += query[h * key_width + k] * key;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float score = sum_of_warp(scores[h]) * static_cast<float>(attention.scale);
        if (lane == 0) weights[h][p] = score;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeadsOfWarp; ++i) {
      float* const row_of_weights = weights[warp * kHeadsOfWarp + i];
      float largest = max[i];
      for (int p = lane; p < positions; p += kWarp) largest = at_least(row_of_weights[p], largest);
      largest = max_of_warp(largest);
      const float factor = exp_of(max[i] - largest);
      float sum = 0;
      for (int p = lane; p < positions; p += kWarp) {
        const float weight = exp_of(row_of_weights[p] - largest);
        row_of_weights[p] = weight;
        sum += weight;
      }
      total[i] = total[i] * factor + sum_of_warp(sum);
      max[i] = largest;
      if (lane == 0) factors[warp * kHeadsOfWarp + i] = factor;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[h][c] *= factors[h];
#pragma unroll 2
    for (int p = 0; p < positions; ++p) {
      float value[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t column = first_column + c * kThreads;
        value[c] = column < value_width ? to_float(tokens[p][value_start + column]) : 0.0f;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[h][c] += weights[h][p] * value[c];
    }
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < kHeadsOfWarp; ++i)
    if (lane == 0) factors[warp * kHeadsOfWarp + i] = length > 0 ? 1 / total[i] : 0.0f;
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = first_column + c * kThreads;
      if (h < heads && column < value_width)
        from_float(sums[h][c] * factors[h], static_cast<T*>(attention.out) + (head + h) * value_width + column);
    }
}

template <class T>
int launch(const PagedAttention& attention, void* stream) {
  const auto bytes = static_cast<size_t>(kHeads * attention.key_width * sizeof(float));
  const auto kernel = attention_kernel<T>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  const int64_t head_blocks = (attention.heads + kHeads - 1) / kHeads;
  const int64_t columns = kThreads * kColumns, column_blocks = (attention.value_width + columns - 1) / columns;
  const dim3 grid(attention.rows * attention.groups * head_blocks, column_blocks);
  if (grid.x > 0 && grid.y > 0) kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(attention);
  return cudaGetLastError();
}

}  // namespace
}  // namespace r1

extern "C" int r1_paged_attention_cuda(const r1::PagedAttention* attention, bool is_bfloat16, void* stream) {
  return is_bfloat16 ? r1::launch<__nv_bfloat16>(*attention, stream) : r1::launch<float>(*attention, stream);
}
