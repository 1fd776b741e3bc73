#include "mixture/cpu.h"

#include "common/multiply_rows.h"
#include "common/vector_math.h"
#include "swiglu/math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
using Real = typename Arithmetic<T>::Real;
template <class T>
using Vector = typename Arithmetic<T>::Vector;
template <class T>
constexpr int kLanes = Arithmetic<T>::kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void activate(const Real<T>* h, Real<T> gate_of_expert, int64_t width, T* a) {
  for (int64_t f = 0; f < width; f += kLanes<T>) {
    const int64_t count = smaller(width - f, kLanes<T>);
    const bool whole = count == kLanes<T>;
    const Vector<T> gate = whole ? load(h + f) : load_first(h + f, count, 0);
    const Vector<T> up = whole ? load(h + width + f) : load_first(h + width + f, count, 0);
    const Vector<T> e = exp(at_least_floor(gate < 0 ? gate : -gate));
    const Vector<T> activation = swiglu_activation(gate, up, Vector<T>{} + gate_of_expert, e);
    whole ? store(a + f, activation) : store_first(a + f, count, activation);
  }
}

template <class T>
void parts_of(const Mixture& mixture, int64_t expert, const int64_t* choices, int64_t count, void* memory) {
  const int64_t hidden = mixture.hidden, width = mixture.width;
  const T* w1 = static_cast<const T*>(mixture.w1) + expert * 2 * width * hidden;
  const T* w2 = static_cast<const T*>(mixture.w2) + expert * hidden * width;
  auto* h = static_cast<Real<T>*>(memory);
  auto* a = reinterpret_cast<T*>(h + kExpertRows * 2 * width);
  for (int64_t start = 0; start < count; start += kExpertRows, choices += kExpertRows) {
    const int64_t rows = smaller(count - start, kExpertRows);
    const T* left[kExpertRows];
    Real<T>* out[kExpertRows];
    for (int64_t i = 0; i < rows; ++i) {
      left[i] = static_cast<const T*>(mixture.x) + choices[i] / mixture.topk * hidden;
      out[i] = h + i * 2 * width;
    }
    multiply_rows(left, rows, w1, 2 * width, hidden, w2, out);
    for (int64_t i = 0; i < rows; ++i) {
      activate<T>(h + i * 2 * width, mixture.gates[choices[i]], width, a + i * width);
      left[i] = a + i * width;
      out[i] = static_cast<Real<T>*>(mixture.parts) + choices[i] * hidden;
    }
    multiply_rows(left, rows, w2, hidden, width, w1 + 2 * width * hidden, out);
  }
}

template <class T>
void sum(const Mixture& mixture, int64_t begin, int64_t end) {
  const int64_t hidden = mixture.hidden, topk = mixture.topk;
  for (int64_t token = begin; token < end; ++token) {
    const Real<T>* parts = static_cast<const Real<T>*>(mixture.parts) + token * topk * hidden;
    T* out = static_cast<T*>(mixture.out) + token * hidden;
    for (int64_t c = 0; c < hidden; c += kLanes<T>) {
      const int64_t count = smaller(hidden - c, kLanes<T>);
      Vector<T> total = {};
      for (int64_t k = 0; k < topk; ++k) {
        const int64_t expert = mixture.experts[token * topk + k] - mixture.first_expert;
        if (expert < 0 || expert >= mixture.num_experts) continue;
        const Real<T>* part = parts + k * hidden + c;
        total += count == kLanes<T> ? load(part) : load_first(part, count, 0);
      }
      count == kLanes<T> ? store(out + c, total) : store_first(out + c, count, total);
    }
  }
}

}  // namespace

void expert_parts(const Mixture& mixture, Element element, int64_t expert, const int64_t* choices, int64_t count,
                  void* scratch) {
  if (element == Element::float32) parts_of<float>(mixture, expert, choices, count, scratch);
  if (element == Element::bfloat16) parts_of<Bfloat16>(mixture, expert, choices, count, scratch);
  if (element == Element::float64) parts_of<double>(mixture, expert, choices, count, scratch);
}

void sum_parts(const Mixture& mixture, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) sum<float>(mixture, begin, end);
  if (element == Element::bfloat16) sum<Bfloat16>(mixture, begin, end);
  if (element == Element::float64) sum<double>(mixture, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
