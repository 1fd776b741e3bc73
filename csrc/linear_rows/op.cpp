#include "linear_rows/op.h"

#include "linear_rows/cpu.h"

namespace r1 {

static constexpr const char* kOp = "linear_rows";
// Multiply-adds that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 19;

Tensor linear_rows_cpu(const Tensor& x, const Tensor& weight) {
  check_rows(kOp, "x", x, x, {-1, -1});
  const int64_t rows = x.size(0), depth = x.size(1);
  check_tensor(kOp, "weight", weight, x, {-1, depth});
  R1_CHECK(weight.scalar_type() == x.scalar_type(), kOp, ": weight must have the dtype of x (",
           name_of(x.scalar_type()), "), got ", describe(weight));
  const Element element = element_of(kOp, x);
  Tensor out = torch::stable::new_empty(x, {rows, weight.size(0)});
  const LinearRows linear{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .rows = rows,
      .columns = weight.size(0),
      .depth = depth,
      .x_stride = x.stride(0),
  };
  torch::stable::parallel_for(0, linear.columns, kGrain / (rows * depth + 1) + 1,
                              [&](int64_t begin, int64_t end) { R1_CPU(linear_columns)(linear, element, begin, end); });
  return out;
}

}  // namespace r1
