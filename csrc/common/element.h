#pragma once

#include <stdint.h>

namespace r1 {

// A tensor's element type where torch's headers are not included; the value is its size in bytes.
enum class Element : int64_t { bfloat16 = 2, float32 = 4, float64 = 8 };

static inline int64_t size_of(Element element) { return static_cast<int64_t>(element); }

}  // namespace r1
