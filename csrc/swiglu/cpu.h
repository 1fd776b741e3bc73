#pragma once

#include "common/cpu.h"
#include "common/element.h"
#include "swiglu/math.h"

namespace r1 {

// Rows [begin, end). The tensors' elements are `element`, those of probs and dprobs `prob`: the same, or float32.
R1_DECLARE_CPU(void swiglu_rows(const SwigluTensors& tensors, Element element, Element prob, int64_t begin,
                                int64_t end))
R1_DECLARE_CPU(void swiglu_backward_rows(const SwigluTensors& tensors, Element element, Element prob, int64_t begin,
                                         int64_t end))

}  // namespace r1
