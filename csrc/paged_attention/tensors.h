// What the CPU and the CUDA kernels are given.
#pragma once

#include <stdint.h>

namespace r1 {

// Contiguous. A cache row is one token's `row_width` numbers; the widths count numbers, not bytes.
struct PagedAttention {
  const void* query;          // [rows, groups, heads, key_width]
  const void* cache;          // [pages, page_size, row_width]
  const int32_t* page_table;  // [rows, max_pages]
  const int32_t* lengths;     // [rows]
  void* out;                  // [rows, groups, heads, value_width]
  int64_t rows, groups, heads, key_width, value_width, value_start;
  int64_t row_width, page_size, max_pages;
  double scale;
};

}  // namespace r1
