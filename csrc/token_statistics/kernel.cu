// Both kernels are bound by memory: one block a row, 16-byte accesses, several of them in flight in every thread, and
// no element touched twice. Nothing depends on other rows, and which thread takes a column on its index alone.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <float.h>

#include "token_statistics/cuda.h"

namespace r1 {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// 2^x is zero here. What multiplies an exponential is kept above it, so that -inf contributes 0, not 0 * inf.
constexpr float kFloor = -256;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes of logits.
template <class Element>
struct Packet {
  static constexpr int kWidth = 16 / sizeof(Element);
  uint4 words;
};

__device__ __forceinline__ void unpack(const Packet<float>& packet, float (&x)[4]) {
  x[0] = __uint_as_float(packet.words.x);
  x[1] = __uint_as_float(packet.words.y);
  x[2] = __uint_as_float(packet.words.z);
  x[3] = __uint_as_float(packet.words.w);
}

__device__ __forceinline__ void unpack(const Packet<__nv_bfloat16>& packet, float (&x)[8]) {
  const uint32_t words[4] = {packet.words.x, packet.words.y, packet.words.z, packet.words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ Packet<float> pack(const float (&x)[4]) {
  return {{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}};
}

__device__ __forceinline__ Packet<__nv_bfloat16> pack(const float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    memcpy(&words[i], &pair, sizeof pair);
  }
  return {{words[0], words[1], words[2], words[3]}};
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class Element>
__device__ __forceinline__ int misalignment(const Element* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % 16);
}

// Any address. Where it is not a multiple of 16, two aligned words are read (the neighbouring thread's first is this
// one's second, and comes from the cache) and shifted into place. The second only where the row reaches into it; the
// bytes around the row that are read along share 16 bytes with the row, and are dropped.
template <bool kAligned, class Element>
__device__ __forceinline__ Packet<Element> read_packet(const Element* from, const Element* row_end) {
  if (kAligned) return {__ldg(reinterpret_cast<const uint4*>(from))};
  const int offset = misalignment(from);
  const auto* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(from) - offset);
  const uint4 low = __ldg(aligned);
  uint4 high = {0, 0, 0, 0};
  if (reinterpret_cast<const void*>(aligned + 1) < reinterpret_cast<const void*>(row_end)) high = __ldg(aligned + 1);
  uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (offset & 8)
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  if (offset & 4)
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  const int bits = 8 * (offset & 3);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], bits);
  return {{words[0], words[1], words[2], words[3]}};
}

// Of d = (logit - max) / temperature in units of ln 2: the sum of 2^d, and of 2^d d.
struct Sums {
  float max, sum, weighted;
};

// Finite, so that -inf has a distance to it.
__device__ __forceinline__ Sums no_sums() { return {-FLT_MAX, 0, 0}; }

__device__ __forceinline__ void raise_max(Sums& sums, float max, float scale) {
  const float shift = fmaxf((sums.max - max) * scale, kFloor);
  move_reference(sums.sum, sums.weighted, shift, exp2_of(shift));
  sums.max = max;
}

// Of the warp's lanes, in all lanes: one common maximum first, then plain sums.
__device__ __forceinline__ Sums reduce_warp(Sums sums, float scale) {
  float max = sums.max;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, lane));
  raise_max(sums, max, scale);
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    sums.sum += __shfl_xor_sync(~0u, sums.sum, lane);
    sums.weighted += __shfl_xor_sync(~0u, sums.weighted, lane);
  }
  return sums;
}

// One block a row. A thread takes kPackets packets at a time, each a block's width from the last: their maximum first,
// in registers, so that the running sums are rescaled once for all of them.
template <class Element, bool kAligned, bool kWeighted>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2)
    statistics_kernel(const __grid_constant__ LogitShard shard, float* __restrict__ stats) {
  constexpr int kWidth = Packet<Element>::kWidth, kPackets = 4;
  constexpr int kChains = 4;  // sums that do not wait for each other
  const int64_t token = blockIdx.x;
  const Element* row = static_cast<const Element*>(shard.logits) + token * shard.vocab;
  const int num_real = static_cast<int>(shard.num_real), packet_stride = blockDim.x * kWidth;
  const float temperature = static_cast<float>(shard.temperature), scale = kLog2E / temperature;
  float target = 0;
  if (threadIdx.x == 0) {
    const int64_t column = owned_column(shard, token);
    if (column >= 0) target = to_float(row[column]) / temperature;
  }

  Sums own = no_sums();
  for (int first = threadIdx.x * kWidth; first < num_real; first += kPackets * packet_stride) {
    Packet<Element> packets[kPackets];
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int column = first + p * packet_stride;
      if (column < num_real) packets[p] = read_packet<kAligned>(row + column, row + shard.vocab);
    }
    float x[kPackets][kWidth], max = own.max;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int left = num_real - (first + p * packet_stride);
      unpack(packets[p], x[p]);
      if (left < kWidth)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[p][i] = i < left ? x[p][i] : -INFINITY;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) max = fmaxf(max, x[p][i]);  // passes over NaN; the sum does not
    }
    raise_max(own, max, scale);
    float sum[kChains] = {}, weighted[kChains] = {};
#pragma unroll
    for (int i = 0; i < kPackets * kWidth; ++i) {
      const float d = (x[i / kWidth][i % kWidth] - max) * scale, e = exp2_of(d);
      sum[i % kChains] += e;
      if (kWeighted) weighted[i % kChains] = fmaf(e, fmaxf(d, kFloor), weighted[i % kChains]);
    }
    own.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    own.weighted += (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
  }

  __shared__ Sums warps[kMaxWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  own = reduce_warp(own, scale);
  if (lane == 0) warps[warp] = own;
  __syncthreads();
  if (warp > 0) return;
  own = reduce_warp(lane < blockDim.x / kWarp ? warps[lane] : no_sums(), scale);
  if (lane > 0) return;
  // Nothing but -inf, or no column at all.
  if (own.sum == 0) own = {-INFINITY, 0, 0};
  const float weighted = kWeighted ? own.weighted * kLn2 : 0.0f;
  reinterpret_cast<float4*>(stats)[token] = {own.max / temperature, own.sum, weighted, target};
}

template <class Element>
__device__ __forceinline__ void fill_with_zeros(Element* to, int64_t count) {
  constexpr int kWidth = Packet<Element>::kWidth;
  const int64_t head = min(static_cast<int64_t>((16 - misalignment(to)) % 16 / sizeof(Element)), count);
  const int64_t num_packets = (count - head) / kWidth;
  for (int64_t i = threadIdx.x; i < head; i += blockDim.x) assign(to[i], 0);
  for (int64_t i = threadIdx.x; i < num_packets; i += blockDim.x) reinterpret_cast<uint4*>(to + head)[i] = {0, 0, 0, 0};
  for (int64_t i = head + num_packets * kWidth + threadIdx.x; i < count; i += blockDim.x) assign(to[i], 0);
}

struct GradientOfLogit {
  RowGradient<float> row;
  float max, scale;
  int target;  // its column, or -1

  // The operations are spelled out, so that no call fuses them differently.
  __device__ __forceinline__ float operator()(float x, int column) const {
    const float d = fmaf(x, scale, -max), e = exp2_of(__fmul_rn(d, kLog2E));
    const float y = __fmul_rn(e, fmaf(row.slope, fmaxf(d, kFloor), row.factor));
    return column == target ? __fadd_rn(y, row.at_target) : y;
  }
};

// One block a row, in place. No sums here, so packets start at the row's first aligned address.
template <class Element>
__global__ void __launch_bounds__(256, 4)
    gradient_kernel(const __grid_constant__ LogitShard shard, const float* __restrict__ grad_logprobs,
                    const float* __restrict__ grad_entropy, const float* __restrict__ entropy,
                    const float* __restrict__ max, const float* __restrict__ log_sum) {
  constexpr int kWidth = Packet<Element>::kWidth, kPackets = 4;
  const int64_t token = blockIdx.x;
  Element* row = static_cast<Element*>(shard.logits) + token * shard.vocab;
  const float g = grad_logprobs == nullptr ? 0.0f : grad_logprobs[token];
  const float h = grad_entropy == nullptr ? 0.0f : grad_entropy[token];
  if (g == 0 && h == 0) return fill_with_zeros(row, shard.vocab);  // outside the loss: whatever the logits are

  const float temperature = static_cast<float>(shard.temperature);
  const GradientOfLogit gradient{row_gradient(g, h, entropy[token], log_sum[token], temperature), max[token],
                                 1 / temperature, static_cast<int>(owned_column(shard, token))};
  const int num_real = static_cast<int>(shard.num_real);
  const int head = min((16 - misalignment(row)) % 16 / static_cast<int>(sizeof(Element)), num_real);
  const int num_packets = (num_real - head) / kWidth;
  uint4* body = reinterpret_cast<uint4*>(row + head);
  for (int first = threadIdx.x; first < num_packets; first += kPackets * blockDim.x) {
    Packet<Element> packets[kPackets];
#pragma unroll
    for (int p = 0; p < kPackets; ++p)
      if (first + p * blockDim.x < num_packets) packets[p].words = body[first + p * blockDim.x];
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int index = first + p * blockDim.x;
      if (index >= num_packets) continue;
      float x[kWidth];
      unpack(packets[p], x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = gradient(x[i], head + index * kWidth + i);
      body[index] = pack(x).words;
    }
  }
  const auto one_by_one = [&](int begin, int end) {
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) assign(row[i], gradient(to_float(row[i]), i));
  };
  one_by_one(0, head);
  one_by_one(head + num_packets * kWidth, num_real);
  fill_with_zeros(row + num_real, shard.vocab - num_real);
}

struct Results {
  float* per_token[4];
};

__global__ void combine_kernel(const float* __restrict__ stats, int64_t num_shards, int64_t num_tokens,
                               const __grid_constant__ Results results) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (token < num_tokens) combine_token(stats, num_shards, num_tokens, token, results.per_token);
}

template <class Element>
int launch_statistics(const LogitShard& shard, bool need_entropy, float* stats, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(shard.logits) % 16 == 0 && shard.vocab * sizeof(Element) % 16 == 0;
  const auto kernel =
      aligned        ? need_entropy ? statistics_kernel<Element, true, true> : statistics_kernel<Element, true, false>
      : need_entropy ? statistics_kernel<Element, false, true>
                     : statistics_kernel<Element, false, false>;
  // The order of a row's sums hangs on this: it may depend on the number of columns only.
  const int threads = shard.num_real <= 1024 ? 32 : shard.num_real <= 4096 ? 128 : shard.num_real <= 65536 ? 256 : 512;
  kernel<<<static_cast<unsigned>(shard.num_tokens), threads, 0, stream>>>(shard, stats);
  return cudaGetLastError();
}

}  // namespace
}  // namespace r1

extern "C" int r1_shard_statistics_cuda(const r1::LogitShard* shard, bool is_bfloat16, bool need_entropy, float* stats,
                                        void* stream) {
  if (shard->num_tokens == 0) return cudaSuccess;
  const auto launch = is_bfloat16 ? r1::launch_statistics<__nv_bfloat16> : r1::launch_statistics<float>;
  return launch(*shard, need_entropy, stats, static_cast<cudaStream_t>(stream));
}

extern "C" int r1_combine_statistics_cuda(const float* stats, int64_t num_shards, int64_t num_tokens,
                                          float* const* results, void* stream) {
  if (num_tokens == 0) return cudaSuccess;
  constexpr int kThreads = 128;
  r1::combine_kernel<<<(num_tokens + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      stats, num_shards, num_tokens, {{results[0], results[1], results[2], results[3]}});
  return cudaGetLastError();
}

extern "C" int r1_shard_gradient_cuda(const r1::LogitShard* shard, bool is_bfloat16, const float* grad_logprobs,
                                      const float* grad_entropy, const float* entropy, const float* max,
                                      const float* log_sum, void* stream) {
  if (shard->num_tokens == 0) return cudaSuccess;
  const auto kernel = is_bfloat16 ? r1::gradient_kernel<__nv_bfloat16> : r1::gradient_kernel<float>;
  const int threads = shard->vocab <= 2048 ? 64 : 256;
  kernel<<<static_cast<unsigned>(shard->num_tokens), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      *shard, grad_logprobs, grad_entropy, entropy, max, log_sum);
  return cudaGetLastError();
}
