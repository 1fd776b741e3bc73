// Softmax online over blocks of positions (Milakov and Gimelshein, arXiv 1805.02867): a block's cache rows are read for
// all heads of a group while they are in the L1 cache, first as keys, then as values.
//
// Scores are computed for a tile of heads at once. A vector has a part for each head of the tile: of a query the same
// few numbers of each head, of a key one copy for each head of the numbers that meet them. So there is little left to
// add up within a vector at the end, and vectors of scores are full however few heads there are.
//
// Determinism: a head's result is decided by its query and by the numbers at its positions, in their order. Blocks
// begin at multiples of kAttentionPositions, whatever the pages, and a score is the same tree of sums wherever it is
// computed.
#include "paged_attention/cpu.h"

#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// Heads of a tile: as many as there are, at most these.
template <class T>
constexpr int kMostHeads = kLanes<T> < 4 ? kLanes<T> : 4;
// Lanes of a head in a tile of kHeads.
template <class T, int kHeads>
constexpr int kPart = kLanes<T> / kHeads;
// Keys whose scores stay in registers, for two tiles of heads.
constexpr int kTileKeys = kVectorBytes == 64 ? 8 : 4;
constexpr int kTileVectors = 4;  // of values that stay in registers, for each head of a tile

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A vector of copies of the first kBytes bytes.
template <int kBytes, class V>
inline V repeat(const void* from) {
  if constexpr (kBytes == sizeof(V)) {
    V x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  } else if constexpr (kBytes <= 8) {
    using Word = std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
    typedef Word Copies __attribute__((vector_size(sizeof(V))));
    Word word;
    __builtin_memcpy(&word, from, sizeof word);
    return (V)(Copies{} + word);
  } else {
#if defined(__AVX2__)
    if constexpr (kBytes == 16 && sizeof(V) == 32)
      return (V)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
#if defined(__AVX512F__)  // with a mask of all lanes: without one GCC 12 warns of its own header
    if constexpr (kBytes == 16 && sizeof(V) == 64)
      return (V)_mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(static_cast<const __m128i*>(from)));
    if constexpr (kBytes == 32 && sizeof(V) == 64)
      return (V)_mm512_maskz_broadcast_i64x4(0xff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#endif
  }
}

inline float real(float x) { return x; }
inline double real(double x) { return x; }
inline float real(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

// How a tile's queries meet a key. A lane takes one number of each at a time.
template <class T, int kHeads>
struct Products {
  using Number = Real<T>;  // of a query, as it is kept
  using Factor = Vector<T>;
  static constexpr int kStep = kPart<T, kHeads>;  // numbers of a key

  static Number kept(T x) { return real(x); }
  static Factor key(const T* from) {
    if constexpr (std::is_same_v<T, Bfloat16>)
      return (Floats)(__builtin_convertvector(repeat<2 * kStep, HalfWords>(from), Words) << 16);
    else
      return repeat<kStep* int{sizeof(T)}, Vector<T>>(from);
  }
  static Vector<T> add(Factor query, Factor key, Vector<T> sum) { return query * key + sum; }
};
#if defined(__AVX512BF16__)
// A lane takes a pair of numbers, and both products are added. The instruction takes denormal numbers for zero, and
// makes none.
template <int kHeads>
struct Products<Bfloat16, kHeads> {
  using Number = Bfloat16;
  using Factor = Words;
  static constexpr int kStep = 2 * kPart<Bfloat16, kHeads>;

  static Number kept(Bfloat16 x) { return x; }
  static Factor key(const Bfloat16* from) { return repeat<2 * kStep, Words>(from); }
  static Floats add(Factor query, Factor key, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)key);
  }
};
#endif

// What one task keeps: tiles of queries, the scores of a block, and the running sums of values.
//   query   [tile][step of a key's numbers][head of the tile][kStep], zero behind a query's end
//   scores  [tile][kPart positions][head of the tile][position]
//   sums    [head][sum_stride]
template <class T, int kHeads>
struct Scratch {
  using Number = typename Products<T, kHeads>::Number;
  static constexpr int64_t kTileScores = kAttentionPositions * kHeads;

  int64_t query_stride, sum_stride;
  Number* query;
  Real<T>*scores, *sums;

  Scratch(const PagedAttention& attention, void* memory)
      : query_stride(rounded_up(attention.key_width, Products<T, kHeads>::kStep) * kHeads),
        sum_stride(rounded_up(attention.value_width, kLanes<T>)),
        query(static_cast<Number*>(memory)),
        scores(reinterpret_cast<Real<T>*>(query + rounded_up(kAttentionHeads / kHeads * query_stride, 64))),
        sums(scores + kAttentionHeads * kAttentionPositions) {}
};

// Where the keys of a row's next positions lie.
template <class T>
struct Keys {
  const T* at[kAttentionPositions];
  int64_t count = 0;
};

// Goes over the positions of a row.
template <class T>
struct Pages {
  const T* cache;
  int64_t row_width, page_size;
  const int32_t* page;
  int64_t offset = 0;

  Pages(const PagedAttention& attention, int64_t row, int64_t group)
      : cache(static_cast<const T*>(attention.cache) + group * attention.key_width),
        row_width(attention.row_width),
        page_size(attention.page_size),
        page(attention.page_table + row * attention.max_pages) {}

  void read(int64_t positions, Keys<T>& keys) {
    keys.count = positions;
    for (int64_t p = 0; p < positions;) {
      const T* key = cache + (*page * page_size + offset) * row_width;
      const int64_t end = smaller(p + page_size - offset, positions);
      offset += end - p;
      for (; p < end; ++p, key += row_width) keys.at[p] = key;
      if (offset == page_size) offset = 0, ++page;
    }
  }
};

// Always inlined: GCC takes functions that do nothing but this for functions without effect, and leaves the calls out.
template <class T>
__attribute__((always_inline)) inline void fetch(const T* from, int64_t width) {
  const auto* bytes = reinterpret_cast<const char*>(from);
#pragma GCC unroll 4
  for (int64_t i = 0; i < width * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i);
}

// The keys [begin, end) and their values, which begin `value_offset` behind them.
template <class T>
__attribute__((always_inline)) inline void fetch(const Keys<T>& keys, int64_t begin, int64_t end,
                                                 const PagedAttention& attention, int64_t value_offset) {
  if (begin >= end) return;
  const T* first = keys.at[begin];
  if (attention.groups == 1 && keys.at[end - 1] - first == (end - 1 - begin) * attention.row_width) {
    fetch(first, (end - begin) * attention.row_width);
    return;
  }
  for (; begin < end; ++begin) {
    fetch(keys.at[begin], attention.key_width);
    if (value_offset >= attention.key_width) fetch(keys.at[begin] + value_offset, attention.value_width);
  }
}

// The heads' queries in tiles; heads that a tile has no more are zero.
template <class T, int kHeads>
void keep_queries(const T* from, int64_t heads, int64_t width, const Scratch<T, kHeads>& scratch) {
  using Meeting = Products<T, kHeads>;
  constexpr int64_t kStep = Meeting::kStep;
  for (int64_t h = 0; h < rounded_up(heads, kHeads); ++h, from += width) {
    auto* to = scratch.query + h / kHeads * scratch.query_stride + h % kHeads * kStep;
    for (int64_t k = 0; k < width; k += kStep, to += kHeads * kStep) {
      const int64_t count = h < heads ? smaller(width - k, kStep) : 0;
      if (count == kStep) {  // a number that the compiler knows
        for (int64_t i = 0; i < kStep; ++i) to[i] = Meeting::kept(from[k + i]);
      } else {
        for (int64_t i = 0; i < kStep; ++i) to[i] = i < count ? Meeting::kept(from[k + i]) : typename Meeting::Number{};
      }
    }
  }
}

// Scores of kTiles tiles of heads with kKeys keys.
template <class T, int kHeads, int kTiles, int kKeys>
void score_tile(const Scratch<T, kHeads>& scratch, int64_t tile, const T* const* keys, int64_t width, Real<T> scale,
                int64_t position) {
  using Meeting = Products<T, kHeads>;
  constexpr int64_t kStep = Meeting::kStep;
  const auto* query = scratch.query + tile * scratch.query_stride;
  Vector<T> sums[kTiles][kKeys] = {};
  const auto add = [&](auto load_key) __attribute__((always_inline)) {
    typename Meeting::Factor queries[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) __builtin_memcpy(&queries[t], query + t * scratch.query_stride, sizeof queries[t]);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const auto key = load_key(keys[j]);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) sums[t][j] = Meeting::add(queries[t], key, sums[t][j]);
    }
    query += kHeads * kStep;
  };
  const int64_t whole = width / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep) add([=](const T* from) { return Meeting::key(from + k); });
  if (whole < width)
    add([=](const T* from) {
      T rest[kStep] = {};  // what lies behind a key may not be a number
      for (int64_t i = 0; i < width - whole; ++i) rest[i] = from[whole + i];
      return Meeting::key(rest);
    });
  for (int t = 0; t < kTiles; ++t) {
    Real<T>* to = scratch.scores + (tile + t) * Scratch<T, kHeads>::kTileScores + position * kHeads;
    for (int j = 0; j < kKeys; j += kPart<T, kHeads>)
      store(to + j * kHeads, sums_of_lanes<kPart<T, kHeads> / 2>(sums[t] + j) * scale);
  }
}

// Scores of all tiles with kKeys keys.
template <class T, int kHeads, int kKeys>
void score_keys(const Scratch<T, kHeads>& scratch, int64_t tiles, const T* const* keys, int64_t width, Real<T> scale,
                int64_t position) {
  int64_t tile = 0;
  if constexpr (kHeads == kMostHeads<T>)
    for (; tile + 2 <= tiles; tile += 2) score_tile<T, kHeads, 2, kKeys>(scratch, tile, keys, width, scale, position);
  for (; tile < tiles; ++tile) score_tile<T, kHeads, 1, kKeys>(scratch, tile, keys, width, scale, position);
}

// A tile's softmax so far, in all of a head's lanes.
template <class T, int kHeads>
struct Softmax {
  static constexpr int kOwn = kPart<T, kHeads>;
  static constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>{};

  Vector<T> max = Vector<T>{} - Real<T>(__builtin_inf());
  Vector<T> sum = {};

  // Scores become weights relative to the largest score so far; answers what earlier weights have to be multiplied by.
  Vector<T> add(Real<T>* scores, int64_t positions) {
    const int64_t end = rounded_up(positions, kOwn) * kHeads;
    for (int64_t p = positions; p % kOwn != 0; ++p)
      for (int h = 0; h < kHeads; ++h) scores[end - kLanes<T> + h * kOwn + p % kOwn] = -__builtin_inf();
    Vector<T> largest = max;  // the maximum passes over NaN
    for (int64_t i = 0; i < end; i += kLanes<T>) {
      const Vector<T> x = load(scores + i);
      largest = x > largest ? x : largest;
    }
    largest = over_part<kOwn / 2>(largest, [](Vector<T> a, Vector<T> b) { return a > b ? a : b; });
    const Vector<T> factor = exp(at_least_floor(max - largest));
    max = largest;
    sum *= factor;
    for (int64_t i = 0; i < end; i += kLanes<T>) {
      const Vector<T> weight = exp(at_least_floor(load(scores + i) - max));
      store(scores + i, weight);
      sum += weight;
    }
    return factor;
  }

  Vector<T> total() const {
    return over_part<kOwn / 2>(sum, [](Vector<T> a, Vector<T> b) { return a + b; });
  }

 private:
  template <int kDistance, class F>
  static Vector<T> over_part(Vector<T> x, F combine) {
    if constexpr (kDistance == 0)
      return x;
    else
      return over_part<kDistance / 2>(combine(x, choose<kDistance, true>(x, x, kAll)), combine);
  }
};

// sums [kHeads, kVectors vectors] = factor * sums + weights @ values; `count` is the width of a vector cut short.
// The values of a position begin `offset` behind its key.
template <class T, int kHeads, int kVectors, bool kWhole = true>
void value_tile(const Real<T>* weights, const Vector<T>& factor, const T* const* keys, int64_t offset,
                int64_t positions, Real<T>* sums, int64_t stride, int64_t count = kLanes<T>) {
  constexpr int kOwn = kPart<T, kHeads>;
  Vector<T> sum[kHeads][kVectors];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[h][v] = load(sums + h * stride + v * kLanes<T>) * factor[h * kOwn];
  const auto add = [&](const T* key, const Real<T>* weight) __attribute__((always_inline)) {
    Vector<T> value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const T* from = key + offset + v * kLanes<T>;
      if constexpr (kWhole)
        value[v] = load(from);
      else
        value[v] = load_first(from, count, 0);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const auto w = repeat<sizeof(Real<T>), Vector<T>>(weight + h * kOwn);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[h][v] += w * value[v];
    }
  };
  int64_t p = 0;
  for (; p + kOwn <= positions; p += kOwn, weights += kLanes<T>)
#pragma GCC unroll 4
    for (int i = 0; i < kOwn; ++i) add(keys[p + i], weights + i);
  for (int64_t i = 0; p + i < positions; ++i) add(keys[p + i], weights + i);
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + h * stride + v * kLanes<T>, sum[h][v]);
}

template <class T, int kHeads>
void add_values(const Scratch<T, kHeads>& scratch, int64_t tile, const Vector<T>& factor, const T* const* keys,
                int64_t offset, int64_t width, int64_t positions) {
  const Real<T>* weights = scratch.scores + tile * Scratch<T, kHeads>::kTileScores;
  Real<T>* sums = scratch.sums + tile * kHeads * scratch.sum_stride;
  const int64_t whole = width / kLanes<T> * kLanes<T>;
  for (int64_t column = 0, vectors; column < whole; column += vectors * kLanes<T>) {
    vectors = smaller((whole - column) / kLanes<T>, kTileVectors);
    const auto add = vectors == 1   ? value_tile<T, kHeads, 1>
                     : vectors == 2 ? value_tile<T, kHeads, 2>
                     : vectors == 3 ? value_tile<T, kHeads, 3>
                                    : value_tile<T, kHeads, 4>;
    add(weights, factor, keys, offset + column, positions, sums + column, scratch.sum_stride, kLanes<T>);
  }
  if (whole < width)
    value_tile<T, kHeads, 1, false>(weights, factor, keys, offset + whole, positions, sums + whole, scratch.sum_stride,
                                    width - whole);
}

template <class T, int kHeads>
void attend(const PagedAttention& attention, int64_t row, int64_t group, int64_t first_head, void* memory) {
  const int64_t heads = smaller(attention.heads - first_head, kAttentionHeads);
  const int64_t tiles = (heads + kHeads - 1) / kHeads;
  const int64_t key_width = attention.key_width, value_width = attention.value_width;
  const int64_t head = (row * attention.groups + group) * attention.heads + first_head;
  const Real<T> scale = attention.scale;
  const Scratch<T, kHeads> scratch(attention, memory);
  keep_queries(static_cast<const T*>(attention.query) + head * key_width, heads, key_width, scratch);
  for (int64_t i = 0; i < tiles * kHeads * scratch.sum_stride; ++i) scratch.sums[i] = 0;

  constexpr int kOwn = kPart<T, kHeads>, kTaken = kOwn > kTileKeys ? kOwn : kTileKeys;
  const int64_t length = attention.lengths[row];
  const int64_t value_offset = attention.value_start + group * (value_width - key_width);  // from a position's key
  Softmax<T, kHeads> softmax[kAttentionHeads / kHeads];
  Pages<T> pages(attention, row, group);
  Keys<T> blocks[2];
  pages.read(smaller(length, kAttentionPositions), blocks[0]);
  for (int64_t start = 0, block = 0; start < length; start += kAttentionPositions, block ^= 1) {
    Keys<T>&keys = blocks[block], &next = blocks[block ^ 1];
    const int64_t positions = keys.count;
    pages.read(smaller(length - start - positions, kAttentionPositions), next);
    for (int64_t p = positions; p % kOwn != 0; ++p) keys.at[p] = keys.at[positions - 1];
    for (int64_t p = 0, taken; p < positions; p += taken) {
      taken = p + kTaken <= positions ? kTaken : kOwn;
      fetch(next, p, smaller(p + taken, next.count), attention, value_offset);
      const auto score = taken == kTaken ? score_keys<T, kHeads, kTaken> : score_keys<T, kHeads, kOwn>;
      score(scratch, tiles, keys.at + p, key_width, scale, p);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const auto factor = softmax[tile].add(scratch.scores + tile * Scratch<T, kHeads>::kTileScores, positions);
      add_values<T, kHeads>(scratch, tile, factor, keys.at, value_offset, value_width, positions);
    }
  }

  for (int64_t h = 0; h < heads; ++h) {
    T* out = static_cast<T*>(attention.out) + (head + h) * value_width;
    const Real<T> total = softmax[h / kHeads].total()[h % kHeads * kOwn];
    const Real<T> share = length > 0 ? 1 / total : 0;
    for (int64_t v = 0; v < value_width; v += kLanes<T>) {
      const Vector<T> x = load(scratch.sums + h * scratch.sum_stride + v) * share;
      const int64_t count = smaller(value_width - v, kLanes<T>);
      count == kLanes<T> ? store(out + v, x) : store_first(out + v, count, x);
    }
  }
}

template <class T>
void attend(const PagedAttention& attention, int64_t row, int64_t group, int64_t first_head, void* memory) {
  const auto f = attention.heads == 1 ? attend<T, 1> : attention.heads == 2 ? attend<T, 2> : attend<T, kMostHeads<T>>;
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
