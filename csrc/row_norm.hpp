// One row of a layer norm: statistics, then the affine output.
//
// The order in which a row is summed depends on its width alone, so a row gives the same bits
// whatever batch it is in and however many threads there are. No framework header: plain C++20.
#pragma once

#include <cmath>
#include <cstdint>

namespace layernorm {

// Partial sums that run side by side: four vectors of 8 floats, two of 16.
inline constexpr int kLanes = 32;

struct RowStats {
  float mean;
  float rstd;  // reciprocal standard deviation, 1 / sqrt(var + eps)
};

// Adds the lanes pairwise: 64 -> 32 -> ... -> 1.
[[gnu::always_inline]] inline float add_lanes(float (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// mean = sum(x) / width, var = sum((x - mean)^2) / width. x[width], width >= 1.
// The second pass measures what the rounded mean missed and takes it out of both, so a large offset
// costs no more than the rounding of the input itself.
[[gnu::always_inline]] inline RowStats row_statistics(const float* __restrict x, int64_t width,
                                                      float eps) {
  const auto n = static_cast<float>(width);
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
  for (int lane = 0; i + lane < width; ++lane) lanes[lane] += x[i + lane];
  const float rounded = add_lanes(lanes) / n;

  float rests[kLanes] = {};
  float squares[kLanes] = {};
  const auto add = [&](int lane, float a) {
    const float rest = a - rounded;
    rests[lane] += rest;
    squares[lane] += rest * rest;
  };
  for (i = 0; i + kLanes <= width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(lane, x[i + lane]);
  for (int lane = 0; i + lane < width; ++lane) add(lane, x[i + lane]);
  const float rest = add_lanes(rests) / n;
  const float var = add_lanes(squares) / n - rest * rest;
  return {rounded + rest, 1.0F / std::sqrt(var + eps)};
}

// y = (x - mean) * rstd * gain + bias. x, y, gain, bias: [width]; gain and bias may be null.
[[gnu::always_inline]] inline void row_forward(const float* __restrict x,
                                               const float* __restrict gain,
                                               const float* __restrict bias, float* __restrict y,
                                               int64_t width, RowStats stats) {
  const auto [mean, rstd] = stats;
  if (gain != nullptr && bias != nullptr) {
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * rstd * gain[i] + bias[i];
  } else if (gain != nullptr) {
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * rstd * gain[i];
  } else if (bias != nullptr) {
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * rstd + bias[i];
  } else {
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * rstd;
  }
}

}  // namespace layernorm
