#include "swiglu/cpu.h"

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

// A vector of the row's elements from `column` on. Past the end of the row it is filled with zeros, which contribute
// nothing: the last elements go through the same instructions as all others.
template <class T>
inline auto load_columns(const T* row, int64_t column, int64_t width) {
  constexpr int kLanes = Arithmetic<T>::kLanes;
  return column + kLanes <= width ? load(row + column) : load_first(row + column, width - column, 0);
}

template <class T>
inline void store_columns(T* row, int64_t column, int64_t width, typename Arithmetic<T>::Vector values) {
  constexpr int kLanes = Arithmetic<T>::kLanes;
  column + kLanes <= width ? store(row + column, values) : store_first(row + column, width - column, values);
}

template <class Vector>
inline Vector exp_of_minus_abs(Vector x) {
  return exp(at_least_floor(x < 0 ? x : -x));
}

template <class T, class P>
void forward(const SwigluTensors& tensors, int64_t begin, int64_t end) {
  using Vector = typename Arithmetic<T>::Vector;
  using Real = typename Arithmetic<T>::Real;
  const auto* probs = static_cast<const P*>(tensors.probs);
  const int64_t width = tensors.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* gates = static_cast<const T*>(tensors.h) + row * 2 * width;
    const T* ups = gates + width;
    T* a = static_cast<T*>(tensors.a) + row * width;
    const Vector prob = Vector{} + (probs == nullptr ? Real(1) : Real(load_first(probs + row, 1, 0)[0]));
    for (int64_t f = 0; f < width; f += Arithmetic<T>::kLanes) {
      const Vector gate = load_columns(gates, f, width), up = load_columns(ups, f, width);
      store_columns(a, f, width, swiglu_activation(gate, up, prob, exp_of_minus_abs(gate)));
    }
  }
}

template <class T, class P>
void backward(const SwigluTensors& tensors, int64_t begin, int64_t end) {
  using Vector = typename Arithmetic<T>::Vector;
  using Real = typename Arithmetic<T>::Real;
  const auto* probs = static_cast<const P*>(tensors.probs);
  const int64_t width = tensors.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* gates = static_cast<const T*>(tensors.h) + row * 2 * width;
    const T* ups = gates + width;
    const T* da = static_cast<const T*>(tensors.da) + row * width;
    T* a = static_cast<T*>(tensors.a) + row * width;
    T* dgates = static_cast<T*>(tensors.dh) + row * 2 * width;
    T* dups = dgates + width;
    const Vector prob = Vector{} + (probs == nullptr ? Real(1) : Real(load_first(probs + row, 1, 0)[0]));
    Vector dprob = {};
    for (int64_t f = 0; f < width; f += Arithmetic<T>::kLanes) {
      const Vector gate = load_columns(gates, f, width), up = load_columns(ups, f, width);
      const auto gradient = swiglu_gradient(gate, up, load_columns(da, f, width), prob, exp_of_minus_abs(gate));
      store_columns(dgates, f, width, gradient.gate);
      store_columns(dups, f, width, gradient.up);
      store_columns(a, f, width, gradient.activation);
      dprob += gradient.prob;
    }
    if (probs == nullptr) continue;
    using ProbVector = typename Arithmetic<P>::Vector;
    using ProbReal = typename Arithmetic<P>::Real;
    store_first(static_cast<P*>(tensors.dprobs) + row, 1, ProbVector{} + ProbReal(sum_of_lanes(dprob)));
  }
}

// Calls f(T{}, P{}) for the element types of the tensors and of the probabilities.
template <class F>
void for_elements(Element element, Element prob, F f) {
  const bool same = element == prob;
  if (element == Element::float32) f(float{}, float{});
  if (element == Element::bfloat16) same ? f(Bfloat16{}, Bfloat16{}) : f(Bfloat16{}, float{});
  if (element == Element::float64) same ? f(double{}, double{}) : f(double{}, float{});
}

}  // namespace

void swiglu_rows(const SwigluTensors& tensors, Element element, Element prob, int64_t begin, int64_t end) {
  for_elements(element, prob, [&](auto t, auto p) { forward<decltype(t), decltype(p)>(tensors, begin, end); });
}

void swiglu_backward_rows(const SwigluTensors& tensors, Element element, Element prob, int64_t begin, int64_t end) {
  for_elements(element, prob, [&](auto t, auto p) { backward<decltype(t), decltype(p)>(tensors, begin, end); });
}

}  // namespace r1::R1_CPU_NAMESPACE
