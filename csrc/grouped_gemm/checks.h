// The argument checks that the CPU and the CUDA entries share.
#pragma once

#include "common/tensor.h"

namespace r1 {

// x [M, K] @ weight [E, N, K] -> [M, N], rows split at offsets [E].
struct GroupedShape {
  int64_t rows, experts, n, k;
};

inline void check_offsets(const char* op, const Tensor& offsets, const Tensor& like, int64_t experts) {
  check_tensor(op, "offsets", offsets, like, {experts});
  const auto dtype = offsets.scalar_type();
  R1_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": offsets must be int32 or int64, got ",
           describe(offsets));
}

inline void check_same_dtype(const char* op, const Tensor& a, const Tensor& b) {
  R1_CHECK(a.scalar_type() == b.scalar_type(), op, ": both operands need one dtype, got ", describe(a), " and ",
           describe(b));
}

inline GroupedShape check_grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  check_tensor("grouped_mm", "x", x, x, {-1, -1});
  check_tensor("grouped_mm", "weight", weight, x, {-1, -1, x.size(1)});
  check_same_dtype("grouped_mm", x, weight);
  check_offsets("grouped_mm", offsets, x, weight.size(0));
  return {x.size(0), weight.size(0), weight.size(1), weight.size(2)};
}

inline GroupedShape check_grouped_mm_dgrad(const Tensor& dy, const Tensor& weight, const Tensor& offsets) {
  check_tensor("grouped_mm_dgrad", "dy", dy, dy, {-1, -1});
  check_tensor("grouped_mm_dgrad", "weight", weight, dy, {-1, dy.size(1), -1});
  check_same_dtype("grouped_mm_dgrad", dy, weight);
  check_offsets("grouped_mm_dgrad", offsets, dy, weight.size(0));
  return {dy.size(0), weight.size(0), weight.size(1), weight.size(2)};
}

inline GroupedShape check_grouped_mm_wgrad(const Tensor& dy, const Tensor& x, const Tensor& offsets,
                                           const Tensor& out) {
  check_tensor("grouped_mm_wgrad", "dy", dy, dy, {-1, -1});
  check_tensor("grouped_mm_wgrad", "x", x, dy, {dy.size(0), -1});
  check_tensor("grouped_mm_wgrad", "out", out, dy, {-1, dy.size(1), x.size(1)});
  check_same_dtype("grouped_mm_wgrad", dy, x);
  check_offsets("grouped_mm_wgrad", offsets, dy, out.size(0));
  R1_CHECK(out.scalar_type() == ScalarType::Float || out.scalar_type() == x.scalar_type(),
           "grouped_mm_wgrad: out must be float32 or have the dtype of x (", name_of(x.scalar_type()), "), got ",
           describe(out));
  return {dy.size(0), out.size(0), dy.size(1), x.size(1)};
}

}  // namespace r1
