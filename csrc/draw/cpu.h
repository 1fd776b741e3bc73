#pragma once

#include "common/cpu.h"
#include "common/element.h"

namespace r1 {

struct Draw {
  const void* logits;   // [rows, columns], of which the first num_real are read
  const int64_t* keys;  // [rows]
  double* out;          // [rows, 5]
  int64_t columns, num_real, vocab_start;
  float temperature;
};

R1_DECLARE_CPU(void draw_rows(const Draw& draw, Element element, int64_t begin, int64_t end))

}  // namespace r1
