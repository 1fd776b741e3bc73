// A packed matrix product in the manner of BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015): both operands are
// copied into panels that the micro kernel reads in order, and a tile of results stays in registers.
//
// Determinism: an element of the result is one chain of fused multiply-adds over each stretch of kPanelDepth steps of
// the reduced axis, and the stretches are added in order. Nothing else enters: not the number of rows, not the tile's
// place or shape (micro kernels of all shapes run the same chain), not the thread. A step is one value of each operand,
// or two of each where the processor multiplies bfloat16 itself.
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
// Steps of the reduced axis that are packed at a time: a left panel stays in the L1 cache, all right ones in L2.
constexpr int64_t kPanelDepth = 256;

static_assert(kGemmBlockRows % kTileRows == 0);

// P is what a panel holds: float, double or Bfloat16Pair. Products are summed in Real<P>.
template <class P>
constexpr int kTileColumns = kTileVectors * kLanes<P>;
// A panel of the left operand holds kTileRows of every kLeftStride values: a whole number of vectors.
template <class P>
constexpr int kLeftStride = (kTileRows + kLanes<P> - 1) / kLanes<P> * kLanes<P>;

template <class P>
struct Scratch {
  P left[kLeftStride<P> * kPanelDepth];                 // one panel
  P right[kGemmBlockColumns * kPanelDepth];             // all panels of the block
  Real<P> partial[kGemmBlockRows * kGemmBlockColumns];  // running sums, where the result is of another type
  Real<P> tile[kTileRows * kTileColumns<P>];            // a tile that reaches past the block or is of another type
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------- arithmetic

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

inline Floats broadcast(float x) { return x - Floats{}; }  // x - 0 is x, also for -0
inline Doubles broadcast(double x) { return x - Doubles{}; }

// A whole vector, unless that would read at or past `end`.
template <class T>
inline Vector<T> load_before(const T* end, const T* from) {
  return end - from >= kLanes<T> ? load(from) : load_first(from, end > from ? end - from : 0, 0);
}

// What panels hold of operands of type T, and how a vector of it is read: `across` neighbouring lines, or `along` one
// of which `depth` values are left. The operand ends at `end`.
template <class T>
struct Packed {
  using Value = Real<T>;
  static constexpr int kStep = 1;  // values of the reduced axis in one of a panel
  static Vector<T> across(const T* from, const T* end, int64_t /*depth_stride*/) { return load_before(end, from); }
  static Vector<T> along(const T* from, const T* end, int64_t /*depth*/) { return load_before(end, from); }
};

#if defined(__AVX512BF16__)
inline Words broadcast(Bfloat16Pair x) { return x.bits - Words{}; }

// Both products are added to c. The instruction takes denormal numbers for zero, and makes none.
inline Floats fma(Words a, Words b, Floats c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// Pairs of neighbours on the reduced axis; past an odd end the second is zero.
template <>
struct Packed<Bfloat16> {
  using Value = Bfloat16Pair;
  static constexpr int kStep = 2;
  static Words across(const Bfloat16* from, const Bfloat16* end, int64_t depth_stride) {
    return (Words)load_before(end, from) >> 16 | (Words)load_before(end, from + depth_stride);
  }
  static Words along(const Bfloat16* from, const Bfloat16* /*end*/, int64_t depth) {
    return (Words)_mm512_maskz_loadu_epi16(depth < 32 ? (1u << depth) - 1 : ~0u, from);
  }
};
#endif

// A vector of what a panel holds.
template <class P>
using Lanes = decltype(load(static_cast<const P*>(nullptr)));

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
template <class P, int kUnit, int kGroup, int kStride>
inline void transpose_units(Lanes<P>* square) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<P>>{};
#pragma GCC unroll 4
  for (int round = 1; round < kGroup; round *= 2) {
    Lanes<P> next[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup / 2; ++i) {
      const Lanes<P> a = square[2 * i * kStride], b = square[(2 * i + 1) * kStride];
      next[i] = unzip<kUnit, kGroup, 0>(a, b, kAll);
      next[i + kGroup / 2] = unzip<kUnit, kGroup, 1>(a, b, kAll);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) square[i * kStride] = next[i];
  }
}

// Transposes a square of vectors: first within the 16 bytes that shuffles move values in cheaply, then those.
template <class P>
inline void transpose(Lanes<P> (&square)[kLanes<P>]) {
  constexpr int kInner = 16 / sizeof(P), kOuter = kLanes<P> / kInner;
#pragma GCC unroll 4
  for (int i = 0; i < kOuter; ++i) transpose_units<P, 1, kInner, 1>(square + i * kInner);
#pragma GCC unroll 4
  for (int i = 0; i < kInner; ++i) transpose_units<P, kInner, kOuter, kInner>(square + i);
}

// Packs `lines` (rows of the left operand, columns of the right one) as [steps][kVectors vectors]. In the place of
// missing lines stands whatever memory holds after those there are: no result that depends on it is stored. The lines
// of the next panel are fetched meanwhile: with few rows per expert, reading the weights is most of the work.
template <int kVectors, class T>
void pack(const T* from, int64_t line_stride, int64_t depth_stride, int64_t lines, int64_t depth,
          typename Packed<T>::Value* to) {
  using P = typename Packed<T>::Value;
  constexpr int kWidth = kLanes<P>, kStep = Packed<T>::kStep;
  static_assert(kPanelDepth % kWidth == 0);  // so that there is room for whole squares
  const T* end = from + (lines - 1) * line_stride + (depth - 1) * depth_stride + 1;
  if (depth_stride != 1) {
    for (int64_t d = 0; d < depth; d += kStep, from += kStep * depth_stride, to += kVectors * kWidth)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i) __builtin_prefetch(from + (kVectors + v) * kWidth + i * depth_stride, 0, 2);
        store(to + v * kWidth, Packed<T>::across(from + v * kWidth, end, depth_stride));
      }
    return;
  }
  for (int v = 0; v < kVectors; ++v) {
    const T* line[kWidth];
    for (int i = 0; i < kWidth; ++i) line[i] = from + (v * kWidth + i < lines ? v * kWidth + i : 0) * line_stride;
    for (int64_t d = 0; d < depth; d += kStep * kWidth) {
      Lanes<P> square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        __builtin_prefetch(line[i] + kVectors * kWidth * line_stride + d, 0, 2);
        square[i] = Packed<T>::along(line[i] + d, end, depth - d);
      }
      transpose<P>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + ((d / kStep + i) * kVectors + v) * kWidth, square[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- micro kernels

template <class P>
using MicroKernel = void (*)(int64_t steps, const P* left, const P* right, Real<P>* out, int64_t stride, bool add);

// out [kRows, kVectors vectors] = or += the product of a left and a right panel.
template <class P, int kRows, int kVectors>
void micro_kernel(int64_t steps, const P* left, const P* right, Real<P>* out, int64_t stride, bool add) {
  Vector<P> sum[kRows][kVectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + i * stride + v * kLanes<P>, 1);
  for (int64_t step = 0; step < steps; ++step) {
    Lanes<P> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + v * kLanes<P>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Lanes<P> value = broadcast(left[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(value, row[v], sum[i][v]);
    }
    left += kLeftStride<P>;
    right += kVectors * kLanes<P>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Real<P>* to = out + i * stride + v * kLanes<P>;
      store(to, add ? load(to) + sum[i][v] : sum[i][v]);
    }
}

template <class P, int kVectors, int... row>
MicroKernel<P> select_micro_kernel(int64_t rows, std::integer_sequence<int, row...>) {
  static constexpr MicroKernel<P> kernels[] = {micro_kernel<P, row + 1, kVectors>...};
  return kernels[rows - 1];
}

template <class P>
MicroKernel<P> select_micro_kernel(int64_t rows, int64_t vectors) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  static_assert(kTileVectors == 2);
  return vectors == 1 ? select_micro_kernel<P, 1>(rows, Rows{}) : select_micro_kernel<P, 2>(rows, Rows{});
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
void multiply(const GemmBlock& block, void* memory) {
  using P = typename Packed<T>::Value;
  using A = Real<P>;
  constexpr int64_t kStep = Packed<T>::kStep, kStretch = kStep * kPanelDepth;
  static_assert(sizeof(Scratch<P>) <= kGemmScratchBytes);
  auto& scratch = *static_cast<Scratch<P>*>(memory);
  constexpr bool kDirect = std::is_same_v<Out, A>;  // the result itself holds the running sums
  for (int64_t start = 0; start < block.depth; start += kStretch) {
    const int64_t depth = smaller(block.depth - start, kStretch), steps = (depth + kStep - 1) / kStep;
    const bool first = start == 0, last = start + depth == block.depth;
    const T* left = static_cast<const T*>(block.left) + start * block.left_depth_stride;
    const T* right = static_cast<const T*>(block.right) + start * block.right_depth_stride;
    for (int64_t i = 0; i < block.rows; i += kTileRows) {
      const int64_t rows = smaller(block.rows - i, kTileRows);
      pack<kLeftStride<P> / kLanes<P>>(left + i * block.left_row_stride, block.left_row_stride, block.left_depth_stride,
                                       block.rows - i, depth, scratch.left);
      for (int64_t j = 0; j < block.columns; j += kTileColumns<A>) {
        const int64_t columns = smaller(block.columns - j, kTileColumns<A>);
        const int64_t vectors = (columns + kLanes<A> - 1) / kLanes<A>;
        P* right_panel = scratch.right + j * kPanelDepth;
        if (i == 0) {
          const auto pack_right = vectors == 1 ? pack<1, T> : pack<kTileVectors, T>;
          pack_right(right + j * block.right_column_stride, block.right_column_stride, block.right_depth_stride,
                     columns, depth, right_panel);
        }
        const auto kernel = select_micro_kernel<P>(rows, vectors);
        Out* out = static_cast<Out*>(block.out) + i * block.out_row_stride + j;
        // Rounding the columns up to whole vectors does not leave `partial`, but it would leave the result.
        A* partial = scratch.partial + i * kGemmBlockColumns + j;
        const bool whole = columns == vectors * kLanes<A>;
        const bool add = block.accumulate || (kDirect && !first);
        if constexpr (kDirect) {
          if (whole) {
            kernel(steps, scratch.left, right_panel, out, block.out_row_stride, add);
            continue;
          }
        } else if (!last) {
          kernel(steps, scratch.left, right_panel, partial, kGemmBlockColumns, !first);
          continue;
        }
        kernel(steps, scratch.left, right_panel, scratch.tile, kTileColumns<A>, false);
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
  if (operands == Element::float64 && result == Element::float64) {
    multiply<double, double>(block, scratch);
  } else if (operands == Element::float64) {
    multiply<double, float>(block, scratch);
  } else if (operands == Element::float32) {
    multiply<float, float>(block, scratch);
  } else if (result == Element::float32) {
    multiply<Bfloat16, float>(block, scratch);
  } else {
    multiply<Bfloat16, Bfloat16>(block, scratch);
  }
}

}  // namespace r1::R1_CPU_NAMESPACE
