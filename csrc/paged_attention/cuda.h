// The launcher of kernel.cu. It returns a cudaError_t.
#pragma once

#include "paged_attention/tensors.h"

extern "C" {
// Query, cache and out are bfloat16 or float32.
int r1_paged_attention_cuda(const r1::PagedAttention* attention, bool is_bfloat16, void* stream);
}
