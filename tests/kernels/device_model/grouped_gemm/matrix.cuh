#pragma once

#include "cuda_bf16.h"

namespace r1::grouped_gemm {

uint8_t* shared_memory();
uint32_t shared_address(const void* pointer);
uint4 load_shared(uint32_t address);
void clear_shared(uint32_t address);
void sync_named(int threads);
void store_matrices(uint32_t row, const uint32_t (&registers)[4]);
void load_matrices(uint32_t (&registers)[4], uint32_t row);
void load_matrices_transposed(uint32_t (&registers)[4], uint32_t row);
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b_top, uint32_t b_bottom);

template <int kThreads>
void sync_first() {
  sync_named(kThreads);
}

}  // namespace r1::grouped_gemm
