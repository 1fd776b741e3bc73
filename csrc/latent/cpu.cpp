#include "latent/cpu.h"

#include "common/multiply_rows.h"
#include "common/rms_norm.h"
#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
using Real = typename Arithmetic<T>::Real;
template <class T>
using Vector = typename Arithmetic<T>::Vector;
template <class T>
constexpr int kLanes = Arithmetic<T>::kLanes;

constexpr int64_t kTileRows = 4;
constexpr int kTileVectors = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float value(float x) { return x; }
inline double value(double x) { return x; }
inline float value(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float real;
  __builtin_memcpy(&real, &bits, sizeof real);
  return real;
}

// Pairs (2i, 2i + 1) in, halves out.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, int64_t width, T* to) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kLanes<T>) {
    const int64_t count = smaller(half - i, kLanes<T>);
    Real<T> first[kLanes<T>], second[kLanes<T>];
    for (int64_t lane = 0; lane < count; ++lane) {
      const Real<T> even = value(x[2 * (i + lane)]), odd = value(x[2 * (i + lane) + 1]);
      const Real<T> c = value(cos[i + lane]), s = value(sin[i + lane]);
      first[lane] = even * c - odd * s;
      second[lane] = odd * c + even * s;
    }
    store_numbers(first, count, to + i);
    store_numbers(second, count, to + half + i);
  }
}

// out[row][r ...] = sum over n of query[row][n] up[n][r ...], kVectors vectors of r, the last `count` numbers wide.
template <class T, int kVectors>
void absorb(const T* const* query, const T* up, int64_t nope, int64_t rank, T* const* out, int64_t rows,
            int64_t count) {
  Vector<T> sum[kTileRows][kVectors] = {};
  for (int64_t n = 0; n < nope; ++n, up += rank) {
    Vector<T> weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      weight[v] = count < kLanes<T> ? load_first(up, count, 0) : load(up + v * kLanes<T>);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) {
      const Vector<T> q = Vector<T>{} + value(query[i][n]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += q * weight[v];
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v)
      count < kLanes<T> ? store_first(out[i], count, sum[i][v]) : store(out[i] + v * kLanes<T>, sum[i][v]);
}

template <class T>
void query_rows(const LatentQuery& latent, int64_t begin, int64_t end) {
  const int64_t nope = latent.nope, rope = latent.rope, rank = latent.rank, heads = latent.heads;
  const int64_t query_width = nope + rope, out_width = rank + rope;
  const auto at = [](const void* tensor, int64_t index) { return static_cast<const T*>(tensor) + index; };
  for (int64_t row = begin; row < end; ++row) {
    const T *cos = at(latent.cos, row * (rope / 2)), *sin = at(latent.sin, row * (rope / 2));
    for (int64_t h = row * heads; h < (row + 1) * heads; ++h)
      rotate(at(latent.query, h * query_width + nope), cos, sin, rope,
             static_cast<T*>(latent.out) + h * out_width + rank);
    if (row >= latent.num_cached) continue;
    const T* own = at(latent.latent, row * latent.latent_stride);
    T* kept = static_cast<T*>(latent.cache) + latent.cache_rows[row] * out_width;
    rms_norm_row(own, at(latent.norm_weight, 0), latent.eps, rank, kept);
    rotate(own + rank, cos, sin, rope, kept + rank);
  }
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t rows = smaller(end - row, kTileRows);
      const T* query[kTileRows];
      T* out[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t h = smaller(row + i, end - 1) * heads + head;
        query[i] = at(latent.query, h * query_width);
        out[i] = static_cast<T*>(latent.out) + h * out_width;
      }
      const T* up = at(latent.up, head * latent.up_rows * rank);
      for (int64_t r = 0, width; r < rank; r += width) {
        const bool many = rank - r >= kTileVectors * kLanes<T>;
        width = many ? kTileVectors * kLanes<T> : smaller(rank - r, kLanes<T>);
        const auto f = many ? absorb<T, kTileVectors> : absorb<T, 1>;
        f(query, up + r, nope, rank, out, rows, smaller(width, kLanes<T>));
        for (auto& to : out) to += width;
      }
    }
}

template <class T>
void values_rows(const LatentValues& latent, int64_t begin, int64_t end) {
  constexpr int kLeft = kLanes<T> < 4 ? kLanes<T> : 4, kRight = kLanes<T> / kLeft;
  const int64_t rank = latent.rank, width = latent.value_width, heads = latent.heads;
  for (int64_t head = 0; head < heads; ++head) {
    // The values' rows stand behind those of the keys.
    const T* up = static_cast<const T*>(latent.up) + ((head + 1) * latent.up_rows - width) * rank;
    for (int64_t row = begin; row < end; row += kLeft)
      for (int64_t column = 0; column < width; column += kRight) {
        const T *left[kLeft], *right[kRight];
        for (int i = 0; i < kLeft; ++i)
          left[i] = static_cast<const T*>(latent.mixed) + (smaller(row + i, end - 1) * heads + head) * rank;
        for (int j = 0; j < kRight; ++j) right[j] = up + smaller(column + j, width - 1) * rank;
        const Vector<T> dots = dot_tile<kLeft>(left, right, rank);
        const auto* numbers = reinterpret_cast<const Real<T>*>(&dots);
        for (int64_t i = 0; i < smaller(kLeft, end - row); ++i)
          store_numbers(numbers + i * kRight, smaller(kRight, width - column),
                        static_cast<T*>(latent.out) + ((row + i) * heads + head) * width + column);
      }
  }
}

}  // namespace

void latent_query_rows(const LatentQuery& latent, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) query_rows<float>(latent, begin, end);
  if (element == Element::bfloat16) query_rows<Bfloat16>(latent, begin, end);
  if (element == Element::float64) query_rows<double>(latent, begin, end);
}

void latent_values_rows(const LatentValues& latent, Element element, int64_t begin, int64_t end) {
  if (element == Element::float32) values_rows<float>(latent, begin, end);
  if (element == Element::bfloat16) values_rows<Bfloat16>(latent, begin, end);
  if (element == Element::float64) values_rows<double>(latent, begin, end);
}

}  // namespace r1::R1_CPU_NAMESPACE
