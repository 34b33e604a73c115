// Matrix products with few rows: one register tile, and operands packed in the order in which it
// reads them.
//
// Each element of a product is the sum over k of one product after another, in blocks of kBlock that
// are added up in order. That order is the same in every tile, so a row of the result has the same
// bits alone, in any batch and in any thread.
#pragma once

#include "simd.hpp"

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

// c = from + a·b for rows at a[r] and the panel b, over count elements of k. Elements of a row of
// the left operand are kStride apart. from[r] may be null, for 0.
template <typename O, int kRows, int kStride>
[[gnu::noinline]] void tile(const typename O::Element* const* a, const typename O::Element* b,
                            int64_t count, const typename O::Sum* const* from,
                            typename O::Sum* const* c, int64_t columns) {
  using A = typename O::Sum;
  using V = Vec<A>;
  V sum[kRows][kTileVectors] = {};
  const typename O::Element* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  for (int64_t k = 0; k < count; ++k) {
    V right[kTileVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors; ++j)
      std::memcpy(&right[j], b + k * kPanel<A> + j * kLanes<A>, sizeof(V));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V left = O::splat_of(row[r] + k * kStride);
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j)
        sum[r][j] = O::multiply_add(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const A* const base = from[r];
    if (columns == kPanel<A>) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j) {
        V v = sum[r][j];
        if (base != nullptr) v = load(base + j * kLanes<A>, Whole{}).v[0] + v;
        store<false>(c[r] + j * kLanes<A>, Part<A, 1>{{v}}, Whole{});
      }
    } else {
      alignas(kVectorBytes) A all[kPanel<A>];
      std::memcpy(all, sum[r], sizeof all);
      for (int64_t i = 0; i < columns; ++i) c[r][i] = (base != nullptr ? base[i] : A{0}) + all[i];
    }
  }
}

template <typename O, int kStride>
void tile_of(int rows, const typename O::Element* const* a, const typename O::Element* b,
             int64_t count, const typename O::Sum* const* from, typename O::Sum* const* c,
             int64_t columns) {
  switch (rows) {
    case 1:
      return tile<O, 1, kStride>(a, b, count, from, c, columns);
    case 2:
      return tile<O, 2, kStride>(a, b, count, from, c, columns);
    case 3:
      return tile<O, 3, kStride>(a, b, count, from, c, columns);
    case 4:
      return tile<O, 4, kStride>(a, b, count, from, c, columns);
    case 5:
      return tile<O, 5, kStride>(a, b, count, from, c, columns);
    default:
      return tile<O, 6, kStride>(a, b, count, from, c, columns);
  }
}

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The right operand of a product, [depth, columns], in panels of kPanel columns; within a panel the
// rows follow one another. What is beyond the last column is 0, and so is the second half of the
// last pair where depth is odd.
template <typename O>
struct Packed {
  using Element = typename O::Element;
  static constexpr int64_t kWidth = kPanel<typename O::Sum>;
  Element* data = nullptr;
  int64_t depth = 0;  // in elements: numbers or pairs
  int64_t columns = 0;

  Packed(int64_t numbers, int64_t all_columns)
      : depth(parts_of(numbers, O::kPerElement)), columns(all_columns) {}
  [[nodiscard]] int64_t panels() const { return parts_of(columns, kWidth); }
  [[nodiscard]] int64_t elements() const { return panels() * depth * kWidth; }
  [[nodiscard]] Element* panel(int64_t p) const { return data + p * depth * kWidth; }
  [[nodiscard]] int64_t columns_of(int64_t p) const { return least(kWidth, columns - p * kWidth); }
};

// Rows [0, rows) of c = from + a·b in the panels [panel_begin, panel_end). a[i], from[i] and c[i] are
// where the rows begin; from is null for 0, and from[i] may be c[i]. The first `biases` rows... all
// rows share `bias` where it is not null, in place of from.
template <typename O>
void product(int64_t rows, const typename O::Element* const* a, const Packed<O>& b,
             const typename O::Sum* bias, bool add, typename O::Sum* const* c, int64_t panel_begin,
             int64_t panel_end) {
  using A = typename O::Sum;
  const int64_t blocks = parts_of(rows, kTileRows);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t column = p * kPanel<A>;
    for (int64_t k = 0; k == 0 || k < b.depth; k += O::kBlock) {
      const int64_t count = least(O::kBlock, b.depth - k);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * rows / blocks;  // tiles of about the same height
        const int64_t end = (block + 1) * rows / blocks;
        const typename O::Element* left[kTileRows];
        const A* from[kTileRows];
        A* to[kTileRows];
        for (int64_t i = begin; i < end; ++i) {
          left[i - begin] = a[i] + k;
          to[i - begin] = c[i] + column;
          from[i - begin] = k > 0 || add        ? to[i - begin]
                            : bias != nullptr ? bias + column
                                              : nullptr;
        }
        tile_of<O, 1>(static_cast<int>(end - begin), left, b.panel(p) + k * kPanel<A>, count, from,
                      to, b.columns_of(p));
      }
    }
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

// Packs panel p of the transpose of `matrix`, [columns, depth]: a row of it is a column here.
template <typename O, typename T>
void pack_transposed(const T* matrix, int64_t numbers, const Packed<O>& b, int64_t p) {
  using E = typename O::Element;
  constexpr int kCount = kLanes<typename O::Sum>;
  using V = typename VectorOf<E, kVectorBytes>::type;
  constexpr bool kNumbers = O::kPerElement == 1;
  E* const panel = b.panel(p);
  for (int64_t group = 0; group < b.kWidth; group += kCount) {
    const int64_t first = p * b.kWidth + group;
    for (int64_t k = 0; k < b.depth; k += kCount) {
      V v[kCount];
      const int64_t count = least(kCount * O::kPerElement, numbers - k * O::kPerElement);
      for (int i = 0; i < kCount; ++i) {
        v[i] = V{};
        if (first + i >= b.columns) continue;
        const T* const from = matrix + (first + i) * numbers + k * O::kPerElement;
        if constexpr (!kNumbers)
          std::memcpy(&v[i], from, static_cast<size_t>(count) * sizeof(T));
        else
          v[i] = count == kCount ? load(from, Whole{}).v[0] : load(from, First{count}).v[0];
      }
      transpose_by<kCount / 2>(v);
      for (int64_t i = 0; i < least(kCount, b.depth - k); ++i)
        std::memcpy(panel + (k + i) * b.kWidth + group, &v[i], sizeof(V));
    }
  }
}

// Packs columns [begin, begin + count) of rows that begin at row(k), into lines of kWidth; what is
// beyond count is 0.
template <int kWidth, typename T, typename Row>
void pack_rows(int64_t depth, const Row& row, int64_t begin, int64_t count, Accumulate<T>* to) {
  using A = Accumulate<T>;
  for (int64_t k = 0; k < depth; ++k) {
    const T* const from = static_cast<const T*>(row(k)) + begin;
    A* const line = to + k * kWidth;
    if constexpr (kWidth % kLanes<A> == 0) {
      if (count == kWidth) {
        for (int i = 0; i < kWidth; i += kLanes<A>)
          store<false>(line + i, load(from + i, Whole{}), Whole{});
        continue;
      }
    }
    for (int64_t i = 0; i < kWidth; ++i) line[i] = i < count ? load(from + i, First{1}).v[0][0] : A{0};
  }
}

// Packs panel p of a matrix [depth, columns] as it is.
template <typename A, typename T>
void pack_matrix(const T* matrix, const Packed<Numbers<A>>& b, int64_t p) {
  const auto row = [&](int64_t k) { return matrix + k * b.columns; };
  pack_rows<kPanel<A>, T>(b.depth, row, p * kPanel<A>, b.columns_of(p), b.panel(p));
}

}  // namespace layernorm::LAYERNORM_ISA
