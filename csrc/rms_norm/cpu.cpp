#include "rms_norm/cpu.h"

#include "common/rms_norm.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
void normalize(const RmsNorm& norm, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t width = norm.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(norm.x) + row * norm.x_stride;
    if (norm.residual != nullptr) {
      const T* residual = static_cast<const T*>(norm.residual) + row * width;
      T* summed = static_cast<T*>(norm.summed) + row * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t count = width - i;
        if (count >= kLanes)
          store(summed + i, load(x + i) + load(residual + i));
        else
          store_first(summed + i, count, load_first(x + i, count, 0) + load_first(residual + i, count, 0));
      }
      x = summed;
    }
    rms_norm_row(x, static_cast<const T*>(norm.weight), norm.eps, width, static_cast<T*>(norm.normed) + row * width);
  }
}

}  // namespace

void rms_norm_rows(const RmsNorm& norm, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) normalize<float>(norm, begin, end);
  if (element == Element::bfloat16) normalize<Bfloat16>(norm, begin, end);
  if (element == Element::float64) normalize<double>(norm, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
