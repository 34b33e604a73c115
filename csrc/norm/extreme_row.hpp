// One row whose squares its type cannot hold, or with an infinity or a NaN, or of one element, in
// double and element by element: rare, so it may take its time. A power of two brings the row's
// largest element near 1.
#pragma once

#include "isa/part.hpp"

namespace layernorm::LAYERNORM_ISA {

// Statistics of scale·a.
struct ScaledStats {
  double mean;
  double rstd;
  double scale;
};

template <typename T>
double as_double(const T* p) {
  return static_cast<double>(load(p, First{1}).v[0][0]);
}
template <typename T>
void from_double(T* p, double a) {
  const auto rounded = static_cast<Accumulate<T>>(a);
  store<false>(p, Part<Accumulate<T>, 1>{{splat(rounded)}}, First{1});
}

template <typename T, bool kCentred>
ScaledStats extreme_statistics(const T* a, int64_t width, double eps) {
  double most = 0;
  for (int64_t i = 0; i < width; ++i) most = std::fmax(most, std::fabs(as_double(a + i)));
  int exponent = 0;
  if (most > 0 && std::isfinite(most)) std::frexp(most, &exponent);
  exponent = exponent < -1000 ? -1000 : exponent;  // so that the scale is a finite number
  const double scale = std::ldexp(1.0, -exponent);
  const auto n = static_cast<double>(width);
  double mean = 0;
  if (kCentred) {
    for (int64_t i = 0; i < width; ++i) mean += as_double(a + i) * scale;
    mean /= n;
  }
  double squares = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double rest = as_double(a + i) * scale - mean;
    squares += rest * rest;
  }
  // Neither square need be in range: of a constant row the first is 0, and the other may be tiny.
  return {mean, 1.0 / std::hypot(std::sqrt(squares / n), std::sqrt(eps) * scale), scale};
}

template <typename T, typename P>
void extreme_output(const T* a, const P* gain, const P* bias, T* output, int64_t width,
                    const ScaledStats& stats) {
  for (int64_t i = 0; i < width; ++i) {
    double v = (as_double(a + i) * stats.scale - stats.mean) * stats.rstd;
    if (gain != nullptr) v *= as_double(gain + i);
    if (bias != nullptr) v += as_double(bias + i);
    from_double(output + i, v);
  }
}

// Where element i of a row of type T stands among the sums for a block.
template <typename T>
int64_t place(int64_t i, int64_t width) {
  constexpr int64_t kPair = 2 * kLanes<Accumulate<T>>;
  const int64_t pair = i / kPair * kPair;
  if (!kEvenOdd<T> || pair + kPair > width) return i;
  return pair + (i - pair) / 2 + (i - pair) % 2 * (kPair / 2);
}

// As rows_backward() in row_norm.hpp. Where rstd left the range of its type, which takes a row of
// denormal numbers without eps, the row is measured again.
template <typename T, typename P, bool kCentred>
void extreme_backward(const T* grad, const T* grad_sum, const T* input, double mean, double rstd,
                      const P* gain, T* grad_input, Accumulate<T>* block_gain,
                      Accumulate<T>* block_bias, int64_t width) {
  using A = Accumulate<T>;
  const double scale = rstd < 0x1p-256 ? 0x1p-512 : 1.0;  // a difference stays in range
  const bool again = std::isinf(rstd);
  const auto stats = again ? extreme_statistics<T, kCentred>(input, width, 0.0)
                           : ScaledStats{mean * scale, rstd / scale, scale};
  const auto normalized = [&](int64_t i) {
    return (as_double(input + i) * stats.scale - stats.mean) * stats.rstd;
  };
  const auto t = [&](int64_t i) {
    return as_double(grad + i) * (gain == nullptr ? 1.0 : as_double(gain + i));
  };
  double sum_t = 0;
  double sum_tn = 0;
  for (int64_t i = 0; i < width; ++i) {
    if (kCentred) sum_t += t(i);
    sum_tn += t(i) * normalized(i);
    if (block_gain != nullptr)
      block_gain[place<T>(i, width)] += static_cast<A>(as_double(grad + i) * normalized(i));
    if (block_bias != nullptr)
      block_bias[place<T>(i, width)] += static_cast<A>(as_double(grad + i));
  }
  if (grad_input == nullptr) return;
  const auto n = static_cast<double>(width);
  for (int64_t i = 0; i < width; ++i) {
    double d = t(i) - sum_t / n - normalized(i) * (sum_tn / n);
    d = again ? d * stats.rstd * stats.scale : d * rstd;
    if (grad_sum != nullptr) d += as_double(grad_sum + i);
    from_double(grad_input + i, d);
  }
}

}  // namespace layernorm::LAYERNORM_ISA
