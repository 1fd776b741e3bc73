#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

struct RmsNorm {
  const void *x, *weight, *residual;  // [rows, width] with x_stride between rows; [width]; [rows, width] or null
  void *normed, *summed;              // [rows, width]; only with a residual [rows, width]
  int64_t x_stride, width;
  double eps;
};

R1_DECLARE_CPU(void rms_norm_rows(const RmsNorm& norm, Element element, int64_t begin, int64_t end))

}  // namespace r1
