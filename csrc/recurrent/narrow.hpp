// Weights of streams in fewer bytes than the rows they meet: bfloat16, or int8 with a scale for
// each column of the product. For a row or a few, reading the weights is what takes the time.
#pragma once

#include "gemm.hpp"

namespace layernorm::LAYERNORM_ISA {

// ---- bfloat16: as a panel of numbers, but two vectors side by side share their words ----

// Packs the columns [begin, end) of the transpose of a matrix, whose rows are columns here.
inline void pack_bfloat16(const float* matrix, int64_t numbers, int64_t begin, int64_t end,
                          bfloat16* panel) {
  constexpr int kCount = kLanes<float>;
  for (int64_t group = 0; group < kPanel<float>; group += 2 * kCount) {
    for (int64_t k = 0; k < numbers; k += kCount) {
      Vec<float> even[kCount], odd[kCount];
      load_transposed<Numbers<float>>(matrix, numbers, k, begin + group, end, even);
      load_transposed<Numbers<float>>(matrix, numbers, k, begin + group + kCount, end, odd);
      for (int64_t i = 0; i < least(kCount, numbers - k); ++i) {
        const Words words = narrow_even_odd(even[i], odd[i]);
        std::memcpy(panel + (k + i) * kPanel<float> + group, &words, sizeof words);
      }
    }
  }
}

// ---- int8: rows become int16 with a scale for each; sums of a block are exact integers ----

using Integers = Vec<int32_t>;
constexpr float kMostInt8 = 127, kMostInt16 = 32767;
// So many products of the largest numbers are less than 2^31.
inline constexpr int64_t kExactSum = 512;
static_assert(kExactSum * 127 * 32767 < (int64_t{1} << 31));

// Adds the products of pairs of int16.
LAYERNORM_INLINE Integers add_pairs(Integers a, Integers b, Integers sum) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpwssd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(LAYERNORM_AVX512)
  return sum + reinterpret_cast<Integers>(
                   _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(LAYERNORM_AVX2)
  return sum + reinterpret_cast<Integers>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<Integers>(
                   _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
// As many pairs of int8, as pairs of int16.
LAYERNORM_INLINE Integers load_pairs(const int8_t* p) {
#if defined(LAYERNORM_AVX512)
  const auto bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Integers>(_mm512_cvtepi8_epi16(bytes));
#elif defined(LAYERNORM_AVX2)
  const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Integers>(_mm256_cvtepi8_epi16(bytes));
#else
  VectorOf<int8_t, kVectorBytes / 2>::type bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return reinterpret_cast<Integers>(
      __builtin_convertvector(bytes, VectorOf<int16_t, kVectorBytes>::type));
#endif
}

// Packs likewise; the columns' scales go to `scales`. Pair after pair of k, in each all columns.
inline void pack_int8(const float* matrix, int64_t numbers, int64_t begin, int64_t end,
                      int8_t* panel, float* scales) {
  std::memset(panel, 0, static_cast<size_t>(parts_of(numbers, 2) * 2 * kPanel<float>));
  for (int64_t column = begin; column < end; ++column) {
    const float* const row = matrix + column * numbers;
    float most = 0;
    for (int64_t k = 0; k < numbers; ++k)
      if (!(std::fabs(row[k]) <= most)) most = std::fabs(row[k]);  // a NaN stays
    const float scale = most / kMostInt8;
    scales[column - begin] = scale;
    if (!(scale > 0) || std::isinf(scale)) continue;
    int8_t* const to = panel + 2 * (column - begin);
    for (int64_t k = 0; k < numbers; ++k)
      to[k / 2 * 2 * kPanel<float> + k % 2] = static_cast<int8_t>(std::nearbyint(row[k] / scale));
  }
}

// Rows as int16, each with its scale; one with an infinity or a NaN has zeros and the scale NaN.
struct NarrowRows {
  int16_t* data;
  float* scales;
  int64_t stride;

  static int64_t floats(int64_t rows, int64_t numbers) {
    return rows * (stride_of(numbers) / 2 + 1);
  }
  NarrowRows(int64_t rows, int64_t numbers, float* memory)
      : data(reinterpret_cast<int16_t*>(memory + rows)),
        scales(memory),
        stride(stride_of(numbers)) {}

  void set(int64_t i, const float* row, int64_t numbers) const {
    Vec<float> most = {}, zero = {};
    each_vector<float>(numbers, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
      const Vec<float> v = load(row + k, part).v[0];
      const Vec<float> magnitude = v < 0 ? -v : v;
      most = magnitude > most ? magnitude : most;
      zero += v * splat(0.0F);
    });
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane)
      largest = most[lane] > largest ? most[lane] : largest;
    const bool is_bad = add_lanes(zero) != 0;  // a NaN then
    // Rows of numbers so small are as good as zero beside any other summand of the gates.
    const bool is_zero = !(largest > 0x1p-100F);
    scales[i] = is_bad ? std::nanf("") : is_zero ? 0.0F : largest / kMostInt16;
    const float factor = is_bad || is_zero ? 0.0F : kMostInt16 / largest;
    int16_t* const to = data + i * stride;
    std::memset(to + numbers / kLanes<float> * kLanes<float>, 0,
                static_cast<size_t>(stride - numbers / kLanes<float> * kLanes<float>) * 2);
    each_vector<float>(is_bad ? 0 : numbers, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
      constexpr float kToInteger = 0x1.8p23F;  // whose unit in the last place is 1
      const Vec<float> v = load(row + k, part).v[0] * splat(factor) + splat(kToInteger);
      const auto whole = __builtin_convertvector(v - splat(kToInteger), Integers);
      const auto shorts = __builtin_convertvector(whole, VectorOf<int16_t, kVectorBytes / 2>::type);
      std::memcpy(to + k, &shorts, sizeof shorts);
    });
    if (is_bad) std::memset(to, 0, static_cast<size_t>(stride) * 2);
  }

 private:
  // Whole vectors, so that the last one may be written whole.
  static int64_t stride_of(int64_t numbers) {
    return parts_of(numbers, kLanes<float>) * kLanes<float>;
  }
};

// c = onto + a·b for the `columns` first columns of a panel of int8.
template <int kRows>
[[gnu::noinline]] void int8_tile(const NarrowRows& a, int64_t first, const int8_t* b,
                                 const float* scales, int64_t numbers, Onto onto, const float* bias,
                                 float* const* c, int64_t column, int64_t columns) {
  // Of few rows several sums at once, which have not to wait for one another: they are exact.
  constexpr int kSums = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  Vec<float> sum[kRows][kTileVectors] = {};
  const int16_t* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a.data + (first + r) * a.stride;
  for (int64_t k = 0; k < numbers; k += kExactSum) {
    const int64_t pairs = parts_of(least(kExactSum, numbers - k), 2);
    Integers exact[kSums][kRows][kTileVectors] = {};
    const auto add = [&](int64_t i, int which) LAYERNORM_LAMBDA {
      Integers right[kTileVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j)
        right[j] = load_pairs(b + 2 * ((k / 2 + i) * kPanel<float> + j * kLanes<float>));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, row[r] + k + 2 * i, sizeof pair);
        const Integers left = pair - Integers{};
#pragma GCC unroll 8
        for (int j = 0; j < kTileVectors; ++j)
          exact[which][r][j] = add_pairs(left, right[j], exact[which][r][j]);
      }
    };
    int64_t i = 0;
    for (; i + kSums <= pairs; i += kSums)
#pragma GCC unroll 4
      for (int which = 0; which < kSums; ++which) add(i + which, which);
    for (; i < pairs; ++i) add(i, 0);
#pragma GCC unroll 4
    for (int which = 1; which < kSums; ++which)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kTileVectors; ++j) exact[0][r][j] += exact[which][r][j];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors; ++j)
        sum[r][j] += __builtin_convertvector(exact[0][r][j], Vec<float>);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    alignas(kVectorBytes) float all[kPanel<float>];
    std::memcpy(all, sum[r], sizeof all);
    float* const to = c[first + r] + column;
    const float* const below = onto == Onto::kSelf   ? to
                               : onto == Onto::kBias ? bias + column
                                                     : nullptr;
    each_vector<float>(columns, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      const auto found = load(all + i, part) * load(scales + i, part) * a.scales[first + r];
      put(to + i, below == nullptr ? found : load(below + i, part) + found, part);
    });
  }
}

}  // namespace layernorm::LAYERNORM_ISA
