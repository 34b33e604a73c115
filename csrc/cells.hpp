// One row of one step: the norms of what meets at the gates, the gates and the new state; forward.
//
// A is the type computed in, T that of states and parameters. Rows are contiguous. The words are
// those of src/layernorm/variants.py: x is W_ih x, and where Inputs are summed the sum; h is W_hh h.
#pragma once

#include "activation.hpp"
#include "extreme_row.hpp"
#include "recurrent.hpp"
#include "row_norm.hpp"

namespace layernorm::LAYERNORM_ISA {

// Calls body(i, part) for vectors of [0, count), the last one perhaps in part.
template <typename A, typename Body>
LAYERNORM_INLINE void each_vector(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) body(i, Whole{});
  if (i < count) body(i, First{count - i});
}

template <typename T>
LAYERNORM_INLINE auto get(const T* p, auto part) {
  return load(p, part).v[0];
}
template <typename T>
LAYERNORM_INLINE void put(T* p, Vec<Accumulate<T>> v, auto part) {
  store<false>(p, Part<Accumulate<T>, 1>{{v}}, part);
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

// n = (a - mean)·rstd in place of a; returns rstd.
template <typename A>
[[gnu::noinline, gnu::cold]] A normalize_extreme(A* a, int64_t width, double eps, bool centred) {
  const auto stats = centred ? extreme_statistics<A, true>(a, width, eps)
                             : extreme_statistics<A, false>(a, width, eps);
  extreme_output<A, A>(a, nullptr, nullptr, a, width, stats);
  return static_cast<A>(stats.rstd * stats.scale);
}
template <typename A, bool kCentred>
A normalize_as(A* a, int64_t width, double eps) {
  const A* const rows[1] = {a};
  RowStats<A> stats[1];
  if (!row_statistics<A, kCentred, 1>(rows, width, eps, stats))
    return normalize_extreme(a, width, eps, kCentred);
  const auto s = stats[0];
  const auto rest = splat(-s.rest * s.rstd);
  each_vector<A>(width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto v = get(a + i, part);
    put(a + i, kCentred ? fma(v - splat(s.mean), splat(s.rstd), rest) : v * splat(s.rstd), part);
  });
  return s.rstd;
}
template <typename A>
A normalize(const Recurrent& r, A* a, int64_t width) {
  return r.norm == NormKind::kLayer ? normalize_as<A, true>(a, width, r.eps)
                                    : normalize_as<A, false>(a, width, r.eps);
}

// Normalizes the groups [begin, end) of a row in place; rstd of each to stats, unless that is null.
template <typename A>
void normalize_groups(const Recurrent& r, const Groups& groups, int begin, int end, A* row,
                      A* stats) {
  for (int g = begin; g < end; ++g) {
    const A rstd = normalize(r, row + groups.begin(g), groups.width(g));
    if (stats != nullptr) stats[g] = rstd;
  }
}

// Gains and biases in the type computed in: 1 and 0 where the variant or the caller has none. Where
// one row reaches the gates, gain_x is its gain.
template <typename A>
struct Vectors {
  const A *gain_x, *gain_h, *bias, *bias_hn, *gain_cell, *bias_cell;
};

// What one row of one step reads and writes.
template <typename T>
struct RowStep {
  using A = Accumulate<T>;
  A* x;            // [G·H]: products in, normalized out
  A* h;            // [G·H]: likewise, where it reaches the gates
  A* stats;        // rstd of the groups of x, then of h; or null
  const T* c_prev;  // LSTM
  const T* h_prev;
  T* c;       // LSTM: what is carried on
  T* hidden;  // h before any projection
  A* out_gate;  // [H], LSTM: working memory, and
  A* cell;      // [H]
};

// Brings the norms of a step to an end; x was normalized before where inputs are separate.
template <typename T>
void normalize_step(const Recurrent& r, const Groups& groups,
                    const Vectors<Accumulate<T>>& vectors, const RowStep<T>& row) {
  using A = Accumulate<T>;
  if (r.inputs == Inputs::kSeparate) {
    A* const stats = row.stats == nullptr ? nullptr : row.stats + groups.count;
    return normalize_groups(r, groups, 0, groups.count, row.h, stats);
  }
  if (r.inputs == Inputs::kSummed)
    return normalize_groups(r, groups, 0, groups.count, row.x, row.stats);
  // The reset gate first, since the candidate's sum needs it.
  const int64_t size = r.hidden_size;
  each_vector<A>(2 * size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    put(row.x + i, get(row.x + i, part) + get(row.h + i, part), part);
  });
  normalize_groups(r, groups, 0, groups.count - 1, row.x, row.stats);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto reset = sigmoid<A>(fma(get(row.x + i, part), get(vectors.gain_x + i, part),
                                      get(vectors.bias + i, part)));
    const int64_t n = 2 * size + i;
    put(row.x + n, fma(reset, get(row.h + n, part), get(row.x + n, part)), part);
  });
  normalize_groups(r, groups, groups.count - 1, groups.count, row.x, row.stats);
}

// The gate's value before its nonlinearity at feature k.
template <typename A, bool kTwo>
LAYERNORM_INLINE Vec<A> gate_at(const Vectors<A>& v, const A* x, const A* h, int64_t k, auto part) {
  const auto a = fma(get(x + k, part), get(v.gain_x + k, part), get(v.bias + k, part));
  if constexpr (kTwo) return fma(get(h + k, part), get(v.gain_h + k, part), a);
  return a;
}

// Rounds to T and back.
template <typename T>
LAYERNORM_INLINE Vec<Accumulate<T>> rounded(Vec<Accumulate<T>> v) {
  if constexpr (sizeof(T) == 2) return widen(narrow(v, T{}), T{});
  return v;
}

template <typename T, bool kTwo>
void lstm_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const bool normed = r.cell_norm != CellNorm::kNone;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto input = sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, i, part));
    const auto forget = sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, size + i, part));
    const auto candidate = tanh<A>(gate_at<A, kTwo>(v, row.x, row.h, 2 * size + i, part));
    const auto output = sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, 3 * size + i, part));
    const auto c = rounded<T>(fma(forget, get(row.c_prev + i, part), input * candidate));
    if (normed) {
      put(row.out_gate + i, output, part);
      put(row.cell + i, c, part);
    } else {
      put(row.hidden + i, output * tanh<A>(c), part);
    }
    put(row.c + i, c, part);
  });
  if (!normed) return;
  normalize(r, row.cell, size);
  const bool carried = r.cell_norm == CellNorm::kCarried;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto seen =
        fma(get(row.cell + i, part), get(v.gain_cell + i, part), get(v.bias_cell + i, part));
    if (carried) {
      seen = rounded<T>(seen);
      put(row.c + i, seen, part);
    }
    put(row.hidden + i, get(row.out_gate + i, part) * tanh<A>(seen), part);
  });
}

// The gates of a GRU at feature i, and what the reset gate multiplies.
template <typename A>
struct GruGates {
  Vec<A> reset, update, candidate, reset_of;
};
template <typename A>
LAYERNORM_INLINE GruGates<A> gru_gates(const Recurrent& r, const Vectors<A>& v, const A* x,
                                       const A* h, int64_t i, auto part) {
  const int64_t size = r.hidden_size;
  const int64_t n = 2 * size + i;
  GruGates<A> gates;
  if (r.inputs == Inputs::kSeparate) {
    gates.reset = sigmoid<A>(gate_at<A, true>(v, x, h, i, part));
    gates.update = sigmoid<A>(gate_at<A, true>(v, x, h, size + i, part));
    gates.reset_of =
        fma(get(h + n, part), get(v.gain_h + n, part), get(v.bias_hn + i, part));
    gates.candidate = tanh<A>(fma(gates.reset, gates.reset_of, gate_at<A, false>(v, x, h, n, part)));
    return gates;
  }
  gates.reset = sigmoid<A>(gate_at<A, false>(v, x, h, i, part));
  gates.update = sigmoid<A>(gate_at<A, false>(v, x, h, size + i, part));
  const auto last = gate_at<A, false>(v, x, h, n, part);
  const bool late = r.inputs == Inputs::kLate;
  gates.reset_of = late ? get(h + n, part) : last;
  gates.candidate = tanh<A>(late ? last : gates.reset * last);
  return gates;
}

template <typename T>
void gru_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  each_vector<A>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto gates = gru_gates<A>(r, v, row.x, row.h, i, part);
    const auto n = gates.candidate;
    put(row.hidden + i, fma(gates.update, get(row.h_prev + i, part) - n, n), part);
  });
}

template <typename T>
void rnn_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  const bool two = r.inputs == Inputs::kSeparate;
  each_vector<A>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = two ? gate_at<A, true>(v, row.x, row.h, i, part)
                       : gate_at<A, false>(v, row.x, row.h, i, part);
    // Written so that a NaN stays one.
    put(row.hidden + i, r.relu ? (a < Vec<A>{} ? Vec<A>{} : a) : tanh<A>(a), part);
  });
}

template <typename T>
void cell_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  if (r.cell == CellKind::kGru) return gru_step<T>(r, v, row);
  if (r.cell == CellKind::kRnn) return rnn_step<T>(r, v, row);
  if (r.inputs == Inputs::kSeparate) return lstm_step<T, true>(r, v, row);
  lstm_step<T, false>(r, v, row);
}

}  // namespace layernorm::LAYERNORM_ISA
