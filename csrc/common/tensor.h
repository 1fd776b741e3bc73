// What every op.cpp needs of torch: tensors, checks that print got and expected, the CUDA stream. Stable ABI only.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <optional>
#include <string>

#include "common/element.h"

namespace r1 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* name_of(ScalarType dtype);

// "[3, 4] float32"
std::string describe(const Tensor& tensor);

// R1_CHECK(x.dim() == 2, "grouped_mm: x must be [M, K], got ", describe(x));
#define R1_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

// Raises unless `tensor` is contiguous, on `like`'s device and of shape `sizes`; -1 stands for any size.
void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                  std::initializer_list<int64_t> sizes);

// The same for a matrix whose rows may stand apart, as a slice of columns leaves them.
void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                std::initializer_list<int64_t> sizes);

// Calls f(float{}), f(double{}) or f(BFloat16{}) according to `dtype`; raises for any other.
template <class F>
void for_dtype(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float)
    f(float{});
  else if (dtype == ScalarType::BFloat16)
    f(torch::headeronly::BFloat16{});
  else if (dtype == ScalarType::Double)
    f(double{});
  else
    R1_CHECK(false, op, ": float32, bfloat16 or float64 expected, got ", name_of(dtype));
}

// Raises unless `tensor` is float32, bfloat16 or float64.
Element element_of(const char* op, const Tensor& tensor);

#ifdef R1_WITH_CUDA
// The current CUDA stream of `tensor`'s device, as a cudaStream_t.
void* cuda_stream(const Tensor& tensor);

// Raises with CUDA's own message unless `code` (a cudaError_t) is 0.
void check_cuda(const char* op, int code);
#endif

}  // namespace r1
