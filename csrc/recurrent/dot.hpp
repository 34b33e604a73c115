// Products whose sums go along the rows of both operands, as PyTorch stores inputs and weights: a
// deep matrix is read where it lies, or packed by copying alone.
//
// Each element of a product is kGroup sums at once, of every kGroup-th element of k, added up in a
// fixed order at the end; in blocks of kBlock that are added up in order. That order is the same
// packed or not, in every tile, so a row of the result has the same bits alone, in any batch and in
// any thread.
#pragma once

#include "gemm.hpp"

namespace layernorm::LAYERNORM_ISA {

// Sums of one column, side by side, and columns in a vector.
template <typename A>
inline constexpr int kGroup = kVectorBytes == 64 ? kLanes<A> / 2 : kLanes<A>;
inline constexpr int kDotVectors = 4;
// Columns of a tile. Vector j has column j and, where it has two, column j + kDotVectors.
template <typename A>
inline constexpr int64_t kDotColumns = kDotVectors * kLanes<A> / kGroup<A>;
// Rows of a tile: as many as leave registers for the rest.
#if defined(LAYERNORM_AVX512) || defined(__ARM_NEON)
inline constexpr int kDotRows = 6;
#else
inline constexpr int kDotRows = 3;
#endif

// The group at p, in each half of a vector.
template <typename A>
LAYERNORM_INLINE Vec<A> repeat_group(const void* p) {
#if defined(LAYERNORM_AVX512)
  if constexpr (sizeof(A) == 8)
    return _mm512_broadcast_f64x4(_mm256_loadu_pd(static_cast<const double*>(p)));
  else
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(static_cast<const float*>(p)));
#else
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
#endif
}

// The groups at `low` and, where a vector has two, at `high`, as they are multiplied.
template <typename O, typename T>
LAYERNORM_INLINE Vec<typename O::Sum> load_groups(const T* low, const T* high) {
#if defined(LAYERNORM_AVX512)
  if constexpr (sizeof(T) == 2 && O::kPerElement == 1) {
    const auto first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    const auto second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    const auto both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    return widen(reinterpret_cast<Halves>(both), T{});
  } else if constexpr (sizeof(T) == 8) {
    return _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(low)), _mm256_loadu_pd(high),
                              1);
  } else {
    const auto first = _mm256_loadu_ps(reinterpret_cast<const float*>(low));
    const auto second = _mm256_loadu_ps(reinterpret_cast<const float*>(high));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
#else
  (void)high;
  return load(low, Whole{}).v[0];
#endif
}

// Lanes of a and b by turns, from every 16 bytes the lower or the upper half.
template <int kUpper, typename V, int... l>
LAYERNORM_INLINE V by_turns(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int kCount = sizeof...(l);
  constexpr int kPer = 16 / sizeof a[0];
  return __builtin_shufflevector(a, b,
                                 (l / kPer * kPer + kUpper * kPer / 2 + l % kPer / 2 +
                                  (kPer == 2 || l % 2 != 0 ? l % 2 * kCount : 0))...);
}
// The same halves of a and of b.
template <int kUpper, typename V, int... l>
LAYERNORM_INLINE V halves_of(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int kCount = sizeof...(l);
  return __builtin_shufflevector(a, b, (l / 4 * 4 + kUpper * 2 + l % 2 + l % 4 / 2 * kCount)...);
}
// Sums of neighbouring 16 bytes, in half as long a vector.
template <typename V, int... l>
LAYERNORM_INLINE auto add_neighbours(V v, std::integer_sequence<int, l...>) {
  constexpr int kPer = 16 / sizeof v[0];
  return __builtin_shufflevector(v, v, (l / kPer * 2 * kPer + l % kPer)...) +
         __builtin_shufflevector(v, v, (l / kPer * 2 * kPer + kPer + l % kPer)...);
}

// The sums of a tile's columns, in order.
template <typename A>
using DotSums = typename VectorOf<A, static_cast<int>(kDotColumns<A> * sizeof(A))>::type;

// Adds up the groups of four vectors.
template <typename A>
LAYERNORM_INLINE DotSums<A> add_groups(const Vec<A> (&v)[kDotVectors]) {
  constexpr Places<A> kAll;
  const auto pair = [&](int j) LAYERNORM_LAMBDA {
    return by_turns<0>(v[j], v[j + 1], kAll) + by_turns<1>(v[j], v[j + 1], kAll);
  };
  const auto whole = [&](Vec<A> sums) LAYERNORM_LAMBDA {
    if constexpr (kVectorBytes == 16)
      return sums;
    else
      return add_neighbours(sums, std::make_integer_sequence<int, kLanes<A> / 2>{});
  };
  const auto first = pair(0), second = pair(2);
  if constexpr (sizeof(A) == 4)
    return whole(halves_of<0>(first, second, kAll) + halves_of<1>(first, second, kAll));
  else if constexpr (kDotColumns<A> == 8)
    return __builtin_shufflevector(whole(first), whole(second), 0, 1, 4, 5, 2, 3, 6, 7);
  else
    return __builtin_shufflevector(whole(first), whole(second), 0, 1, 2, 3);
}

// Right operands, by panels of kDotColumns columns: packed, group after group with its vectors side
// by side, and zeros beyond the end;
template <typename O>
struct PackedGroups {
  using A = typename O::Sum;
  const typename O::Element* data;  // the first panel's element k
  int64_t panel_elements;

  // Vector j of the groups at element i.
  LAYERNORM_INLINE Vec<A> load(int64_t panel, int64_t i, int j) const {
    Vec<A> v;
    std::memcpy(&v, data + panel * panel_elements + i * kDotColumns<A> + j * kLanes<A>, sizeof v);
    return v;
  }
  Vec<A> load_last(int64_t panel, int64_t i, int j) const { return load(panel, i, j); }
};
// or rows of a matrix where they lie.
template <typename O, typename T>
struct RowsInPlace {
  using A = typename O::Sum;
  const T* data;  // element k of the first column
  int64_t stride;
  int64_t numbers;  // from element k on

  RowsInPlace(const T* rows, int64_t row_stride, int64_t all_numbers)
      : data(rows), stride(row_stride), numbers(all_numbers) {}

  // Vector j of the groups at element i.
  LAYERNORM_INLINE Vec<A> load(int64_t panel, int64_t i, int j) const {
    const T* const low = data + (panel * kDotColumns<A> + j) * stride + i * O::kPerElement;
    return load_groups<O>(low, low + kDotVectors * stride);
  }
  // Likewise where rows may end within the group and the panel has so many columns.
  Vec<A> load_some(int64_t panel, int64_t i, int j, int64_t columns) const {
    constexpr int kNumbers = kGroup<A> * O::kPerElement;
    const int64_t at = i * O::kPerElement;
    const auto bytes = static_cast<size_t>(least(kNumbers, numbers - at)) * sizeof(T);
    T some[2][kNumbers] = {};
    for (int half = 0; half < kDotColumns<A> / kDotVectors; ++half) {
      const int64_t column = j + half * kDotVectors;
      if (column < columns)
        std::memcpy(some[half], data + (panel * kDotColumns<A> + column) * stride + at, bytes);
    }
    return load_groups<O>(some[0], some[1]);
  }
  Vec<A> load_last(int64_t panel, int64_t i, int j) const {
    return load_some(panel, i, j, kDotColumns<A>);
  }
};

// c = onto + a·bᵀ over `count` elements of k, for the panels [begin, end) of b, of which the last
// has `last_columns`; the rows of a and c begin at a[r] + k and c[r].
template <typename O, int kRows, typename Right>
[[gnu::noinline]] void dot_tile(const typename O::Element* const* a, int64_t k, const Right& b,
                                int64_t count, Onto onto, const typename O::Sum* bias,
                                typename O::Sum* const* c, int64_t begin, int64_t end,
                                int64_t last_columns) {
  using E = typename O::Element;
  using A = typename O::Sum;
  constexpr int kStep = kGroup<A>;
  const Right right = b;
  const E* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a[r] + k;
  const int64_t whole = count / kStep * kStep;
  E rest[kRows][kStep];  // of the rows, and zeros
  if (whole < count) {
    std::memset(rest, 0, sizeof rest);
    for (int r = 0; r < kRows; ++r)
      std::memcpy(rest[r], row[r] + whole, static_cast<size_t>(count - whole) * sizeof(E));
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    Vec<A> sum[kRows][kDotVectors] = {};
    for (int64_t i = 0; i < whole; i += kStep) {
      Vec<A> columns[kDotVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kDotVectors; ++j) columns[j] = right.load(panel, i, j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> left = repeat_group<A>(row[r] + i);
#pragma GCC unroll 8
        for (int j = 0; j < kDotVectors; ++j)
          sum[r][j] = O::multiply_add(left, columns[j], sum[r][j]);
      }
    }
    if (whole < count) {
      Vec<A> columns[kDotVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kDotVectors; ++j) columns[j] = right.load_last(panel, whole, j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> left = repeat_group<A>(rest[r]);
#pragma GCC unroll 8
        for (int j = 0; j < kDotVectors; ++j)
          sum[r][j] = O::multiply_add(left, columns[j], sum[r][j]);
      }
    }
    const int64_t column = panel * kDotColumns<A>;
    const int64_t columns = panel + 1 == end ? last_columns : kDotColumns<A>;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      DotSums<A> sums = add_groups<A>(sum[r]);
      A* const to = c[r] + column;
      const A* const base = onto == Onto::kSelf ? to : bias + column;
      if (columns == kDotColumns<A>) {
        DotSums<A> below;
        if (onto != Onto::kZero) {
          std::memcpy(&below, base, sizeof below);
          sums = below + sums;
        }
        std::memcpy(to, &sums, sizeof sums);
      } else {
        A all[kDotColumns<A>];
        std::memcpy(all, &sums, sizeof sums);
        for (int64_t j = 0; j < columns; ++j)
          to[j] = onto == Onto::kZero ? all[j] : base[j] + all[j];
      }
    }
  }
}

template <typename O, typename... Arguments>
LAYERNORM_INLINE void dot_tile_of(int64_t rows, const typename O::Element* const* a,
                                  const Arguments&... arguments) {
  of_height(rows, [&](auto height) LAYERNORM_LAMBDA {
    if constexpr (height <= kDotRows) dot_tile<O, height>(a, arguments...);
  });
}

}  // namespace layernorm::LAYERNORM_ISA
