#pragma once

#include "cuda_runtime.h"

namespace r1::grouped_gemm {

void wgmma_fence();
void wgmma_commit();
void wait_for_products(int pending);
void multiply_later(float* d, uint64_t a, uint64_t b, bool add, bool a_k_major, bool b_k_major);
void keep_in_place(float (&d)[128]);

template <int pending>
void wgmma_wait() {
  wait_for_products(pending);
}
template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}
template <bool a_k_major, bool b_k_major>
void wgmma_64x256x16(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  multiply_later(d, a, b, add, a_k_major, b_k_major);
}

}  // namespace r1::grouped_gemm
