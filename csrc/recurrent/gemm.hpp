// Matrix products with few rows: one register tile, and operands packed in the order in which it
// reads them.
//
// Each element of a product is the sum over k of one product after another, in blocks of kBlock
// that are added up in order. That order is the same in every tile, so a row of the result has the
// same bits alone, in any batch and in any thread.
#pragma once

#include "isa/part.hpp"

namespace layernorm::LAYERNORM_ISA {

// The tile: up to kTileRows rows times kTileVectors vectors of columns, in registers.
#if defined(LAYERNORM_AVX512)
inline constexpr int kTileVectors = 4;
#elif defined(__ARM_NEON)
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kTileVectors = 2;
#endif
inline constexpr int kTileRows = 6;
// Columns of a panel of the right operand: those of one tile.
template <typename A>
inline constexpr int64_t kPanel = kTileVectors * kLanes<A>;

// What a tile multiplies: numbers, or pairs of bfloat16 that meet in one instruction.
template <typename A>
struct Numbers {
  using Element = A;
  using Sum = A;
  static constexpr int64_t kBlock = 4096 / sizeof(A) / 2;
  static constexpr int kPerElement = 1;
  LAYERNORM_INLINE static Vec<A> splat_of(const Element* p) { return splat(*p); }
  LAYERNORM_INLINE static Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) { return fma(a, b, c); }
};
#if defined(LAYERNORM_AVX512) && defined(__AVX512BF16__)
#define LAYERNORM_PAIRS 1
struct Pairs {
  using Element = uint32_t;
  using Sum = float;
  static constexpr int64_t kBlock = 512;
  static constexpr int kPerElement = 2;
  LAYERNORM_INLINE static Vec<float> splat_of(const Element* p) {
    Element pair;  // a row may begin at an odd element
    std::memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<Vec<float>>(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  LAYERNORM_INLINE static Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
// What rows of type T are multiplied as by the weights.
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, bfloat16>, Pairs, Numbers<Accumulate<T>>>;
#else
template <typename T>
using Operand = Numbers<Accumulate<T>>;
#endif
// What gradients of products are kept as, which are multiplied as the rows are.
template <typename T>
using Grad = std::conditional_t<Operand<T>::kPerElement == 2, T, Accumulate<T>>;

// What a product is added to: nothing, one row for all of its rows, or what is there.
enum class Onto { kZero, kBias, kSelf };

// A row of a panel, as it is multiplied.
template <typename O>
LAYERNORM_INLINE void load_right(const typename O::Element* p,
                                 Vec<typename O::Sum> (&right)[kTileVectors]) {
#pragma GCC unroll 8
  for (int j = 0; j < kTileVectors; ++j)
    std::memcpy(&right[j], p + j * kLanes<typename O::Sum>, sizeof right[j]);
}
// Likewise of bfloat16 beside float: two vectors share their words.
template <typename O>
LAYERNORM_INLINE void load_right(const bfloat16* p, Vec<float> (&right)[kTileVectors]) {
#pragma GCC unroll 4
  for (int j = 0; j < kTileVectors; j += 2) {
    const auto both = load(p + j * kLanes<float>, Pair{});
    right[j] = both.v[0];
    right[j + 1] = both.v[1];
  }
}

// c = onto + a·b over `count` elements of k, for the `columns` first columns of the panel b, whose
// rows are b_stride apart. The rows of a and c begin at a[r] + k and c[r] + column; elements of a
// row of a are kStride apart.
template <typename O, int kRows, int kStride, typename B>
[[gnu::noinline]] void tile(const typename O::Element* const* a, int64_t k, const B* b,
                            int64_t b_stride, int64_t count, Onto onto, const typename O::Sum* bias,
                            typename O::Sum* const* c, int64_t column, int64_t columns) {
  using A = typename O::Sum;
  using V = Vec<A>;
  V sum[kRows][kTileVectors] = {};
  const typename O::Element* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a[r] + k;
  for (int64_t i = 0; i < count; ++i) {
    V right[kTileVectors];
    load_right<O>(b + i * b_stride, right);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V left = O::splat_of(row[r] + i * kStride);
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) sum[r][j] = O::multiply_add(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    A* const to = c[r] + column;
    const A* const base = onto == Onto::kSelf ? to : bias + column;
    if (columns == kPanel<A>) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) {
        Part<A, 1> v{{sum[r][j]}};
        if (onto != Onto::kZero) v = load(base + j * kLanes<A>, Whole{}) + v;
        store<false>(to + j * kLanes<A>, v, Whole{});
      }
    } else {
      alignas(kVectorBytes) A all[kPanel<A>];
      std::memcpy(all, sum[r], sizeof all);
      for (int64_t i = 0; i < columns; ++i) to[i] = onto == Onto::kZero ? all[i] : base[i] + all[i];
    }
  }
}

// Calls run with a height of a tile as a constant.
template <typename Run>
LAYERNORM_INLINE void of_height(int64_t rows, const Run& run) {
  switch (rows) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 5:
      return run(std::integral_constant<int, 5>{});
    default:
      return run(std::integral_constant<int, 6>{});
  }
}
template <typename O, int kStride, typename... Arguments>
LAYERNORM_INLINE void tile_of(int64_t rows, const Arguments&... arguments) {
  of_height(rows, [&](auto height) LAYERNORM_LAMBDA { tile<O, height, kStride>(arguments...); });
}

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls run(height, row) for tiles of about the same height.
template <typename Run>
LAYERNORM_INLINE void each_tile(int64_t rows, int64_t most, const Run& run) {
  const int64_t blocks = parts_of(rows, most);
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t next = (block + 1) * rows / blocks;
    run(next - row, row);
    row = next;
  }
}

// ---- packing ----

// Where lanes l and l ^ s of two vectors change places, the result for a or for b.
template <int s, bool kFirst, typename V, int... l>
LAYERNORM_INLINE V exchanged(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int kCount = sizeof...(l);
  if constexpr (kFirst)
    return __builtin_shufflevector(a, b, ((l & s) == 0 ? l : kCount + (l ^ s))...);
  else
    return __builtin_shufflevector(a, b, ((l & s) != 0 ? kCount + l : (l ^ s))...);
}
template <int s, typename V, int kCount>
LAYERNORM_INLINE void transpose_by(V (&v)[kCount]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if ((i & s) != 0) continue;
    using Lanes = std::make_integer_sequence<int, kCount>;
    const V a = exchanged<s, true>(v[i], v[i ^ s], Lanes{});
    v[i ^ s] = exchanged<s, false>(v[i], v[i ^ s], Lanes{});
    v[i] = a;
  }
  if constexpr (s > 1) transpose_by<s / 2>(v);
}

// A block of the transpose of a matrix, whose rows of `numbers` numbers are columns here: v[i] is
// element k + i of as many columns from `column` on. Columns from `end` on are 0, and so is what is
// beyond the end of a row.
template <typename O, typename T, typename V, int kCount>
LAYERNORM_INLINE void load_transposed(const T* matrix, int64_t numbers, int64_t k, int64_t column,
                                      int64_t end, V (&v)[kCount]) {
  const int64_t at = k * O::kPerElement;
  const int64_t some = least(kCount * O::kPerElement, numbers - at);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    v[i] = V{};
    if (column + i >= end) continue;
    const T* const from = matrix + (column + i) * numbers + at;
    if constexpr (O::kPerElement == 2)
      std::memcpy(&v[i], from, static_cast<size_t>(some) * sizeof(T));
    else
      v[i] = some == kCount ? load(from, Whole{}).v[0] : load(from, First{some}).v[0];
  }
  transpose_by<kCount / 2>(v);
}
template <typename O>
using ElementVec = typename VectorOf<typename O::Element, kVectorBytes>::type;

// Packs elements [k, k + count) of the columns [begin, end) of such a transpose as a panel.
template <typename O, typename T>
void pack_transposed(const T* matrix, int64_t numbers, int64_t k, int64_t count, int64_t begin,
                     int64_t end, typename O::Element* panel) {
  using A = typename O::Sum;
  constexpr int kCount = kLanes<A>;
  for (int64_t group = 0; group < kPanel<A>; group += kCount) {
    for (int64_t i = 0; i < count; i += kCount) {
      ElementVec<O> v[kCount];
      load_transposed<O>(matrix, numbers, k + i, begin + group, end, v);
      for (int64_t j = 0; j < least(kCount, count - i); ++j)
        std::memcpy(panel + (i + j) * kPanel<A> + group, &v[j], sizeof v[j]);
    }
  }
}

// c = onto + a·b for kTransposedColumns columns from `column` on of such a transpose, summed as
// tile() does, without the packing that a row or two do not repay.
inline constexpr int kTransposedVectors = 2;  // sums of a row at once: each waits for its last one
template <typename A>
inline constexpr int64_t kTransposedColumns = kTransposedVectors * kLanes<A>;
template <typename O, int kRows, typename T>
[[gnu::noinline]] void transposing_tile(const typename O::Element* const* a, int64_t k,
                                        const T* matrix, int64_t numbers, int64_t count, Onto onto,
                                        const typename O::Sum* bias, typename O::Sum* const* c,
                                        int64_t column) {
  using A = typename O::Sum;
  constexpr int kCount = kLanes<A>;
  constexpr int kVectors = kTransposedVectors;
  Vec<A> sum[kVectors][kRows] = {};
  const typename O::Element* row[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) row[r] = a[r] + k;
  for (int64_t i = 0; i < count; i += kCount) {
#pragma GCC unroll 4
    for (int g = 0; g < kVectors; ++g) {
      ElementVec<O> v[kCount];
      const int64_t first = column + g * kCount;
      load_transposed<O>(matrix, numbers, k + i, first, first + kCount, v);
      const auto add = [&](int j) LAYERNORM_LAMBDA {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          sum[g][r] = O::multiply_add(O::splat_of(row[r] + i + j), reinterpret_cast<Vec<A>>(v[j]),
                                      sum[g][r]);
      };
      if (i + kCount <= count) {
#pragma GCC unroll 16
        for (int j = 0; j < kCount; ++j) add(j);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kCount; ++j)
          if (i + j < count) add(j);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    A* const to = c[r] + column;
    const A* const base = onto == Onto::kSelf ? to : bias + column;
#pragma GCC unroll 4
    for (int g = 0; g < kVectors; ++g) {
      Part<A, 1> v{{sum[g][r]}};
      if (onto != Onto::kZero) v = load(base + g * kCount, Whole{}) + v;
      store<false>(to + g * kCount, v, Whole{});
    }
  }
}

// Packs columns [begin, begin + count) of `depth` rows that begin at row(k) as a panel of a right
// operand; what is beyond count is 0.
template <typename O, typename T, typename Row>
void pack_rows(int64_t depth, const Row& row, int64_t begin, int64_t count,
               typename O::Element* to) {
  using A = typename O::Sum;
  constexpr int64_t kWidth = kPanel<A>;
  for (int64_t k = 0; k < depth; k += O::kPerElement, to += kWidth) {
    const T* const from = row(k) + begin;
    if constexpr (O::kPerElement == 2) {
      const bool last = k + 1 == depth;
      const T* const second = last ? nullptr : row(k + 1) + begin;
      if (count == kWidth && !last) {
        for (int64_t i = 0; i < kWidth; ++i)
          to[i] = from[i].bits | static_cast<uint32_t>(second[i].bits) << 16U;
        continue;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        const uint32_t low = i < count ? from[i].bits : 0U;
        const uint32_t high = i < count && !last ? second[i].bits : 0U;
        to[i] = low | high << 16U;
      }
    } else if (count == kWidth) {
      store<false>(to, load(from, Block<kTileVectors>{}), Block<kTileVectors>{});
    } else {
      for (int64_t i = 0; i < kWidth; ++i)
        to[i] = i < count ? load(from + i, First{1}).v[0][0] : A{0};
    }
  }
}

// Packs columns [begin, end) of rows `stride` apart, depth of them, as left operands of tiles: of
// kTileRows columns each, within a tile row after row. Beyond the end of the last one is nothing.
template <typename O, typename T>
void pack_columns(int64_t depth, const T* rows, int64_t stride, int64_t begin, int64_t end,
                  typename O::Element* to) {
  constexpr int64_t kAtOnce = 8;  // tiles, so that a line of a cache is read once
  const int64_t elements = parts_of(depth, O::kPerElement);
  const int64_t tile = kTileRows * elements;
  for (; begin < end; begin += kAtOnce * kTileRows, to += kAtOnce * tile) {
    const int64_t whole = least(kAtOnce, (end - begin) / kTileRows);
    const int64_t rest = least(kAtOnce * kTileRows, end - begin) - whole * kTileRows;
    for (int64_t k = 0; k < elements; ++k) {
      const T* const from = rows + k * O::kPerElement * stride + begin;
      auto* const line = to + k * kTileRows;
      const bool last = (k + 1) * O::kPerElement >= depth;
      const bool half = O::kPerElement == 2 && last && depth % 2 != 0;  // of the last pair
      const auto copy = [&](typename O::Element* at, const T* p, auto count) LAYERNORM_LAMBDA {
        if constexpr (O::kPerElement == 1) {
          std::memcpy(at, p, static_cast<size_t>(count) * sizeof(T));
        } else {
          const T* const second = half ? p : p + stride;
          for (int64_t i = 0; i < count; ++i)
            at[i] = p[i].bits | (half ? 0U : static_cast<uint32_t>(second[i].bits) << 16U);
        }
      };
      // What is copied too much is written again with the next row; the last row has none.
      constexpr std::integral_constant<int64_t, 8> kCopied;
      constexpr std::integral_constant<int64_t, kTileRows> kExactly;
      for (int64_t i = 0; i < whole; ++i) {
        if (last)
          copy(line + i * tile, from + i * kTileRows, kExactly);
        else
          copy(line + i * tile, from + i * kTileRows, kCopied);
      }
      copy(line + whole * tile, from + whole * kTileRows, rest);
    }
  }
}

}  // namespace layernorm::LAYERNORM_ISA
