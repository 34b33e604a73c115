// A few rows of a layer norm or RMS norm side by side: statistics, output, derivative.
//
// The order in which a row is summed depends on its width alone, not on how many rows stand beside
// it, so a row gives the same bits whatever batch it is in and however many threads there are.
#pragma once

#include <limits>

#include "isa/part.hpp"

namespace layernorm::LAYERNORM_ISA {

// Rows that are worked on together: while one waits for its sums, another goes on, and they share
// what is read of gain and bias. Four need the registers of AVX-512.
#if defined(LAYERNORM_AVX512)
inline constexpr int kTogether = 4;
#else
inline constexpr int kTogether = 2;
#endif

// How many elements are summed in vectors, 32 in each lane of a pair, before the sums are put
// together in double; the squares by eights, so that none of them is rounded more than 12 times.
template <typename T>
inline constexpr int64_t kChunk = 2 * kLanes<Accumulate<T>> * 32;
template <typename T>
inline constexpr int64_t kEight = 2 * kLanes<Accumulate<T>> * 8;

// Two sums side by side: the vectors of a pair go to one each, a whole vector to the first, the
// first few elements of one to the second.
template <typename A>
struct Sums {
  Vec<A> v[2] = {};
  LAYERNORM_INLINE void add(const Part<A, 2>& a, Pair) { v[0] += a.v[0], v[1] += a.v[1]; }
  LAYERNORM_INLINE void add(const Part<A, 1>& a, Whole) { v[0] += a.v[0]; }
  LAYERNORM_INLINE void add(const Part<A, 1>& a, First) { v[1] += a.v[0]; }
  LAYERNORM_INLINE void add_square(const Part<A, 2>& a, Pair) {
    v[0] = fma(a.v[0], a.v[0], v[0]), v[1] = fma(a.v[1], a.v[1], v[1]);
  }
  LAYERNORM_INLINE void add_square(const Part<A, 1>& a, Whole) { v[0] = fma(a.v[0], a.v[0], v[0]); }
  LAYERNORM_INLINE void add_square(const Part<A, 1>& a, First) { v[1] = fma(a.v[0], a.v[0], v[1]); }
  [[nodiscard]] LAYERNORM_INLINE double total() const {
    return static_cast<double>(add_lanes(v[0] + v[1]));
  }
};

// mean + rest is the mean, more exactly than A can hold it.
template <typename A>
struct RowStats {
  A mean;
  A rest;
  A rstd;
};

// The mean and the sum of the squares about it (about 0 where not centred), of part of a row.
struct Moments {
  int64_t count;
  double mean;
  double squares;
};

// Chan, Golub, LeVeque 1979.
inline Moments together(const Moments& a, const Moments& b) {
  const auto count = static_cast<double>(a.count + b.count);
  const double delta = b.mean - a.mean;
  const double part = static_cast<double>(b.count) / count;
  return {a.count + b.count, a.mean + delta * part,
          a.squares + b.squares + delta * delta * part * static_cast<double>(a.count)};
}

// The sums of a - shift and of its square over [begin, end) of kRows rows, as moments.
template <typename T, bool kCentred, int kRows>
LAYERNORM_INLINE void moments_about(const T* const (&a)[kRows], int64_t begin, int64_t end,
                                    const Accumulate<T> (&shift)[kRows],
                                    Moments (&moments)[kRows]) {
  using A = Accumulate<T>;
  Sums<A> rests[kRows];
  Sums<A> squares[kRows];
  for (int64_t first = begin; first < end; first += kEight<T>) {
    Sums<A> some[kRows];
    const int64_t last = end - first < kEight<T> ? end : first + kEight<T>;
    each_part<A>(first, last, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        auto v = load(a[r] + i, part);
        if constexpr (kCentred) {
          v = keep(v - shift[r], part);
          rests[r].add(v, part);
        }
        some[r].add_square(v, part);
      }
    });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) squares[r].add({{some[r].v[0], some[r].v[1]}}, Pair{});
  }
  const int64_t count = end - begin;
  const double inverse = 1.0 / static_cast<double>(count);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const double square = squares[r].total();
    const double rest = kCentred ? rests[r].total() : 0.0;
    moments[r] = {count, static_cast<double>(shift[r]) + rest * inverse,
                  square - rest * rest * inverse};
  }
}

template <typename T>
[[gnu::noinline, gnu::cold]] Moments moments_about(const T* a, int64_t begin, int64_t end,
                                                   Accumulate<T> shift) {
  const T* const rows[1] = {a};
  const Accumulate<T> shifts[1] = {shift};
  Moments moments[1];
  moments_about<T, true, 1>(rows, begin, end, shifts, moments);
  return moments[0];
}

// The moments of whole rows, chunk by chunk. The squares are about a shift near the mean, the mean
// of the row's first vector. What the shift missed of a chunk's mean is measured and taken out of
// both moments, and where that is more than the standard deviation, the chunk is summed again about
// the mean just found. So a large offset costs no more than the rounding of the input itself.
template <typename T, bool kCentred, int kRows>
LAYERNORM_INLINE void row_moments(const T* const (&a)[kRows], int64_t width,
                                  Moments (&moments)[kRows]) {
  using A = Accumulate<T>;
  constexpr int64_t kStep = kChunk<T>;
  A shift[kRows] = {};
  if constexpr (kCentred) {
    const auto first = [&](auto part, A count) LAYERNORM_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) shift[r] = add_lanes(load(a[r], part).v[0]) / count;
    };
    if (width >= kLanes<A>)
      first(Whole{}, A{kLanes<A>});
    else
      first(First{width}, static_cast<A>(width));
  }
  // Chunks are put together two by two, as a binary counter counts: waiting[r][k] is of 2^k of
  // them.
  Moments waiting[kRows][48];
  int64_t chunk = 0;
  for (int64_t begin = 0; begin < width; begin += kStep, ++chunk) {
    const int64_t end = width - begin < kStep ? width : begin + kStep;
    moments_about<T, kCentred, kRows>(a, begin, end, shift, moments);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      auto& found = moments[r];
      if constexpr (kCentred) {
        const double missed = found.mean - static_cast<double>(shift[r]);
        const double squares = missed * missed * static_cast<double>(end - begin);
        if (__builtin_expect(squares > found.squares, 0))
          found = moments_about<T>(a[r], begin, end, static_cast<A>(found.mean));
      }
      if (width <= kStep) continue;
      int level = 0;
      for (; (chunk >> level & 1) != 0; ++level) found = together(waiting[r][level], found);
      waiting[r][level] = found;
    }
  }
  if (width <= kStep) return;
  for (int r = 0; r < kRows; ++r) {
    bool first = true;
    for (int level = 0; chunk >> level != 0; ++level) {
      if ((chunk >> level & 1) == 0) continue;
      moments[r] = first ? waiting[r][level] : together(waiting[r][level], moments[r]);
      first = false;
    }
  }
}

// False if there is a row whose squares A cannot hold: too large, too small, infinite or NaN.
template <typename T, bool kCentred, int kRows>
LAYERNORM_INLINE bool row_statistics(const T* const (&a)[kRows], int64_t width, double eps,
                                     RowStats<Accumulate<T>> (&stats)[kRows]) {
  using A = Accumulate<T>;
  // Far enough from the ends of A that no square has lost anything. False for NaN too.
  constexpr double kLeast = sizeof(A) == 4 ? 0x1p-100 : 0x1p-960;
  constexpr double kMost = sizeof(A) == 4 ? 0x1p127 : 0x1p1022;
  const double inverse = 1.0 / static_cast<double>(width);
  Moments moments[kRows];
  row_moments<T, kCentred, kRows>(a, width, moments);
  bool ordinary = true;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const double variance = moments[r].squares * inverse + eps;
    ordinary = ordinary && variance > kLeast && moments[r].squares < kMost;
    const auto mean = static_cast<A>(moments[r].mean);
    stats[r] = {mean, static_cast<A>(moments[r].mean - static_cast<double>(mean)),
                static_cast<A>(1.0 / std::sqrt(variance))};
  }
  return ordinary;
}

// output = (a - mean)·rstd·gain + bias; kStream writes past the caches.
template <typename T, typename P, bool kCentred, bool kGain, bool kBias, bool kStream, int kRows>
LAYERNORM_INLINE void row_output(const T* const (&a)[kRows], const P* gain, const P* bias,
                                 T* const (&output)[kRows], int64_t width,
                                 const RowStats<Accumulate<T>> (&stats)[kRows]) {
  using A = Accumulate<T>;
  each_part<A>(0, width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    Part<A, part.kVectors> g;
    Part<A, part.kVectors> b;
    if constexpr (kGain) g = load_beside<T>(gain + i, part);
    if constexpr (kBias) b = load_beside<T>(bias + i, part);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      // While this row is written, the next one may already be fetched.
      if constexpr (kStream) __builtin_prefetch(a[r] + kRows * width + i, 0, 2);
      const auto& s = stats[r];
      auto v = load(a[r] + i, part);
      v = kCentred ? fma(v - s.mean, s.rstd, -s.rest * s.rstd) : v * s.rstd;
      if constexpr (kGain && kBias) {
        v = fma(v, g, b);
      } else if constexpr (kGain) {
        v = v * g;
      }
      store<kStream>(output[r] + i, v, part);
    }
  });
}

template <typename T>
LAYERNORM_INLINE void row_add(const T* a, const T* b, T* sum, int64_t width) {
  each_part<Accumulate<T>>(0, width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    store<false>(sum + i, load(a + i, part) + load(b + i, part), part);
  });
}

// What the derivative of kRows rows reads and writes; gain and the sums for the block are shared.
template <typename T, int kRows>
struct RowGradients {
  const T* grad[kRows];      // of the output
  const T* grad_sum[kRows];  // of the sum, or null
  const T* input[kRows];
  T* grad_input[kRows];  // or null
  Accumulate<T> mean[kRows];
  Accumulate<T> rstd[kRows];
};

// Whether a row has a gradient t = grad·gain that is not 0. The factor keeps squares from becoming
// 0.
template <typename T, typename P, bool kGain>
[[gnu::noinline, gnu::cold]] bool has_gradient(const T* grad, const P* gain, int64_t width) {
  using A = Accumulate<T>;
  constexpr A kFactor = sizeof(A) == 4 ? A(0x1p100) : A(0x1p900);
  Sums<A> squares;
  each_part<A>(0, width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto t = load(grad + i, part);
    if constexpr (kGain) t = t * load_beside<T>(gain + i, part);
    squares.add_square(t * kFactor, part);
  });
  return squares.total() != 0;
}

// Whether no product of a row's gradient with a - mean left A's range on the way to the sum, and
// what the sum becomes does not either. False for NaN too.
template <typename A>
bool in_range(double sum_t, double sum_tn, A rstd, double inverse, const auto& has_gradient) {
  constexpr double kLeast = sizeof(A) == 4 ? 0x1p-100 : 0x1p-900;
  constexpr double kMost = sizeof(A) == 4 ? 0x1p120 : 0x1p1000;
  const double size = std::fabs(sum_tn);
  if (!(size + std::fabs(sum_t) <= std::numeric_limits<A>::max())) return false;
  const double along_n = size * inverse * static_cast<double>(rstd) * rstd * rstd;
  if (size > kLeast && along_n > kLeast) return along_n < kMost;
  return size == 0 && (rstd <= 1 || !has_gradient());
}

// With the normalized n = (a - mean)·rstd and t = grad·gain:
//   grad_input = rstd·(t - Σt/H - n·Σ(t·n)/H) + grad_sum, without Σt/H where not centred;
//   block_gain += grad·n, block_bias += grad, both in the order of the row's parts.
// Each row's sums are formed in the same order whatever kRows is, and the rows are added to the
// block's one after another. rstd stands outside of the row's sums, which spares a product; so with
// very large or small gradients a sum can leave A's range although the result does not. Then this
// is false, nothing is written to grad_input, and the block's sums are lost.
template <typename T, typename P, bool kCentred, bool kGain, bool kParameters, int kRows>
LAYERNORM_INLINE bool rows_backward(const RowGradients<T, kRows>& rows, const P* gain,
                                    Accumulate<T>* block_gain, Accumulate<T>* block_bias,
                                    int64_t width, bool stream) {
  using A = Accumulate<T>;
  const auto centred = [&](int r, int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = load(rows.input[r] + i, part);
    if constexpr (kCentred)
      return a - rows.mean[r];
    else
      return a;
  };
  const auto gain_at = [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    Part<A, part.kVectors> g;
    if constexpr (kGain) g = load_beside<T>(gain + i, part);
    return g;
  };
  double sum_t[kRows] = {};
  double sum_tn[kRows] = {};
  for (int64_t begin = 0; begin < width; begin += kChunk<T>) {
    const int64_t end = begin + kChunk<T> < width ? begin + kChunk<T> : width;
    Vec<A> t_sums[kRows] = {};
    Vec<A> tn_sums[kRows] = {};
    each_part<A>(begin, end, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      constexpr int kVectors = part.kVectors;
      const auto g = gain_at(i, part);
      Part<A, kVectors> gains;
      Part<A, kVectors> biases;
      if constexpr (kParameters) gains = load(block_gain + i, part);
      if constexpr (kParameters && kCentred) biases = load(block_bias + i, part);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto grad = load(rows.grad[r] + i, part);  // 0 beyond the row
        const auto product = grad * centred(r, i, part);
#pragma GCC unroll 2
        for (int k = 0; k < kVectors; ++k) {
          if constexpr (kGain) {
            if constexpr (kCentred) t_sums[r] = fma(grad.v[k], g.v[k], t_sums[r]);
            tn_sums[r] = fma(product.v[k], g.v[k], tn_sums[r]);
          } else {
            if constexpr (kCentred) t_sums[r] += grad.v[k];
            tn_sums[r] += product.v[k];
          }
        }
        if constexpr (kParameters) gains = fma(product, rows.rstd[r], gains);
        if constexpr (kParameters && kCentred) biases = biases + grad;
      }
      if constexpr (kParameters) store<false>(block_gain + i, gains, part);
      if constexpr (kParameters && kCentred) store<false>(block_bias + i, biases, part);
    });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sum_t[r] += static_cast<double>(add_lanes(t_sums[r]));
      sum_tn[r] += static_cast<double>(add_lanes(tn_sums[r]));
    }
  }
  const double inverse = 1.0 / static_cast<double>(width);
  bool ordinary = true;
  for (int r = 0; r < kRows; ++r)
    ordinary = ordinary && in_range(sum_t[r], sum_tn[r], rows.rstd[r], inverse, [&] {
                 return has_gradient<T, P, kGain>(rows.grad[r], gain, width);
               });
  if (__builtin_expect(!ordinary, 0)) return false;
  if (rows.grad_input[0] == nullptr) return true;
  A along_one[kRows];
  A along_n[kRows];
  for (int r = 0; r < kRows; ++r) {
    const auto rstd = static_cast<double>(rows.rstd[r]);
    along_one[r] = static_cast<A>(-sum_t[r] * inverse * rstd);
    along_n[r] = static_cast<A>(-sum_tn[r] * inverse * rstd * rstd * rstd);
  }
  // Row by row: what is read and written side by side should not crowd the first cache.
  const auto write = [&](auto add_grad_sum, auto past_caches) LAYERNORM_LAMBDA {
#pragma GCC unroll 1
    for (int r = 0; r < kRows; ++r) {
      each_part<A>(0, width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
        if constexpr (past_caches()) {
          __builtin_prefetch(rows.grad[r] + kRows * width + i, 0, 2);
          __builtin_prefetch(rows.input[r] + kRows * width + i, 0, 2);
        }
        auto t = load(rows.grad[r] + i, part);
        if constexpr (kGain) t = t * gain_at(i, part);
        auto d = fma(t, rows.rstd[r], fma(centred(r, i, part), along_n[r], along_one[r]));
        if constexpr (add_grad_sum()) d = d + load(rows.grad_sum[r] + i, part);
        store<past_caches()>(rows.grad_input[r] + i, d, part);
      });
    }
  };
  if (rows.grad_sum[0] != nullptr)
    write(std::true_type{}, std::false_type{});
  else if (stream)
    write(std::false_type{}, std::true_type{});
  else
    write(std::false_type{}, std::false_type{});
  return true;
}

}  // namespace layernorm::LAYERNORM_ISA
