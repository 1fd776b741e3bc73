#include "mixture/cpu.h"

#include "common/dot_tile.h"
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

// out(l, r) = left[l] . right row r for all `count` left rows and kRight right ones. Past the last right row its
// results are not stored.
template <class T, int kLeft>
void tile(const T* const* left, const T* const* right, int64_t depth, int64_t rights, Real<T>* const* out) {
  constexpr int kRight = kLanes<T> / kLeft;
  const auto dots = dot_tile<kLeft>(left, right, depth);
  if (rights >= kRight) {
    store_tile<kLeft>(dots, out);
  } else {
    for (int l = 0; l < kLeft; ++l)
      for (int64_t r = 0; r < rights; ++r) out[l][r] = dots[l * kRight + r];
  }
}

template <class T>
inline void fetch(const T* from, int64_t count) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// out[row][column] = left[row] . weight row `column`. A weight row is in the L1 cache while all rows meet it, and the
// next ones are fetched meanwhile, at the end those of `then`.
template <class T>
void multiply(const T* const* left, int64_t rows, const T* weight, int64_t columns, int64_t depth, const T* then,
              Real<T>* const* out) {
  // As many rows share a register of the weight as there are, at most kMost.
  constexpr int kMost = kLanes<T> < 4 ? kLanes<T> : 4;
  constexpr int64_t kColumns = kLanes<T>;  // that the narrowest tile takes
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t row = 0, taken; row < rows; row += taken) {
      const int64_t count = rows - row;
      taken = count >= kMost ? kMost : count >= 2 ? 2 : 1;
      const int64_t step = kLanes<T> / taken, end = smaller(columns, column + kColumns);
      for (int64_t c = column; c < end; c += step) {
        const T* right[kLanes<T>];
        Real<T>* to[kMost];
        for (int64_t i = 0; i < step; ++i) right[i] = weight + smaller(c + i, columns - 1) * depth;
        for (int64_t i = 0; i < taken; ++i) to[i] = out[row + i] + c;
        const auto f = taken == 1 ? tile<T, 1> : taken == 2 ? tile<T, 2> : tile<T, kMost>;
        if (row == 0) {
          const int64_t soon = c + kColumns;
          fetch(soon < columns ? weight + soon * depth : then + (soon - columns) * depth, step * depth);
        }
        f(left + row, right, depth, columns - c, to);
      }
    }
  }
}

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
    multiply(left, rows, w1, 2 * width, hidden, w2, out);
    for (int64_t i = 0; i < rows; ++i) {
      activate<T>(h + i * 2 * width, mixture.gates[choices[i]], width, a + i * width);
      left[i] = a + i * width;
      out[i] = static_cast<Real<T>*>(mixture.parts) + choices[i] * hidden;
    }
    multiply(left, rows, w2, hidden, width, w1 + 2 * width * hidden, out);
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
