#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

struct LatentQuery {
  const void *query, *latent, *up, *norm_weight, *cos, *sin;
  void *out, *cache;
  const int64_t* cache_rows;
  int64_t latent_stride, num_cached, heads, nope, rope, rank, up_rows;
  double eps;
};

// Rows [begin, end): the query's, and of the first `num_cached` the cache's.
R1_DECLARE_CPU(void latent_query_rows(const LatentQuery& latent, Element element, int64_t begin, int64_t end))

struct LatentValues {
  const void *mixed, *up;
  void* out;
  int64_t heads, rank, up_rows, value_width;
};

R1_DECLARE_CPU(void latent_values_rows(const LatentValues& latent, Element element, int64_t begin, int64_t end))

}  // namespace r1
