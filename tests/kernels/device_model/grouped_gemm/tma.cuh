#pragma once

#include "cuda.h"
#include "cuda_runtime.h"

namespace r1::grouped_gemm {

void barrier_init(uint32_t barrier, int arrivals);
void fence_barrier_init();
void barrier_expect(uint32_t barrier, int bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void barrier_arrive(uint32_t barrier, uint32_t rank);
void barrier_arrive(uint32_t barrier);
uint32_t cluster_rank();
void cluster_sync();
void prefetch_map(const CUtensorMap* map);
void load_box(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x, int y, int z);
void load_box_to(uint16_t blocks, uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x, int y, int z);
void prefetch_to_l2(const void* address, uint32_t bytes);
void fence_async_proxy();

}  // namespace r1::grouped_gemm
