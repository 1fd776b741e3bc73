// Softmax online over blocks of positions (Milakov and Gimelshein, arXiv 1805.02867): a block's cache rows are read for
// all heads of a group while they are in the L1 cache, first as keys, then as values.
//
// Determinism: a head's result is decided by its query and by the numbers at its positions, in their order. Blocks
// begin at multiples of kAttentionPositions, whatever the pages, and a score is the same tree of sums wherever it is
// computed.
#include "paged_attention/cpu.h"

#include "common/dot_tile.h"
#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
using Real = typename Arithmetic<T>::Real;
template <class T>
using Vector = typename Arithmetic<T>::Vector;
template <class T>
constexpr int kLanes = Arithmetic<T>::kLanes;

constexpr int kTileVectors = 4;  // of values that stay in registers, for each head of a tile

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one task keeps: of each head a query in whole vectors, the scores of a block, and the running sums.
template <class T>
struct Scratch {
  int64_t query_stride, sum_stride;
  Real<T>*query, *scores, *sums;

  Scratch(const PagedAttention& attention, void* memory)
      : query_stride(rounded_up(attention.key_width, kLanes<T>)),
        sum_stride(rounded_up(attention.value_width, kLanes<T>)),
        query(static_cast<Real<T>*>(memory)),
        scores(query + kAttentionHeads * query_stride),
        sums(scores + kAttentionHeads * kAttentionPositions) {}
};

// Where the keys and the values of the next positions of a row lie.
template <class T>
struct Tokens {
  const T *keys[kAttentionPositions], *values[kAttentionPositions];
  int64_t count = 0;

  Tokens(const PagedAttention& attention, int64_t row, int64_t group)
      : cache_(static_cast<const T*>(attention.cache) + group * attention.key_width),
        value_offset_(attention.value_start + group * (attention.value_width - attention.key_width)),
        row_width_(attention.row_width),
        page_size_(attention.page_size),
        page_(attention.page_table + row * attention.max_pages) {}

  void read(int64_t positions) {
    count = positions;
    for (int64_t p = 0; p < positions; ++p) {
      keys[p] = cache_ + (*page_ * page_size_ + offset_) * row_width_;
      values[p] = keys[p] + value_offset_;
      if (++offset_ == page_size_) offset_ = 0, ++page_;
    }
  }

 private:
  const T* cache_;
  int64_t value_offset_, row_width_, page_size_;
  const int32_t* page_;
  int64_t offset_ = 0;
};

template <class T>
inline void fetch(const T* from, int64_t width) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < width * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// Scores of kHeads queries with as many keys as make one vector of results.
template <class T, int kHeads>
void score_tile(const Real<T>* query, int64_t query_stride, const T* const* keys, int64_t width, Real<T> scale,
                Real<T>* scores) {
  const Real<T>* queries[kHeads];
  Real<T>* to[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    queries[h] = query + h * query_stride;
    to[h] = scores + h * kAttentionPositions;
  }
  store_tile<kHeads>(dot_tile<kHeads>(queries, keys, width) * scale, to);
}

// sums [kHeads, kVectors vectors] = factor * sums + weights @ values; `count` is the width of a vector cut short.
template <class T, int kHeads, int kVectors, bool kWhole = true>
void value_tile(const Real<T>* weights, const Real<T>* factors, const T* const* values, int64_t column,
                int64_t positions, Real<T>* sums, int64_t stride, int64_t count = kLanes<T>) {
  Vector<T> sum[kHeads][kVectors];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[h][v] = load(sums + h * stride + v * kLanes<T>) * factors[h];
  for (int64_t p = 0; p < positions; ++p) {
    Vector<T> value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const T* from = values[p] + column + v * kLanes<T>;
      if constexpr (kWhole)
        value[v] = load(from);
      else
        value[v] = load_first(from, count, 0);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const Vector<T> weight = Vector<T>{} + weights[h * kAttentionPositions + p];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[h][v] += weight * value[v];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + h * stride + v * kLanes<T>, sum[h][v]);
}

template <class T, int kHeads>
void add_values(const Scratch<T>& scratch, int64_t head, const Real<T>* factors, const T* const* values, int64_t width,
                int64_t positions) {
  const Real<T>* weights = scratch.scores + head * kAttentionPositions;
  Real<T>* sums = scratch.sums + head * scratch.sum_stride;
  const int64_t whole = width / kLanes<T> * kLanes<T>;
  for (int64_t column = 0, vectors; column < whole; column += vectors * kLanes<T>) {
    vectors = smaller((whole - column) / kLanes<T>, kTileVectors);
    const auto tile = vectors == 1   ? value_tile<T, kHeads, 1>
                      : vectors == 2 ? value_tile<T, kHeads, 2>
                      : vectors == 3 ? value_tile<T, kHeads, 3>
                                     : value_tile<T, kHeads, 4>;
    tile(weights, factors + head, values, column, positions, sums + column, scratch.sum_stride, kLanes<T>);
  }
  if (whole < width)
    value_tile<T, kHeads, 1, false>(weights, factors + head, values, whole, positions, sums + whole, scratch.sum_stride,
                                    width - whole);
}

// A head's softmax so far.
template <class T>
struct Softmax {
  Real<T> max = -__builtin_inf();
  Vector<T> sum = {};

  // Scores become weights relative to the largest score so far; answers what earlier weights have to be multiplied by.
  Real<T> add(Real<T>* scores, int64_t positions) {
    const int64_t end = rounded_up(positions, kLanes<T>);
    for (int64_t p = positions; p < end; ++p) scores[p] = -__builtin_inf();
    Vector<T> largest = load(scores);
    for (int64_t p = kLanes<T>; p < end; p += kLanes<T>) {
      const Vector<T> x = load(scores + p);
      largest = x > largest ? x : largest;
    }
    const Real<T> before = max, own = max_of_lanes(largest);
    max = own > before ? own : before;
    const Real<T> factor = exp(at_least_floor(Vector<T>{} + (before - max)))[0];
    sum *= factor;
    for (int64_t p = 0; p < end; p += kLanes<T>) {
      const Vector<T> weight = exp(at_least_floor(load(scores + p) - max));
      store(scores + p, weight);
      sum += weight;
    }
    return factor;
  }
};

template <class T, int kHeads>
void attend(const PagedAttention& attention, int64_t row, int64_t group, int64_t first_head, void* memory) {
  const int64_t heads = smaller(attention.heads - first_head, kAttentionHeads);
  const int64_t padded_heads = rounded_up(heads, kHeads);
  const int64_t key_width = attention.key_width, value_width = attention.value_width;
  const int64_t head = (row * attention.groups + group) * attention.heads + first_head;
  const Scratch<T> scratch(attention, memory);
  for (int64_t h = 0; h < padded_heads; ++h) {
    const T* from = static_cast<const T*>(attention.query) + (head + h) * key_width;
    for (int64_t k = 0; k < scratch.query_stride; k += kLanes<T>) {
      const int64_t count = h < heads ? smaller(key_width - k, kLanes<T>) : 0;
      store(scratch.query + h * scratch.query_stride + k,
            count == kLanes<T> ? load(from + k) : load_first(from + k, count, 0));
    }
  }
  for (int64_t i = 0; i < padded_heads * scratch.sum_stride; ++i) scratch.sums[i] = 0;

  const int64_t length = attention.lengths[row];
  const bool overlap = attention.value_start + group * value_width < (group + 1) * key_width;
  Softmax<T> softmax[kAttentionHeads];
  Tokens<T> tokens(attention, row, group), next = tokens;
  next.read(smaller(length, kAttentionPositions));
  for (int64_t start = 0; start < length; start += kAttentionPositions) {
    tokens = next;
    next.read(smaller(length - start - tokens.count, kAttentionPositions));
    const int64_t positions = tokens.count;
    constexpr int kKeys = kLanes<T> / kHeads;
    for (int64_t p = positions; p < rounded_up(positions, kKeys); ++p) tokens.keys[p] = tokens.keys[positions - 1];
    for (int64_t p = 0; p < positions; p += kKeys) {
      for (int64_t soon = p; soon < smaller(p + kKeys, next.count); ++soon) {
        fetch(next.keys[soon], key_width);
        if (!overlap) fetch(next.values[soon], value_width);
      }
      for (int64_t h = 0; h < padded_heads; h += kHeads)
        score_tile<T, kHeads>(scratch.query + h * scratch.query_stride, scratch.query_stride, tokens.keys + p,
                              key_width, attention.scale, scratch.scores + h * kAttentionPositions + p);
    }
    Real<T> factors[kAttentionHeads];
    for (int64_t h = 0; h < padded_heads; ++h)
      factors[h] = softmax[h].add(scratch.scores + h * kAttentionPositions, positions);
    for (int64_t h = 0; h < padded_heads; h += kHeads)
      add_values<T, kHeads>(scratch, h, factors, tokens.values, value_width, positions);
  }

  for (int64_t h = 0; h < heads; ++h) {
    T* out = static_cast<T*>(attention.out) + (head + h) * value_width;
    const Real<T> scale = length > 0 ? 1 / sum_of_lanes(softmax[h].sum) : 0;
    for (int64_t v = 0; v < value_width; v += kLanes<T>) {
      const Vector<T> x = load(scratch.sums + h * scratch.sum_stride + v) * scale;
      const int64_t count = smaller(value_width - v, kLanes<T>);
      count == kLanes<T> ? store(out + v, x) : store_first(out + v, count, x);
    }
  }
}

template <class T>
void attend(const PagedAttention& attention, int64_t row, int64_t group, int64_t first_head, void* memory) {
  // How many heads share a register of the cache: as many as there are, at most four.
  constexpr int kMost = kLanes<T> < 4 ? kLanes<T> : 4;
  const auto f = attention.heads == 1 ? attend<T, 1> : attention.heads == 2 ? attend<T, 2> : attend<T, kMost>;
  f(attention, row, group, first_head, memory);
}

}  // namespace

void paged_attention_heads(const PagedAttention& attention, Element element, int64_t row, int64_t group,
                           int64_t first_head, void* scratch) {
  if (element == Element::float32) attend<float>(attention, row, group, first_head, scratch);
  if (element == Element::bfloat16) attend<Bfloat16>(attention, row, group, first_head, scratch);
  if (element == Element::float64) attend<double>(attention, row, group, first_head, scratch);
}

}  // namespace r1::R1_CPU_NAMESPACE
