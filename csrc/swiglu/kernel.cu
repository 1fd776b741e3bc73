#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "swiglu/cuda.h"

namespace r1 {
namespace {

// A warp works on a row. Its lanes take 16 bytes at a time, in an order that only the width decides, so that the sum
// over a row has the same bits wherever the row lies.
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

template <class T>
constexpr int kWidth = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// 16 bytes of a row from `column` on; without kAligned one element at a time, zeros past the end of the row.
template <bool kAligned, class T>
struct Columns {
  float values[kWidth<T>];

  __device__ __forceinline__ void load(const T* row, int64_t column, int64_t width) {
    if constexpr (kAligned) {
      const uint4 bits = *reinterpret_cast<const uint4*>(row + column);
      T elements[kWidth<T>];
      memcpy(elements, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) values[i] = to_float(elements[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) values[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
    }
  }

  __device__ __forceinline__ void store(T* row, int64_t column, int64_t width) const {
    if constexpr (kAligned) {
      T elements[kWidth<T>];
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) from_float(values[i], elements + i);
      uint4 bits;
      memcpy(&bits, elements, sizeof(bits));
      *reinterpret_cast<uint4*>(row + column) = bits;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i)
        if (column + i < width) from_float(values[i], row + column + i);
    }
  }
};

template <bool kAligned, class T, class P>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) forward_kernel(SwigluTensors tensors) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= tensors.rows) return;
  const int64_t width = tensors.width;
  const T* gates = static_cast<const T*>(tensors.h) + row * 2 * width;
  T* a = static_cast<T*>(tensors.a) + row * width;
  const float prob = tensors.probs == nullptr ? 1.0f : to_float(static_cast<const P*>(tensors.probs)[row]);
#pragma unroll 2
  for (int64_t f = threadIdx.x % kWarp * kWidth<T>; f < width; f += kWarp * kWidth<T>) {
    Columns<kAligned, T> gate, up, result;
    gate.load(gates, f, width);
    up.load(gates + width, f, width);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const float e = exp_of(-abs_of(gate.values[i]));
      result.values[i] = swiglu_activation(gate.values[i], up.values[i], prob, e);
    }
    result.store(a, f, width);
  }
}

template <bool kAligned, class T, class P>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) backward_kernel(SwigluTensors tensors) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= tensors.rows) return;
  const int64_t width = tensors.width;
  const T* gates = static_cast<const T*>(tensors.h) + row * 2 * width;
  const T* das = static_cast<const T*>(tensors.da) + row * width;
  T* a = static_cast<T*>(tensors.a) + row * width;
  T* dgates = static_cast<T*>(tensors.dh) + row * 2 * width;
  const float prob = tensors.probs == nullptr ? 1.0f : to_float(static_cast<const P*>(tensors.probs)[row]);
  float dprob = 0;
  for (int64_t f = threadIdx.x % kWarp * kWidth<T>; f < width; f += kWarp * kWidth<T>) {
    Columns<kAligned, T> gate, up, da, activation;
    gate.load(gates, f, width);
    up.load(gates + width, f, width);
    da.load(das, f, width);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const float e = exp_of(-abs_of(gate.values[i]));
      const auto gradient = swiglu_gradient(gate.values[i], up.values[i], da.values[i], prob, e);
      gate.values[i] = gradient.gate;
      up.values[i] = gradient.up;
      activation.values[i] = gradient.activation;
      dprob += gradient.prob;
    }
    gate.store(dgates, f, width);
    up.store(dgates + width, f, width);
    activation.store(a, f, width);
  }
  if (tensors.probs == nullptr) return;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) dprob += __shfl_xor_sync(0xffffffff, dprob, distance);
  if (threadIdx.x % kWarp == 0) from_float(dprob, static_cast<P*>(tensors.dprobs) + row);
}

bool is_aligned(const SwigluTensors& tensors, int64_t element_bytes) {
  const auto addresses = reinterpret_cast<uintptr_t>(tensors.h) | reinterpret_cast<uintptr_t>(tensors.da) |
                         reinterpret_cast<uintptr_t>(tensors.a) | reinterpret_cast<uintptr_t>(tensors.dh);
  return addresses % 16 == 0 && tensors.width * element_bytes % 16 == 0;
}

template <class T, class P>
int launch(bool backward, const SwigluTensors& tensors, cudaStream_t stream) {
  const auto kernel = is_aligned(tensors, sizeof(T))
                          ? (backward ? backward_kernel<true, T, P> : forward_kernel<true, T, P>)
                          : (backward ? backward_kernel<false, T, P> : forward_kernel<false, T, P>);
  const auto num_blocks = (tensors.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (num_blocks > 0) kernel<<<num_blocks, kWarp * kWarpsPerBlock, 0, stream>>>(tensors);
  return cudaGetLastError();
}

int launch(bool backward, const SwigluTensors& tensors, bool is_bfloat16, bool is_prob_bfloat16, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (!is_bfloat16) return launch<float, float>(backward, tensors, on);
  if (!is_prob_bfloat16) return launch<__nv_bfloat16, float>(backward, tensors, on);
  return launch<__nv_bfloat16, __nv_bfloat16>(backward, tensors, on);
}

}  // namespace
}  // namespace r1

extern "C" int r1_swiglu_cuda(const r1::SwigluTensors* tensors, bool is_bfloat16, bool is_prob_bfloat16, void* stream) {
  return r1::launch(false, *tensors, is_bfloat16, is_prob_bfloat16, stream);
}

extern "C" int r1_swiglu_backward_cuda(const r1::SwigluTensors* tensors, bool is_bfloat16, bool is_prob_bfloat16,
                                       void* stream) {
  return r1::launch(true, *tensors, is_bfloat16, is_prob_bfloat16, stream);
}
