#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

struct Routing {
  const void *scores, *bias;  // [tokens, num_experts]; [num_experts] or null
  void* gates;                // [tokens, topk]
  int64_t* experts;           // [tokens, topk]
  int64_t num_experts, topk, num_groups, group_topk;
  double scaling;
};

// Tokens [begin, end). `scratch` holds num_experts + num_groups numbers of 8 bytes.
R1_DECLARE_CPU(void route_rows(const Routing& routing, Element element, int64_t begin, int64_t end, void* scratch))

}  // namespace r1
