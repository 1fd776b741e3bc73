#include "grouped_gemm/op.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "grouped_gemm/checks.h"
#include "grouped_gemm/cpu.h"

namespace r1 {
namespace {

// Below this many multiply-adds, waking other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 20;

// The bounds of the experts' rows: E + 1 numbers, from 0.
std::vector<int64_t> row_bounds(const char* op, const Tensor& offsets, int64_t rows) {
  const bool is_long = offsets.scalar_type() == ScalarType::Long;
  std::vector<int64_t> bounds(offsets.size(0) + 1, 0);
  for (size_t e = 1; e < bounds.size(); ++e) {
    bounds[e] = is_long ? static_cast<const int64_t*>(offsets.const_data_ptr())[e - 1]
                        : static_cast<const int32_t*>(offsets.const_data_ptr())[e - 1];
    R1_CHECK(bounds[e] >= bounds[e - 1] && bounds[e] <= rows, op, ": offsets must never fall nor pass M = ", rows,
             ", got offsets[", e - 1, "] = ", bounds[e], " after ", bounds[e - 1]);
  }
  return bounds;
}

// Each thread keeps its scratch: fresh pages for every call would cost more than a small product.
void* thread_scratch() {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  static thread_local std::unique_ptr<void, Free> scratch(::operator new(kGemmScratchBytes, kAlignment));
  return scratch.get();
}

const void* element_at(const Tensor& tensor, int64_t index, Element element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * size_of(element);
}

// Cuts every product into blocks and computes them. Threads take the next block when they are free, so that skewed
// loads balance; which thread computes a block does not show in its values.
void multiply(const std::vector<GemmBlock>& products, Element operands, Element result) {
  std::vector<GemmBlock> blocks;
  int64_t work = 0;
  for (const GemmBlock& product : products) {
    work += product.rows * product.columns * product.depth;
    for (int64_t i = 0; i < product.rows; i += kGemmBlockRows)
      for (int64_t j = 0; j < product.columns; j += kGemmBlockColumns) {
        GemmBlock block = product;
        block.left = static_cast<const char*>(product.left) + i * product.left_row_stride * size_of(operands);
        block.right = static_cast<const char*>(product.right) + j * product.right_column_stride * size_of(operands);
        block.out = static_cast<char*>(product.out) + (i * product.out_row_stride + j) * size_of(result);
        block.rows = std::min(kGemmBlockRows, product.rows - i);
        block.columns = std::min(kGemmBlockColumns, product.columns - j);
        blocks.push_back(block);
      }
  }
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t num_threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(num_blocks, num_threads), 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch();
    for (int64_t i; (i = next++) < num_blocks;) R1_CPU(gemm_block)(blocks[i], operands, result, scratch);
  });
}

// Forward and dgrad: an expert's rows of `left` [M, depth] times its weight, into its rows of a result [M, columns].
Tensor multiply_rows(const char* op, const Tensor& left, const Tensor& weight, const Tensor& offsets, int64_t columns,
                     int64_t column_stride, int64_t depth_stride) {
  const Element element = element_of(op, left);
  const int64_t rows = left.size(0), depth = left.size(1);
  const auto bounds = row_bounds(op, offsets, rows);
  Tensor out = torch::stable::new_empty(left, {rows, columns});
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t out_row_bytes = columns * size_of(element);
  std::vector<GemmBlock> products;
  for (size_t e = 0; e + 1 < bounds.size(); ++e)
    products.push_back({
        .left = element_at(left, bounds[e] * depth, element),
        .left_row_stride = depth,
        .left_depth_stride = 1,
        .right = element_at(weight, e * depth * columns, element),
        .right_column_stride = column_stride,
        .right_depth_stride = depth_stride,
        .out = to + bounds[e] * out_row_bytes,
        .out_row_stride = columns,
        .rows = bounds[e + 1] - bounds[e],
        .columns = columns,
        .depth = depth,
        .accumulate = false,
    });
  multiply(products, element, element);
  std::memset(to + bounds.back() * out_row_bytes, 0, (rows - bounds.back()) * out_row_bytes);
  return out;
}

}  // namespace

Tensor grouped_mm_cpu(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  const auto shape = check_grouped_mm(x, weight, offsets);
  return multiply_rows("grouped_mm", x, weight, offsets, shape.n, shape.k, 1);
}

Tensor grouped_mm_dgrad_cpu(const Tensor& dy, const Tensor& weight, const Tensor& offsets) {
  const auto shape = check_grouped_mm_dgrad(dy, weight, offsets);
  return multiply_rows("grouped_mm_dgrad", dy, weight, offsets, shape.k, 1, shape.k);
}

void grouped_mm_wgrad_cpu(const Tensor& dy, const Tensor& x, const Tensor& offsets, Tensor out, bool accumulate) {
  const auto shape = check_grouped_mm_wgrad(dy, x, offsets, out);
  const Element operands = element_of("grouped_mm_wgrad", x);
  const Element result = element_of("grouped_mm_wgrad", out);
  const auto bounds = row_bounds("grouped_mm_wgrad", offsets, shape.rows);
  std::vector<GemmBlock> products;
  for (int64_t e = 0; e < shape.experts; ++e)
    products.push_back({
        .left = element_at(dy, bounds[e] * shape.n, operands),
        .left_row_stride = 1,
        .left_depth_stride = shape.n,
        .right = element_at(x, bounds[e] * shape.k, operands),
        .right_column_stride = 1,
        .right_depth_stride = shape.k,
        .out = static_cast<char*>(out.mutable_data_ptr()) + e * shape.n * shape.k * size_of(result),
        .out_row_stride = shape.k,
        .rows = shape.n,
        .columns = shape.k,
        .depth = bounds[e + 1] - bounds[e],
        .accumulate = accumulate,
    });
  multiply(products, operands, result);
}

}  // namespace r1
