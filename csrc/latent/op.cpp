#include "latent/op.h"

#include "latent/cpu.h"

namespace r1 {

// Multiply-adds that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 19;

static void check_dtype(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  R1_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the first tensor (",
           name_of(like.scalar_type()), "), got ", describe(tensor));
}

Tensor latent_query_cpu(const Tensor& query, const Tensor& latent, const Tensor& up, const Tensor& norm_weight,
                        const Tensor& cos, const Tensor& sin, double eps, Tensor cache, const Tensor& cache_rows) {
  constexpr const char* kOp = "latent_query";
  check_tensor(kOp, "query", query, query, {-1, -1, -1});
  const int64_t rows = query.size(0), heads = query.size(1);
  check_tensor(kOp, "norm_weight", norm_weight, query, {-1});
  check_tensor(kOp, "cos", cos, query, {rows, -1});
  const int64_t rank = norm_weight.size(0), rope = 2 * cos.size(1), nope = query.size(2) - rope;
  R1_CHECK(nope >= 0, kOp, ": query must be [T, H, N + P] with P = ", rope, " rotary channels of cos, got ",
           describe(query));
  check_tensor(kOp, "sin", sin, query, {rows, rope / 2});
  check_rows(kOp, "latent", latent, query, {rows, rank + rope});
  check_tensor(kOp, "up", up, query, {heads, -1, rank});
  R1_CHECK(up.size(1) >= nope, kOp, ": up must be [H, N + V, R] with N = ", nope, ", got ", describe(up));
  check_tensor(kOp, "cache", cache, query, {-1, -1, rank + rope});
  check_tensor(kOp, "cache_rows", cache_rows, query, {-1});
  R1_CHECK(cache_rows.scalar_type() == ScalarType::Long, kOp, ": cache_rows must be int64, got ", describe(cache_rows));
  const int64_t num_cached = cache_rows.size(0);
  R1_CHECK(num_cached <= rows, kOp, ": cache_rows must be at most the ", rows, " rows of query, got ",
           describe(cache_rows));
  check_dtype(kOp, "latent", latent, query);
  check_dtype(kOp, "up", up, query);
  check_dtype(kOp, "norm_weight", norm_weight, query);
  check_dtype(kOp, "cos", cos, query);
  check_dtype(kOp, "sin", sin, query);
  check_dtype(kOp, "cache", cache, query);
  const Element element = element_of(kOp, query);
  const auto* kept = static_cast<const int64_t*>(cache_rows.const_data_ptr());
  const int64_t capacity = cache.size(0) * cache.size(1);
  for (int64_t i = 0; i < num_cached; ++i)
    R1_CHECK(kept[i] >= 0 && kept[i] < capacity, kOp, ": cache_rows[", i, "] = ", kept[i], ", but the cache has ",
             capacity, " rows");
  Tensor out = torch::stable::new_empty(query, {rows, heads, rank + rope});
  const LatentQuery task{
      .query = query.const_data_ptr(),
      .latent = latent.const_data_ptr(),
      .up = up.const_data_ptr(),
      .norm_weight = norm_weight.const_data_ptr(),
      .cos = cos.const_data_ptr(),
      .sin = sin.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .cache = cache.mutable_data_ptr(),
      .cache_rows = kept,
      .latent_stride = latent.stride(0),
      .num_cached = num_cached,
      .heads = heads,
      .nope = nope,
      .rope = rope,
      .rank = rank,
      .up_rows = up.size(1),
      .eps = eps,
  };
  const int64_t work = heads * (nope + 1) * rank + 1;
  torch::stable::parallel_for(0, rows, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(latent_query_rows)(task, element, begin, end);
  });
  return out;
}

Tensor latent_values_cpu(const Tensor& mixed, const Tensor& up, int64_t value_width) {
  constexpr const char* kOp = "latent_values";
  check_tensor(kOp, "mixed", mixed, mixed, {-1, -1, -1});
  const int64_t rows = mixed.size(0), heads = mixed.size(1), rank = mixed.size(2);
  check_tensor(kOp, "up", up, mixed, {heads, -1, rank});
  check_dtype(kOp, "up", up, mixed);
  R1_CHECK(value_width > 0 && value_width <= up.size(1), kOp, ": value_width must be in [1, ", up.size(1),
           "], the rows of a head in up, got ", value_width);
  const Element element = element_of(kOp, mixed);
  Tensor out = torch::stable::new_empty(mixed, {rows, heads * value_width});
  const LatentValues task{
      .mixed = mixed.const_data_ptr(),
      .up = up.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .heads = heads,
      .rank = rank,
      .up_rows = up.size(1),
      .value_width = value_width,
  };
  const int64_t work = heads * rank * value_width + 1;
  torch::stable::parallel_for(0, rows, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(latent_values_rows)(task, element, begin, end);
  });
  return out;
}

}  // namespace r1
