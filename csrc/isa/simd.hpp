// Vectors of float or double, and rows of float16 and bfloat16 read and written as such.
//
// Built on the vector extensions of GCC and Clang: this file is compiled once for each instruction
// set, into a namespace of its own (LAYERNORM_ISA), with the widest vectors that the set has.
// Intrinsics appear only where the extensions have no word for an instruction. Products are fused
// with sums by fma() alone, never by the compiler's choice (-ffp-contract=off), so that every
// instantiation of a loop rounds alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "norm/norm.hpp"

#if defined(LAYERNORM_SANITIZE)  // see CMakeLists.txt
#define LAYERNORM_INLINE inline
#define LAYERNORM_LAMBDA
#else
#define LAYERNORM_INLINE [[gnu::always_inline]] inline
#define LAYERNORM_LAMBDA __attribute__((always_inline))
#endif

namespace layernorm::LAYERNORM_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LAYERNORM_AVX512 1
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LAYERNORM_AVX2 1
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// What an element of type T is computed in.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A, int kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
};
// A vector of kLanes<A> elements.
template <typename A>
using Vec = typename VectorOf<A, kVectorBytes>::type;
using Words = Vec<uint32_t>;
// kLanes<float> half-precision numbers as they lie in memory.
using Halves = typename VectorOf<uint16_t, kVectorBytes / 2>::type;
template <typename T>
using Raw = std::conditional_t<sizeof(T) == 2, Halves, Vec<Accumulate<T>>>;

template <typename A>
LAYERNORM_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};  // not a + 0, which would turn -0 into 0
}

// a * b + c, rounded once where the instruction set can.
LAYERNORM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(LAYERNORM_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(LAYERNORM_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

LAYERNORM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(LAYERNORM_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(LAYERNORM_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger and the smaller of each lane and a number; a NaN stays one.
LAYERNORM_INLINE Vec<float> at_least(Vec<float> v, float least) {
#if defined(LAYERNORM_AVX512)
  return _mm512_max_ps(splat(least), v);
#elif defined(LAYERNORM_AVX2)
  return _mm256_max_ps(splat(least), v);
#else
  return v < splat(least) ? splat(least) : v;
#endif
}
LAYERNORM_INLINE Vec<float> at_most(Vec<float> v, float most) {
#if defined(LAYERNORM_AVX512)
  return _mm512_min_ps(splat(most), v);
#elif defined(LAYERNORM_AVX2)
  return _mm256_min_ps(splat(most), v);
#else
  return v > splat(most) ? splat(most) : v;
#endif
}
LAYERNORM_INLINE Vec<double> at_least(Vec<double> v, double least) {
  return v < splat(least) ? splat(least) : v;
}
LAYERNORM_INLINE Vec<double> at_most(Vec<double> v, double most) {
  return v > splat(most) ? splat(most) : v;
}

// Adds the lanes pairwise: 16 -> 8 -> ... -> 1.
template <int... kIndex, typename V>
LAYERNORM_INLINE auto add_halves(V v, std::integer_sequence<int, kIndex...>) {
  constexpr int kHalf = sizeof...(kIndex);
  return __builtin_shufflevector(v, v, kIndex...) +
         __builtin_shufflevector(v, v, kIndex + kHalf...);
}
template <typename V>
LAYERNORM_INLINE auto add_lanes(V v) {
  constexpr int kCount = sizeof v / sizeof v[0];
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    return add_lanes(add_halves(v, std::make_integer_sequence<int, kCount / 2>{}));
  }
}

// ---- one number of half precision: where there is no instruction for it ----

LAYERNORM_INLINE float widen(float16 a) {
  // A float16's exponent and mantissa, put where a float32 has them, are the number times 2^-112.
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000U) << 16U;
  uint32_t bits = static_cast<uint32_t>(a.bits & 0x7fffU) << 13U;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude *= 0x1p112F;
  std::memcpy(&bits, &magnitude, 4);
  if ((a.bits & 0x7c00U) == 0x7c00U) bits |= 0x7f800000U;  // infinity or NaN
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

LAYERNORM_INLINE uint16_t narrow_to_float16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  const uint32_t sign = (bits >> 16U) & 0x8000U;
  bits &= 0x7fffffffU;
  if (bits > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);   // NaN
  if (bits >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to infinity
  if (bits < 0x38800000U) {  // below 2^-14: a subnormal float16, a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5F;  // whose unit in the last place is 2^-24: rounds to nearest, ties to even
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000U));
  }
  bits += 0xfffU + ((bits >> 13U) & 1U);  // to nearest, ties to even
  return static_cast<uint16_t>(sign | ((bits - 0x38000000U) >> 13U));
}

// Not inlined: there are many calls, and none of them will be fast.
[[gnu::noinline]] inline Vec<float> widen_each(Halves raw) {
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen(float16{raw[lane]});
  return v;
}
[[gnu::noinline]] inline Halves narrow_each(Vec<float> v) {
  Halves raw;
  for (int lane = 0; lane < kLanes<float>; ++lane) raw[lane] = narrow_to_float16(v[lane]);
  return raw;
}

// ---- vectors as they lie in memory, and as they are computed with ----

LAYERNORM_INLINE Vec<float> widen(Vec<float> raw, float) { return raw; }
LAYERNORM_INLINE Vec<double> widen(Vec<double> raw, double) { return raw; }
LAYERNORM_INLINE Vec<float> widen(Halves raw, bfloat16) {
#if defined(LAYERNORM_AVX512)
  const auto words = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(raw)));
#elif defined(LAYERNORM_AVX2)
  const auto words = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(raw)));
#else
  const auto words = __builtin_convertvector(raw, Words);
#endif
  return reinterpret_cast<Vec<float>>(words << 16);
}
LAYERNORM_INLINE Vec<float> widen(Halves raw, float16) {
#if defined(LAYERNORM_AVX512)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(raw));
#elif defined(LAYERNORM_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(raw));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(raw));
#else
  return widen_each(raw);
#endif
}

LAYERNORM_INLINE Vec<float> narrow(Vec<float> v, float) { return v; }
LAYERNORM_INLINE Vec<double> narrow(Vec<double> v, double) { return v; }
// Rounds to bfloat16, to nearest and ties to even; the result is in the upper half of each word.
LAYERNORM_INLINE Words round_to_bfloat16(Vec<float> v) {
  const auto bits = reinterpret_cast<Words>(v);
  const Words rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  const auto nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return nan ? (bits & 0x80000000U) | 0x7fc00000U : rounded;
}
// The instruction takes subnormal numbers for zero: those go the other way.
#if defined(LAYERNORM_AVX512) && defined(__AVX512BF16__)
LAYERNORM_INLINE __mmask16 subnormal_lanes(Vec<float> v) {
  constexpr int kSubnormal = 0x20;
  return _mm512_fpclass_ps_mask(v, kSubnormal);
}
#endif
LAYERNORM_INLINE Halves narrow(Vec<float> v, bfloat16) {
#if defined(LAYERNORM_AVX512) && defined(__AVX512BF16__)
  if (__builtin_expect(subnormal_lanes(v) == 0, 1))
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(v));
#endif
  return __builtin_convertvector(round_to_bfloat16(v) >> 16, Halves);
}
// Two vectors of bfloat16, even and odd elements, as they lie in memory.
LAYERNORM_INLINE Words narrow_even_odd(Vec<float> even, Vec<float> odd) {
#if defined(LAYERNORM_AVX512) && defined(__AVX512BF16__)
  if (__builtin_expect(_kortestz_mask16_u8(subnormal_lanes(even), subnormal_lanes(odd)), 1)) {
    using All = VectorOf<uint16_t, kVectorBytes>::type;
    const auto both = reinterpret_cast<All>(_mm512_cvtne2ps_pbh(odd, even));
    return reinterpret_cast<Words>(
        __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
#endif
  return (round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000U);
}
LAYERNORM_INLINE Halves narrow(Vec<float> v, float16) {
#if defined(LAYERNORM_AVX512)
  return reinterpret_cast<Halves>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(LAYERNORM_AVX2)
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return reinterpret_cast<Halves>(vcvt_f16_f32(v));
#else
  return narrow_each(v);
#endif
}

}  // namespace layernorm::LAYERNORM_ISA
