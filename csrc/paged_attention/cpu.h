#pragma once

#include "common/cpu.h"
#include "common/element.h"
#include "paged_attention/tensors.h"

namespace r1 {

// Heads of a group that are computed together, and positions between two looks at the largest score.
inline constexpr int64_t kAttentionHeads = 16;
inline constexpr int64_t kAttentionPositions = 64;

// Of 64-byte aligned memory, for one task at a time: a query, the scores of a block and the sums, each of as many heads
// as are computed together, in float64 at most and whole vectors.
inline int64_t paged_attention_scratch_bytes(const PagedAttention& attention) {
  const int64_t widths = attention.key_width + attention.value_width + 2 * 16;
  return kAttentionHeads * (widths + kAttentionPositions + 16) * 8;
}

// The heads [first_head, first_head + kAttentionHeads) of one group of one row, as far as the group has them.
R1_DECLARE_CPU(void paged_attention_heads(const PagedAttention& attention, Element element, int64_t row, int64_t group,
                                          int64_t first_head, void* scratch))

}  // namespace r1
