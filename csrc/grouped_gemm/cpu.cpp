// A packed matrix product in the manner of BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015): both operands are
// copied into panels that the micro kernel reads in order, and a tile of results stays in registers.
//
// Determinism: an element of the result is one chain of fused multiply-adds over each stretch of kDepth of the reduced
// axis, and the stretches are added in order. Nothing else enters: not the number of rows, not the tile's place or
// shape (micro kernels of all shapes run the same chain), not the thread.
#include "grouped_gemm/cpu.h"

#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "common/vector_math.h"

namespace r1::R1_CPU_NAMESPACE {
namespace {

template <class T>
using Real = typename Arithmetic<T>::Real;
template <class T>
using Vector = typename Arithmetic<T>::Vector;
template <class T>
constexpr int kLanes = Arithmetic<T>::kLanes;

// The micro kernel's tile: as much as the registers hold beside one row of the right panel and one broadcast value.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // of 32 registers
#elif defined(__aarch64__)
constexpr int kTileRows = 12;  // of 32
#else
constexpr int kTileRows = 6;  // of 16
#endif
constexpr int kTileVectors = 2;
// How much of the reduced axis is packed at a time: a left panel stays in the L1 cache, all right ones in L2.
constexpr int64_t kDepth = 256;

static_assert(kGemmBlockRows % kTileRows == 0);

template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;
// A panel of the left operand holds kTileRows of every kLeftStride values: a whole number of vectors.
template <class T>
constexpr int kLeftStride = (kTileRows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

template <class T>
struct Scratch {
  T left[kLeftStride<T> * kDepth];                // one panel
  T right[kGemmBlockColumns * kDepth];            // all panels of the block
  T partial[kGemmBlockRows * kGemmBlockColumns];  // running sums, where the result is of another type
  T tile[kTileRows * kTileColumns<T>];            // a tile that reaches past the block or is of another type
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// a * b + c, rounded once where the capability can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// A whole vector, unless that would read at or past `end`.
template <class T>
inline Vector<T> load_before(const T* end, const T* from) {
  return end - from >= kLanes<T> ? load(from) : load_first(from, end > from ? end - from : 0, 0);
}

// ---------------------------------------------------------------------------------------------- packing

// The vectors a and b one after the other, as groups of kGroup units of kUnit lanes: in each pair of groups the units
// of even (kOdd = 0) or odd place. Every such choice that is used below is one instruction.
template <int kUnit, int kGroup, int kOdd, class V, int... lane>
inline V unzip(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int l) {
    const int place = 2 * (l / kUnit % kGroup) + kOdd;
    return (place < kGroup ? 0 : int{sizeof...(lane)}) + l / (kUnit * kGroup) * (kUnit * kGroup) +
           place % kGroup * kUnit + l % kUnit;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(lane)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Indices{source(lane)...});
#endif
}

// Transposes the kGroup x kGroup units of square[0], square[stride], ..., in each group of lanes on its own.
template <class T, int kUnit, int kGroup, int kStride>
inline void transpose_units(Vector<T>* square) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>{};
#pragma GCC unroll 4
  for (int round = 1; round < kGroup; round *= 2) {
    Vector<T> next[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup / 2; ++i) {
      const Vector<T> a = square[2 * i * kStride], b = square[(2 * i + 1) * kStride];
      next[i] = unzip<kUnit, kGroup, 0>(a, b, kAll);
      next[i + kGroup / 2] = unzip<kUnit, kGroup, 1>(a, b, kAll);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) square[i * kStride] = next[i];
  }
}

// Transposes a square of vectors: first within the 16 bytes that shuffles move values in cheaply, then those.
template <class T>
inline void transpose(Vector<T> (&square)[kLanes<T>]) {
  constexpr int kInner = 16 / sizeof(T), kOuter = kLanes<T> / kInner;
#pragma GCC unroll 4
  for (int i = 0; i < kOuter; ++i) transpose_units<T, 1, kInner, 1>(square + i * kInner);
#pragma GCC unroll 4
  for (int i = 0; i < kInner; ++i) transpose_units<T, kInner, kOuter, kInner>(square + i);
}

// Packs `lines` (rows of the left operand, columns of the right one) as [depth][kVectors vectors]. In the place of
// missing lines stands whatever memory holds after those there are: no result that depends on it is stored. The lines
// of the next panel are fetched meanwhile: with few rows per expert, reading the weights is most of the work.
template <int kVectors, class T>
void pack(const T* from, int64_t line_stride, int64_t depth_stride, int64_t lines, int64_t depth, Real<T>* to) {
  constexpr int kWidth = kLanes<T>;
  const T* end = from + (lines - 1) * line_stride + (depth - 1) * depth_stride + 1;
  if (depth_stride != 1) {
    for (int64_t d = 0; d < depth; ++d, from += depth_stride, to += kVectors * kWidth)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(from + (kVectors + v) * kWidth, 0, 2);
        store(to + v * kWidth, load_before(end, from + v * kWidth));
      }
    return;
  }
  for (int v = 0; v < kVectors; ++v) {
    const T* line[kWidth];
    for (int i = 0; i < kWidth; ++i) line[i] = from + (v * kWidth + i < lines ? v * kWidth + i : 0) * line_stride;
    for (int64_t d = 0; d < depth; d += kWidth) {
      Vector<T> square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        __builtin_prefetch(line[i] + kVectors * kWidth * line_stride + d, 0, 2);
        square[i] = load_before(end, line[i] + d);
      }
      transpose<Real<T>>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        if (d + i < depth) store(to + ((d + i) * kVectors + v) * kWidth, square[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- micro kernels

template <class T>
using MicroKernel = void (*)(int64_t depth, const T* left, const T* right, T* out, int64_t stride, bool add);

// out [kRows, kVectors vectors] = or += the product of a left and a right panel.
template <class T, int kRows, int kVectors>
void micro_kernel(int64_t depth, const T* left, const T* right, T* out, int64_t stride, bool add) {
  Vector<T> sum[kRows][kVectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + i * stride + v * kLanes<T>, 1);
  for (int64_t d = 0; d < depth; ++d) {
    Vector<T> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vector<T> value = left[i] - Vector<T>{};  // in every lane; x - 0 is x, also for -0
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(value, row[v], sum[i][v]);
    }
    left += kLeftStride<T>;
    right += kVectors * kLanes<T>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + i * stride + v * kLanes<T>;
      store(to, add ? load(to) + sum[i][v] : sum[i][v]);
    }
}

template <class T, int kVectors, int... row>
MicroKernel<T> select_micro_kernel(int64_t rows, std::integer_sequence<int, row...>) {
  static constexpr MicroKernel<T> kernels[] = {micro_kernel<T, row + 1, kVectors>...};
  return kernels[rows - 1];
}

template <class T>
MicroKernel<T> select_micro_kernel(int64_t rows, int64_t vectors) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  static_assert(kTileVectors == 2);
  return vectors == 1 ? select_micro_kernel<T, 1>(rows, Rows{}) : select_micro_kernel<T, 2>(rows, Rows{});
}

// ---------------------------------------------------------------------------------------------- a block

// out [rows, columns] = or += partial (if any) + tile
template <class Out, class A>
void finish_tile(const A* tile, const A* partial, Out* out, int64_t stride, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; ++i, tile += kTileColumns<A>, partial += partial ? kGemmBlockColumns : 0, out += stride)
    for (int64_t j = 0; j < columns; j += kLanes<A>) {
      const int64_t count = smaller(columns - j, kLanes<A>);
      const bool whole = count == kLanes<A>;
      Vector<A> sum = load(tile + j);
      if (partial != nullptr) sum = load(partial + j) + sum;
      if constexpr (std::is_same_v<A, Real<Out>>) {
        if (add) sum = (whole ? load(out + j) : load_first(out + j, count, 0)) + sum;
        whole ? store(out + j, sum) : store_first(out + j, count, sum);
      } else {
        for (int64_t lane = 0; lane < count; ++lane) out[j + lane] = Out(add ? out[j + lane] + sum[lane] : sum[lane]);
      }
    }
}

template <class T, class Out>
void multiply(const GemmBlock& block, Scratch<Real<T>>& scratch) {
  using A = Real<T>;
  constexpr bool kDirect = std::is_same_v<Out, A>;  // the result itself holds the running sums
  for (int64_t start = 0; start < block.depth; start += kDepth) {
    const int64_t depth = smaller(block.depth - start, kDepth);
    const bool first = start == 0, last = start + depth == block.depth;
    const T* left = static_cast<const T*>(block.left) + start * block.left_depth_stride;
    const T* right = static_cast<const T*>(block.right) + start * block.right_depth_stride;
    for (int64_t i = 0; i < block.rows; i += kTileRows) {
      const int64_t rows = smaller(block.rows - i, kTileRows);
      pack<kLeftStride<A> / kLanes<A>>(left + i * block.left_row_stride, block.left_row_stride, block.left_depth_stride,
                                       block.rows - i, depth, scratch.left);
      for (int64_t j = 0; j < block.columns; j += kTileColumns<A>) {
        const int64_t columns = smaller(block.columns - j, kTileColumns<A>);
        const int64_t vectors = (columns + kLanes<A> - 1) / kLanes<A>;
        A* right_panel = scratch.right + j * kDepth;
        if (i == 0) {
          const auto pack_right = vectors == 1 ? pack<1, T> : pack<kTileVectors, T>;
          pack_right(right + j * block.right_column_stride, block.right_column_stride, block.right_depth_stride,
                     columns, depth, right_panel);
        }
        const auto kernel = select_micro_kernel<A>(rows, vectors);
        Out* out = static_cast<Out*>(block.out) + i * block.out_row_stride + j;
        // Rounding the columns up to whole vectors does not leave `partial`, but it would leave the result.
        A* partial = scratch.partial + i * kGemmBlockColumns + j;
        const bool whole = columns == vectors * kLanes<A>;
        const bool add = block.accumulate || (kDirect && !first);
        if constexpr (kDirect) {
          if (whole) {
            kernel(depth, scratch.left, right_panel, out, block.out_row_stride, add);
            continue;
          }
        } else if (!last) {
          kernel(depth, scratch.left, right_panel, partial, kGemmBlockColumns, !first);
          continue;
        }
        kernel(depth, scratch.left, right_panel, scratch.tile, kTileColumns<A>, false);
        finish_tile(scratch.tile, kDirect || first ? nullptr : partial, out, block.out_row_stride, rows, columns, add);
      }
    }
  }
  if (block.depth == 0 && !block.accumulate)
    for (int64_t i = 0; i < block.rows; ++i)
      memset(static_cast<Out*>(block.out) + i * block.out_row_stride, 0, block.columns * sizeof(Out));
}

}  // namespace

void gemm_block(const GemmBlock& block, Element operands, Element result, void* scratch) {
  static_assert(sizeof(Scratch<float>) <= kGemmScratchBytes && sizeof(Scratch<double>) <= kGemmScratchBytes);
  auto& floats = *static_cast<Scratch<float>*>(scratch);
  auto& doubles = *static_cast<Scratch<double>*>(scratch);
  if (operands == Element::float64 && result == Element::float64) {
    multiply<double, double>(block, doubles);
  } else if (operands == Element::float64) {
    multiply<double, float>(block, doubles);
  } else if (operands == Element::float32) {
    multiply<float, float>(block, floats);
  } else if (result == Element::float32) {
    multiply<Bfloat16, float>(block, floats);
  } else {
    multiply<Bfloat16, Bfloat16>(block, floats);
  }
}

}  // namespace r1::R1_CPU_NAMESPACE
