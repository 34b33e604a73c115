// Sigmoid and tanh of several vectors in step: each is a long chain of dependent instructions, and
// chains side by side fill the time that one waits.
//
// Both come from one exponential. The error is at most 3 units in the last place, in float and in
// double (tests/recurrent/test_activations.py has the largest found); but the sigmoid ends at
// e^-kMost, below which it does not fall. A NaN stays one.
#pragma once

#include "part.hpp"

namespace layernorm::LAYERNORM_ISA {

template <typename A>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kMost = 87.0F;         // beyond, 2^n would not be a normal number
  static constexpr float kRounder = 0x1.8p23F;  // a sum with it is rounded to an integer
  static constexpr Bits kBias = 127;
  static constexpr float kLog2High = 0x1.62e4p-1F, kLog2Low = 0x1.7f7d1cp-20F;
  // (e^r - 1 - r)/r^2 within 1.4e-8 of r for |r| <= log(2)/2: by linear programming.
  static constexpr float kSeries[] = {0.5F, 0x1.5554aep-3F, 0x1.555486p-5F, 0x1.12288p-7F,
                                      0x1.6d99c2p-10F};
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kMost = 708.0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr Bits kBias = 1023;
  static constexpr double kLog2High = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
  // Taylor's: 1/2!, 1/3!, ...
  static constexpr double kSeries[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// 2^n and e^r - 1 with n·log 2 + r = y, for y between -kMost and kMost.
template <typename A, int k>
struct Power {
  Part<A, k> scale;
  Part<A, k> rest;
};
template <typename A, int k>
LAYERNORM_INLINE Power<A, k> power(const Part<A, k>& y) {
  using E = Exponential<A>;
  using Bits = Vec<typename E::Bits>;
  const auto shifted = fma(y, A(1.4426950408889634), A(E::kRounder));
  const auto n = shifted - E::kRounder;
  const auto r = fma(n, -E::kLog2Low, fma(n, -E::kLog2High, y));
  constexpr int kTerms = sizeof E::kSeries / sizeof(A);
  auto sum = each<A, k>([&](int) { return splat(E::kSeries[kTerms - 1]); });
#pragma GCC unroll 16
  for (int term = kTerms - 2; term >= 0; --term)
    sum = each<A, k>([&](int i) { return fma(sum.v[i], r.v[i], splat(E::kSeries[term])); });
  const auto scale = each<A, k>([&](int i) {
    return reinterpret_cast<Vec<A>>((reinterpret_cast<Bits>(shifted.v[i]) + E::kBias)
                                    << E::kMantissa);
  });
  return {scale, fma(r * r, sum, r)};
}

template <typename A>
inline constexpr auto kSignBit = typename Exponential<A>::Bits{1} << (8 * sizeof(A) - 1);

// Between -kMost and kMost, with the sign turned.
template <typename A>
LAYERNORM_INLINE Vec<A> minus_bounded(Vec<A> x) {
  constexpr A kMost = Exponential<A>::kMost;
  return at_least(at_most(-x, kMost), -kMost);
}
// -2|x|, at least -kMost.
template <typename A>
LAYERNORM_INLINE Vec<A> minus_twice_magnitude(Vec<A> x) {
  using Bits = Vec<typename Exponential<A>::Bits>;
  const auto less = reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(x) | kSignBit<A>);
  return at_least(less + less, -Exponential<A>::kMost);
}
template <typename A>
LAYERNORM_INLINE Vec<A> with_sign_of(Vec<A> magnitude, Vec<A> sign) {
  using Bits = Vec<typename Exponential<A>::Bits>;
  return reinterpret_cast<Vec<A>>((reinterpret_cast<Bits>(magnitude) & ~kSignBit<A>) |
                                  (reinterpret_cast<Bits>(sign) & kSignBit<A>));
}

// A quotient that is not divided yet: of a product of such one division is enough. `below` is at
// most 2^126, a sigmoid's, or 2, a tanh's.
template <typename A, int k>
struct Quotient {
  Part<A, k> above, below;
  [[nodiscard]] LAYERNORM_INLINE Part<A, k> divided() const { return above / below; }
};

// Of each vector of x the sigmoid, or where its bit in kTanh is set the tanh.
template <unsigned kTanh, typename A, int k>
LAYERNORM_INLINE Quotient<A, k> activation(const Part<A, k>& x) {
  const auto is_tanh = [](int i) { return (kTanh >> i & 1U) != 0; };
  const auto y = each<A, k>([&](int i) {
    return is_tanh(i) ? minus_twice_magnitude<A>(x.v[i]) : minus_bounded<A>(x.v[i]);
  });
  const auto p = power<A, k>(y);
  // Of tanh e^y - 1, which is exact to the last places near 0 too, where scale is 1.
  const auto e = each<A, k>([&](int i) {
    const Vec<A> base = is_tanh(i) ? p.scale.v[i] - splat(A{1}) : p.scale.v[i];
    return fma(p.rest.v[i], p.scale.v[i], base);
  });
  return {
      each<A, k>([&](int i) { return is_tanh(i) ? with_sign_of<A>(e.v[i], x.v[i]) : splat(A{1}); }),
      each<A, k>([&](int i) { return splat(is_tanh(i) ? A{2} : A{1}) + e.v[i]; })};
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> sigmoid(const Part<A, k>& x) {
  return activation<0U, A, k>(x).divided();
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> tanh(const Part<A, k>& x) {
  return activation<~0U, A, k>(x).divided();
}

}  // namespace layernorm::LAYERNORM_ISA
