#include "paged_attention/op.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "paged_attention/cpu.h"
#ifdef R1_WITH_CUDA
#include "paged_attention/cuda.h"
#endif

namespace r1 {
namespace {

constexpr const char* kOp = "paged_attention";
// Below this many multiply-adds, waking other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 20;

PagedAttention check(const Tensor& query, const Tensor& cache, const Tensor& page_table, const Tensor& lengths,
                     int64_t num_groups, int64_t value_start, int64_t value_width, double scale) {
  check_tensor(kOp, "query", query, query, {-1, -1, -1});
  const int64_t rows = query.size(0), heads = query.size(1), key_width = query.size(2);
  check_tensor(kOp, "cache", cache, query, {-1, -1, -1});
  R1_CHECK(cache.scalar_type() == query.scalar_type(), kOp, ": cache must have the dtype of query (",
           name_of(query.scalar_type()), "), got ", describe(cache));
  check_tensor(kOp, "page_table", page_table, query, {rows, -1});
  check_tensor(kOp, "lengths", lengths, query, {rows});
  for (const Tensor* tensor : {&page_table, &lengths})
    R1_CHECK(tensor->scalar_type() == ScalarType::Int, kOp, ": page_table and lengths must be int32, got ",
             describe(*tensor));
  R1_CHECK(num_groups > 0 && heads % num_groups == 0, kOp, ": num_groups must divide the ", heads, " heads, got ",
           num_groups);
  const int64_t row_width = cache.size(2);
  R1_CHECK(num_groups * key_width <= row_width, kOp, ": the keys of ", num_groups, " groups, ", key_width,
           " numbers each, do not fit into cache ", describe(cache));
  R1_CHECK(value_start >= 0 && value_width >= 0 && value_start + num_groups * value_width <= row_width, kOp,
           ": the values of ", num_groups, " groups, ", value_width, " numbers each from ", value_start,
           " on, do not fit into cache ", describe(cache));
  return {
      .query = query.const_data_ptr(),
      .cache = cache.const_data_ptr(),
      .page_table = static_cast<const int32_t*>(page_table.const_data_ptr()),
      .lengths = static_cast<const int32_t*>(lengths.const_data_ptr()),
      .out = nullptr,
      .rows = rows,
      .groups = num_groups,
      .heads = heads / num_groups,
      .key_width = key_width,
      .value_width = value_width,
      .value_start = value_start,
      .row_width = row_width,
      .page_size = cache.size(1),
      .max_pages = page_table.size(1),
      .scale = scale,
  };
}

// The positions of all rows together. Raises where a row would leave its table or the cache.
int64_t check_pages(const PagedAttention& attention, int64_t num_pages) {
  const int64_t most = attention.max_pages * attention.page_size;
  int64_t positions = 0;
  for (int64_t row = 0; row < attention.rows; ++row) {
    const int64_t length = attention.lengths[row];
    R1_CHECK(length >= 0 && length <= most, kOp, ": lengths[", row, "] = ", length, ", but the page table has ",
             attention.max_pages, " pages of ", attention.page_size, " positions a row");
    for (int64_t page = 0; page * attention.page_size < length; ++page) {
      const int64_t at = attention.page_table[row * attention.max_pages + page];
      R1_CHECK(at >= 0 && at < num_pages, kOp, ": page_table[", row, ", ", page, "] = ", at, ", but the cache has ",
               num_pages, " pages");
    }
    positions += length;
  }
  return positions;
}

}  // namespace

Tensor paged_attention_cpu(const Tensor& query, const Tensor& cache, const Tensor& page_table, const Tensor& lengths,
                           int64_t num_groups, int64_t value_start, int64_t value_width, double scale) {
  auto attention = check(query, cache, page_table, lengths, num_groups, value_start, value_width, scale);
  const Element element = element_of(kOp, query);
  const int64_t positions = check_pages(attention, cache.size(0));
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), value_width});
  attention.out = out.mutable_data_ptr();

  const int64_t head_blocks = (attention.heads + kAttentionHeads - 1) / kAttentionHeads;
  const int64_t tasks = attention.rows * attention.groups * head_blocks;
  const int64_t work = positions * query.size(1) * (attention.key_width + value_width);
  const int64_t num_threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, num_threads), 1, [&](int64_t, int64_t) {
    constexpr std::align_val_t kAlignment{64};
    const auto release = [](void* memory) { ::operator delete(memory, kAlignment); };
    const std::unique_ptr<void, decltype(release)> scratch(
        ::operator new(paged_attention_scratch_bytes(attention), kAlignment), release);
    for (int64_t i; (i = next++) < tasks;)
      R1_CPU(paged_attention_heads)(attention, element, i / (attention.groups * head_blocks),
                                    i / head_blocks % attention.groups, i % head_blocks * kAttentionHeads,
                                    scratch.get());
  });
  return out;
}

#ifdef R1_WITH_CUDA
Tensor paged_attention_cuda(const Tensor& query, const Tensor& cache, const Tensor& page_table, const Tensor& lengths,
                            int64_t num_groups, int64_t value_start, int64_t value_width, double scale) {
  auto attention = check(query, cache, page_table, lengths, num_groups, value_start, value_width, scale);
  const auto dtype = query.scalar_type();
  R1_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp,
           ": float32 or bfloat16 expected on CUDA, got ", describe(query));
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), value_width});
  attention.out = out.mutable_data_ptr();
  check_cuda(kOp, r1_paged_attention_cuda(&attention, dtype == ScalarType::BFloat16, cuda_stream(query)));
  return out;
}
#endif

}  // namespace r1
