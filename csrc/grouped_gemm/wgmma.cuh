// Warpgroup products: what the tensor cores of compute capability 9.0 are asked with.
#pragma once

#include <cstdint>

namespace r1::grouped_gemm {

// Before the first product that uses registers or shared memory which the warpgroup wrote by ordinary means.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the committed groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Products under way write the accumulators behind the compiler's back: it must not move their uses across this line.
__device__ __forceinline__ void keep_in_place(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

#define R1_FLOATS(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// d = a b + (add ? d : 0) for a of 64 x 16 and b of 16 x 256, both bfloat16 in shared memory (layout.h), d in float32.
template <bool a_k_major, bool b_k_major>
__device__ __forceinline__ void wgmma_64x256x16(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, %131, %132;\n"
      "}\n"
      : R1_FLOATS(0), R1_FLOATS(8), R1_FLOATS(16), R1_FLOATS(24), R1_FLOATS(32), R1_FLOATS(40), R1_FLOATS(48),
        R1_FLOATS(56), R1_FLOATS(64), R1_FLOATS(72), R1_FLOATS(80), R1_FLOATS(88), R1_FLOATS(96), R1_FLOATS(104),
        R1_FLOATS(112), R1_FLOATS(120)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(a_k_major ? 0 : 1), "n"(b_k_major ? 0 : 1));
}

#undef R1_FLOATS

}  // namespace r1::grouped_gemm
