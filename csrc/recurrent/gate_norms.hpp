// The norms of what meets at the gates, for one row of one step or a few; forward.
//
// A is the type computed in, T that of states and parameters. Rows are contiguous.
#pragma once

#include "isa/activation.hpp"
#include "norm/extreme_row.hpp"
#include "norm/row_norm.hpp"
#include "recurrent.hpp"

namespace layernorm::LAYERNORM_ISA {

// The vectors of some parts as one part, and part number `which` of such.
template <typename A, int k, typename... Parts>
LAYERNORM_INLINE auto join(const Part<A, k>& first, const Parts&... others) {
  const Part<A, k> all[] = {first, others...};
  return each<A, k* static_cast<int>(1 + sizeof...(others))>(
      [&](int i) { return all[i / k].v[i % k]; });
}
template <int k, typename A, int kAll>
LAYERNORM_INLINE Part<A, k> piece(const Part<A, kAll>& all, int which) {
  return each<A, k>([&](int i) { return all.v[which * k + i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> one_minus(const Part<A, k>& a) {
  return each<A, k>([&](int i) { return splat(A{1}) - a.v[i]; });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> one_minus_square(const Part<A, k>& a) {
  return each<A, k>([&](int i) { return fma(-a.v[i], a.v[i], splat(A{1})); });
}

// The features that share statistics: `count` groups, all of them `size` wide but the first.
struct Groups {
  int64_t first, size;
  int count;
  [[nodiscard]] int64_t begin(int g) const { return g == 0 ? 0 : first + (g - 1) * size; }
  [[nodiscard]] int64_t width(int g) const { return g == 0 ? first : size; }
};

inline Groups groups_of(const Recurrent& r) {
  const int64_t hidden = r.hidden_size;
  if (r.norm == NormKind::kNone) return {0, 0, 0};
  if (r.scope == Scope::kGate) return {hidden, hidden, static_cast<int>(r.gates)};
  if (r.scope == Scope::kMatrix && r.cell == CellKind::kGru) return {2 * hidden, hidden, 2};
  return {r.gates * hidden, 0, 1};
}

// The norm of a row as it meets the gates: for each gate the numbers of the group it is in, with
// which n = (a - mean)·rstd + rest.
template <typename A>
struct GateNorm {
  A mean[4], rstd[4], rest[4];
};

template <typename A>
[[gnu::noinline, gnu::cold]] RowStats<A> normalize_extreme(A* a, int64_t width, double eps,
                                                           bool centred, A& rstd) {
  const auto stats = centred ? extreme_statistics<A, true>(a, width, eps)
                             : extreme_statistics<A, false>(a, width, eps);
  extreme_output<A, A>(a, nullptr, nullptr, a, width, stats);
  rstd = static_cast<A>(stats.rstd * stats.scale);
  return {A{0}, A{0}, A{1}};  // it is normalized already
}

// Statistics of `kRows` rows, and rstd of each apart: a row that A cannot square is normalized in
// place, and its statistics are those of what is normalized already.
template <typename A, bool kCentred, int kRows>
void measure_as(A* const* rows, int64_t width, double eps, RowStats<A>* stats, A* rstd) {
  const A* a[kRows];
  RowStats<A> found[kRows];
  for (int i = 0; i < kRows; ++i) a[i] = rows[i];
  if (!row_statistics<A, kCentred, kRows>(a, width, eps, found)) {
    if constexpr (kRows == 1) {
      stats[0] = normalize_extreme(rows[0], width, eps, kCentred, rstd[0]);
    } else {
      for (int i = 0; i < kRows; ++i)
        measure_as<A, kCentred, 1>(rows + i, width, eps, stats + i, rstd + i);
    }
    return;
  }
  for (int i = 0; i < kRows; ++i) {
    stats[i] = found[i];
    if (!kCentred) stats[i].mean = stats[i].rest = A{0};
    rstd[i] = found[i].rstd;
  }
}
// Of at most kTogether rows.
template <typename A>
void measure(const Recurrent& r, double eps, A* const* rows, int count, int64_t width,
             RowStats<A>* stats, A* rstd) {
  if (count == kTogether)
    return r.centred ? measure_as<A, true, kTogether>(rows, width, eps, stats, rstd)
                     : measure_as<A, false, kTogether>(rows, width, eps, stats, rstd);
  for (int i = 0; i < count; ++i)
    r.centred ? measure_as<A, true, 1>(rows + i, width, eps, stats + i, rstd + i)
              : measure_as<A, false, 1>(rows + i, width, eps, stats + i, rstd + i);
}

// The norms of at most kTogether rows; rstd of each group to kept[i], unless that is null.
template <typename A>
void measure_groups(const Recurrent& r, const Groups& groups, A* const* rows, int count,
                    GateNorm<A>* norms, A* const* kept) {
  for (int g = 0; g < groups.count; ++g) {
    A* begins[kTogether];
    RowStats<A> stats[kTogether];
    A rstd[kTogether];
    for (int i = 0; i < count; ++i) begins[i] = rows[i] + groups.begin(g);
    measure(r, r.eps, begins, count, groups.width(g), stats, rstd);
    const int first = static_cast<int>(groups.begin(g) / r.hidden_size);
    const int last = first + static_cast<int>(groups.width(g) / r.hidden_size);
    for (int i = 0; i < count; ++i) {
      if (kept[i] != nullptr) kept[i][g] = rstd[i];
      for (int gate = first; gate < last; ++gate) {
        norms[i].mean[gate] = stats[i].mean;
        norms[i].rstd[gate] = stats[i].rstd;
        norms[i].rest[gate] = -stats[i].rest * stats[i].rstd;
      }
    }
  }
}

// n = (a - mean)·rstd in place of a; returns rstd.
template <typename A>
A normalize(const Recurrent& r, A* a, int64_t width) {
  RowStats<A> s;
  A rstd;
  measure(r, r.eps, &a, 1, width, &s, &rstd);
  each_vector<A>(width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    put(a + i, fma(load(a + i, part) - s.mean, s.rstd, -s.rest * s.rstd), part);
  });
  return rstd;
}
// Groups [begin, end) of a row; rstd of each to stats, unless that is null.
template <typename A>
void normalize_groups(const Recurrent& r, const Groups& groups, int begin, int end, A* row,
                      A* stats) {
  for (int g = begin; g < end; ++g) {
    const A rstd = normalize(r, row + groups.begin(g), groups.width(g));
    if (stats != nullptr) stats[g] = rstd;
  }
}

}  // namespace layernorm::LAYERNORM_ISA
