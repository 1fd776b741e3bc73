// The CUDA entries of the grouped GEMM: checks, allocation, the launch. No host sync: the offsets stay on the device.
//
// What is assumed and not checked, because the device alone knows it: offsets do not decrease and end within the rows.
// Offsets that break this give wrong values, never an access outside of the tensors.
#ifdef R1_WITH_CUDA

#include "grouped_gemm/checks.h"
#include "grouped_gemm/cuda.h"
#include "grouped_gemm/op.h"

namespace r1 {

using grouped_gemm::Problem;
using grouped_gemm::Product;

static void launch(const char* op, Product product, const GroupedShape& shape, const Tensor& left, const Tensor& right,
                   const Tensor& offsets, const Tensor& out, bool accumulate) {
  constexpr int64_t kMaxSize = (int64_t(1) << 31) - 1024;
  const auto dtype = left.scalar_type();
  R1_CHECK(left.is_cuda(), op, ": CUDA tensors expected");
  R1_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op,
           ": float32 or bfloat16 expected on CUDA, got ", name_of(dtype));
  R1_CHECK(shape.experts <= grouped_gemm::kMaxExperts, op, ": at most ", grouped_gemm::kMaxExperts,
           " experts on CUDA, got ", shape.experts);
  R1_CHECK(shape.rows <= kMaxSize && shape.n <= kMaxSize && shape.k <= kMaxSize, op,
           ": sizes below 2^31 expected on CUDA, got M=", shape.rows, " N=", shape.n, " K=", shape.k);
  Problem problem = {};
  problem.product = product;
  problem.rows = shape.rows;
  problem.experts = shape.experts;
  problem.n = shape.n;
  problem.k = shape.k;
  problem.left = left.data_ptr();
  problem.right = right.data_ptr();
  problem.offsets = offsets.data_ptr();
  problem.out = out.data_ptr();
  problem.bfloat16_operands = dtype == ScalarType::BFloat16;
  problem.bfloat16_out = out.scalar_type() == ScalarType::BFloat16;
  problem.wide_offsets = offsets.scalar_type() == ScalarType::Long;
  problem.accumulate = accumulate;
  const torch::stable::accelerator::DeviceGuard guard(left.get_device_index());
  check_cuda(op, r1_grouped_gemm(&problem, cuda_stream(left)));
}

Tensor grouped_mm_cuda(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  const GroupedShape shape = check_grouped_mm(x, weight, offsets);
  Tensor y = torch::stable::new_empty(x, {shape.rows, shape.n});
  launch("grouped_mm", Product::forward, shape, x, weight, offsets, y, false);
  return y;
}

Tensor grouped_mm_dgrad_cuda(const Tensor& dy, const Tensor& weight, const Tensor& offsets) {
  const GroupedShape shape = check_grouped_mm_dgrad(dy, weight, offsets);
  Tensor dx = torch::stable::new_empty(dy, {shape.rows, shape.k});
  launch("grouped_mm_dgrad", Product::dgrad, shape, dy, weight, offsets, dx, false);
  return dx;
}

void grouped_mm_wgrad_cuda(const Tensor& dy, const Tensor& x, const Tensor& offsets, Tensor out, bool accumulate) {
  const GroupedShape shape = check_grouped_mm_wgrad(dy, x, offsets, out);
  launch("grouped_mm_wgrad", Product::wgrad, shape, dy, x, offsets, out, accumulate);
}

}  // namespace r1

#endif  // R1_WITH_CUDA
