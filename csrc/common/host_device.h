// Arithmetic that the CPU and the CUDA kernels share, so that what the CPU's tests check is what a GPU computes.
//
// Such functions are `static`: every file keeps its own copy, compiled with its own instruction set (cpu.h).
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define R1_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define R1_HOST_DEVICE static inline
#endif

namespace r1 {

R1_HOST_DEVICE float exp_of(float x) { return ::expf(x); }
R1_HOST_DEVICE double exp_of(double x) { return ::exp(x); }
R1_HOST_DEVICE float expm1_of(float x) { return ::expm1f(x); }
R1_HOST_DEVICE double expm1_of(double x) { return ::expm1(x); }
R1_HOST_DEVICE float log_of(float x) { return ::logf(x); }
R1_HOST_DEVICE double log_of(double x) { return ::log(x); }
R1_HOST_DEVICE float abs_of(float x) { return ::fabsf(x); }
R1_HOST_DEVICE double abs_of(double x) { return ::fabs(x); }

// Unlike fmin and fmax these let a NaN through.
template <class Real>
R1_HOST_DEVICE Real at_most(Real x, Real bound) {
  return x > bound ? bound : x;
}

template <class Real>
R1_HOST_DEVICE Real at_least(Real x, Real bound) {
  return x < bound ? bound : x;
}

}  // namespace r1
