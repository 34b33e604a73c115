// Vectors of sigmoid and tanh.
//
// Both come from one exponential of a number that is not positive, and so neither overflows. The
// error is at most 2 units in the last place for sigmoid and 3 for tanh in float, 2 and 3 in double,
// over all of their range, denormal results aside (tests/test_recurrent_kernels.py). A NaN stays one.
#pragma once

#include "simd.hpp"

namespace layernorm::LAYERNORM_ISA {

template <typename A>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr int kDegree = 7;  // the rest of the series is below 2^-26 of the sum
  static constexpr int kMantissa = 23;
  static constexpr float kLeast = -87.0F;     // below, 2^n would be denormal
  static constexpr float kRounder = 0x1.8p23F;  // a sum with it is rounded to an integer
  static constexpr Bits kBias = 127;
  static constexpr float kLog2High = 0x1.62e4p-1F, kLog2Low = 0x1.7f7d1cp-20F;
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13;
  static constexpr int kMantissa = 52;
  static constexpr double kLeast = -708.0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr Bits kBias = 1023;
  static constexpr double kLog2High = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
};

template <typename A, int k>
inline constexpr A kInverseFactorial = kInverseFactorial<A, k - 1> / A(k);
template <typename A>
inline constexpr A kInverseFactorial<A, 0> = A(1);

// The terms of the exponential series from r^k/k! on, divided by r^k.
template <typename A, int k>
LAYERNORM_INLINE Vec<A> series(Vec<A> r) {
  if constexpr (k == Exponential<A>::kDegree)
    return splat(kInverseFactorial<A, k>);
  else
    return fma(series<A, k + 1>(r), r, splat(kInverseFactorial<A, k>));
}

// 2^n and e^r - 1 with n·log 2 + r = y, for y <= 0.
template <typename A>
struct Power {
  Vec<A> scale;
  Vec<A> rest;
};
template <typename A>
LAYERNORM_INLINE Power<A> power(Vec<A> y) {
  using E = Exponential<A>;
  using Bits = Vec<typename E::Bits>;
  y = y < splat(E::kLeast) ? splat(E::kLeast) : y;
  const Vec<A> shifted = fma(y, splat(A(1.4426950408889634)), splat(E::kRounder));
  const Vec<A> n = shifted - splat(E::kRounder);
  const Vec<A> r = fma(n, splat(-E::kLog2Low), fma(n, splat(-E::kLog2High), y));
  const Bits scale = (reinterpret_cast<Bits>(shifted) + E::kBias) << E::kMantissa;
  return {reinterpret_cast<Vec<A>>(scale), fma(r * r, series<A, 2>(r), r)};
}

template <typename A>
LAYERNORM_INLINE Vec<A> minus_magnitude(Vec<A> v) {
  using Bits = Vec<typename Exponential<A>::Bits>;
  constexpr auto kSign = typename Exponential<A>::Bits{1} << (8 * sizeof(A) - 1);
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(v) | kSign);
}

template <typename A>
LAYERNORM_INLINE Vec<A> sigmoid(Vec<A> x) {
  const auto p = power<A>(minus_magnitude<A>(x));
  const Vec<A> e = fma(p.rest, p.scale, p.scale);
  return (x < Vec<A>{} ? e : splat(A{1})) / (splat(A{1}) + e);
}

template <typename A>
LAYERNORM_INLINE Vec<A> tanh(Vec<A> x) {
  using Bits = Vec<typename Exponential<A>::Bits>;
  constexpr auto kSign = typename Exponential<A>::Bits{1} << (8 * sizeof(A) - 1);
  const auto p = power<A>(minus_magnitude<A>(x) * splat(A{2}));
  // e^-2|x| - 1, exact to the last places near 0 too, where scale is 1.
  const Vec<A> less = fma(p.rest, p.scale, p.scale - splat(A{1}));
  const Vec<A> magnitude = less / (splat(A{-2}) - less);
  return reinterpret_cast<Vec<A>>((reinterpret_cast<Bits>(magnitude) & ~kSign) |
                                  (reinterpret_cast<Bits>(x) & kSign));
}

}  // namespace layernorm::LAYERNORM_ISA
