#include "linear_rows/cpu.h"

#include "common/multiply_rows.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
void multiply(const LinearRows& linear, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(linear.weight) + begin * linear.depth;
  for (int64_t start = 0; start < linear.rows; start += kLinearRows) {
    const int64_t rows = linear.rows - start < kLinearRows ? linear.rows - start : kLinearRows;
    const T* left[kLinearRows];
    T* out[kLinearRows];
    for (int64_t i = 0; i < rows; ++i) {
      left[i] = static_cast<const T*>(linear.x) + (start + i) * linear.x_stride;
      out[i] = static_cast<T*>(linear.out) + (start + i) * linear.columns + begin;
    }
    multiply_rows(left, rows, weight, end - begin, linear.depth, weight, out);
  }
}

}  // namespace

void linear_columns(const LinearRows& linear, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) multiply<float>(linear, begin, end);
  if (element == Element::bfloat16) multiply<Bfloat16>(linear, begin, end);
  if (element == Element::float64) multiply<double>(linear, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
