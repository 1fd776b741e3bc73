#include "rms_norm/op.h"

#include "rms_norm/cpu.h"

namespace r1 {

using torch::stable::new_empty;

static constexpr const char* kOp = "rms_norm";
// Elements that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 15;

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps,
                                        std::optional<Tensor> residual) {
  check_rows(kOp, "x", x, x, {-1, -1});
  const int64_t rows = x.size(0), width = x.size(1);
  check_tensor(kOp, "weight", weight, x, {width});
  if (residual.has_value()) check_tensor(kOp, "residual", *residual, x, {rows, width});
  for (const Tensor& tensor : {weight, residual.value_or(weight)})
    R1_CHECK(tensor.scalar_type() == x.scalar_type(), kOp, ": weight and residual must have the dtype of x (",
             name_of(x.scalar_type()), "), got ", describe(tensor));
  const Element element = element_of(kOp, x);
  Tensor normed = new_empty(x, {rows, width});
  Tensor summed = residual.has_value() ? new_empty(x, {rows, width}) : new_empty(x, {0});
  const RmsNorm norm{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .residual = residual.has_value() ? residual->const_data_ptr() : nullptr,
      .normed = normed.mutable_data_ptr(),
      .summed = summed.mutable_data_ptr(),
      .x_stride = x.stride(0),
      .width = width,
      .eps = eps,
  };
  torch::stable::parallel_for(0, rows, kGrain / (width + 1) + 1,
                              [&](int64_t begin, int64_t end) { R1_CPU(rms_norm_rows)(norm, element, begin, end); });
  return {normed, summed};
}

}  // namespace r1
