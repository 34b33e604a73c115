// One row of one step: the gates, and the new state; forward.
//
// A is the type computed in, T that of states and parameters. Rows are contiguous. The words are
// those of src/layernorm/variants.py: x is W_ih x, and where Inputs are summed the sum; h is W_hh
// h.
#pragma once

#include "gate_norms.hpp"

namespace layernorm::LAYERNORM_ISA {

// Gains and biases in the type computed in: 1 and 0 where the variant or the caller has none. Where
// one row reaches the gates, gain_x is its gain.
template <typename A>
struct Vectors {
  const A *gain_x, *gain_h, *bias, *bias_hn, *gain_cell, *bias_cell;
};

// Rows of products that are read from memory soon, and may be fetched while others are computed
// with; null where there are none.
template <typename T>
struct Soon {
  const T *x = nullptr, *h = nullptr;

  // The share of the features that go with part i of the hidden units.
  LAYERNORM_INLINE void fetch(int64_t gates, int64_t i, auto part) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t end = gates * (i + part.kVectors * kLanes<Accumulate<T>>);
    for (const T* row : {x, h}) {
      if (row == nullptr) continue;
      for (int64_t k = gates * i; k < end; k += kLine) __builtin_prefetch(row + k);
    }
  }
};

// What one row of one step reads and writes.
template <typename T>
struct RowStep {
  using A = Accumulate<T>;
  A* x;  // [G·H], the products; normalized in the end if `keep`
  A* h;  // [G·H], likewise, where it reaches the gates
  GateNorm<A> norm_x, norm_h;
  A* stats;  // rstd of the groups of x, then of h; or null
  bool keep;
  const T* c_prev;  // LSTM
  const T* h_prev;
  T* c;          // LSTM: what is carried on
  T* hidden;     // h before any projection
  A* below_out;  // [H], LSTM: working memory for what divides the output gate, and
  A* cell;       // [H]
  Soon<T> soon;
};

// A candidate that is summed after the reset: both norms in place, the reset gate's first.
template <typename T>
void normalize_late(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& vectors,
                    const RowStep<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  each_vector<A>(2 * size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    put(row.x + i, load(row.x + i, part) + load(row.h + i, part), part);
  });
  normalize_groups(r, groups, 0, groups.count - 1, row.x, row.stats);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto reset = sigmoid(
        fma(load(row.x + i, part), load(vectors.gain_x + i, part), load(vectors.bias + i, part)));
    const int64_t n = 2 * size + i;
    put(row.x + n, fma(reset, load(row.h + n, part), load(row.x + n, part)), part);
  });
  normalize_groups(r, groups, groups.count - 1, groups.count, row.x, row.stats);
}

// The normalized n at feature k, which is in this gate; kNorm where the row is not normalized yet.
template <bool kNorm, typename A>
LAYERNORM_INLINE auto normalized_at(auto* a, const GateNorm<A>* norm, int gate, int64_t k,
                                    bool keep, auto part) {
  auto n = load(a + k, part);
  if constexpr (kNorm) {
    n = fma(n - norm->mean[gate], norm->rstd[gate], norm->rest[gate]);
    if (keep) put(a + k, n, part);
  }
  return n;
}
// A gate's value at feature i of it, before its nonlinearity; of x alone, or of both.
template <bool kTwo, bool kNorm, typename A>
LAYERNORM_INLINE auto gate_at(const Vectors<A>& v, const auto& row, int gate, int64_t size,
                              int64_t i, auto part) {
  const int64_t k = gate * size + i;
  bool keep = false;
  const GateNorm<A>*norm_x = nullptr, *norm_h = nullptr;
  if constexpr (kNorm) keep = row.keep, norm_x = &row.norm_x, norm_h = &row.norm_h;
  const auto x = normalized_at<kNorm>(row.x, norm_x, gate, k, keep, part);
  const auto a = fma(x, load(v.gain_x + k, part), load(v.bias + k, part));
  if constexpr (kTwo) {
    const auto h = normalized_at<kNorm>(row.h, norm_h, gate, k, keep, part);
    return fma(h, load(v.gain_h + k, part), a);
  }
  return a;
}

// Rounds to T and back.
template <typename T, int k>
LAYERNORM_INLINE Part<Accumulate<T>, k> rounded(const Part<Accumulate<T>, k>& a) {
  if constexpr (sizeof(T) == 2)
    return each<float, k>([&](int i) { return widen(narrow(a.v[i], T{}), T{}); });
  return a;
}

// The nonlinearity of an RNN, of a candidate, and of an LSTM's cell.
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> rectified(const Part<A, k>& a) {
  return each<A, k>([&](int i) { return at_least(a.v[i], A{0}); });
}
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> nonlinear(const Recurrent& r, const Part<A, k>& a) {
  return r.relu ? rectified(a) : tanh(a);
}
// A gradient before it, from its value.
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> through_nonlinear(const Recurrent& r, const Part<A, k>& value,
                                              const Part<A, k>& grad) {
  if (!r.relu) return grad * one_minus_square(value);
  return each<A, k>([&](int i) { return value.v[i] <= Vec<A>{} ? Vec<A>{} : grad.v[i]; });
}

// Input gate, forget gate, candidate and output gate, in the order of memory.
template <bool kTwo, bool kNorm, typename A>
LAYERNORM_INLINE auto lstm_gates(const Recurrent& r, const Vectors<A>& v, const auto& row,
                                 int64_t i, auto part) {
  const auto gate = [&](int which) LAYERNORM_LAMBDA {
    return gate_at<kTwo, kNorm>(v, row, which, r.hidden_size, i, part);
  };
  const auto candidate = gate(2);
  auto gates = activation<4U>(join(gate(0), gate(1), candidate, gate(3)));
  if (r.relu) gates.above.v[2] = rectified(candidate).v[0], gates.below.v[2] = splat(A{1});
  return gates;
}

// The cell within its bounds.
template <typename A, int k>
LAYERNORM_INLINE Part<A, k> clipped(const Recurrent& r, const Part<A, k>& c) {
  if (r.cell_clip == 0) return c;
  const A most = static_cast<A>(r.cell_clip);
  return each<A, k>([&](int i) { return at_most(at_least(c.v[i], -most), most); });
}

template <typename T, bool kTwo, bool kNorm>
void lstm_cell(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  const bool normed = r.cell_norm != CellNorm::kNone;
  each_vector<A>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    row.soon.fetch(4, i, part);
    const auto gates = lstm_gates<kTwo, kNorm>(r, v, row, i, part);
    const auto above = [&](int which) { return piece<1>(gates.above, which); };
    const auto below = [&](int which) { return piece<1>(gates.below, which); };
    const auto entering = above(2) / (below(0) * below(2));
    const auto forget = above(1) / below(1);
    const auto c = rounded<T>(clipped(r, fma(forget, load(row.c_prev + i, part), entering)));
    if (normed) put(row.cell + i, c, part);
    put(row.below_out + i, below(3), part);
    put(row.c + i, c, part);
  });
}

// h = σ(o)·tanh(seen) at feature i, or with a relu.
LAYERNORM_INLINE void put_hidden(const Recurrent& r, const auto& row, const auto& seen, int64_t i,
                                 auto part) {
  const auto below = load(row.below_out + i, part);
  if (r.relu) return put(row.hidden + i, rectified(seen) / below, part);
  const auto shown = activation<~0U>(seen);
  put(row.hidden + i, shown.above / (shown.below * below), part);
}

// The cell's norm, and what is seen of it.
template <typename T>
void lstm_output(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row,
                 const RowStats<Accumulate<T>>& s) {
  using A = Accumulate<T>;
  const bool carried = r.cell_norm == CellNorm::kCarried;
  const A rest = -s.rest * s.rstd;
  each_block<A, 4>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto n = fma(load(row.cell + i, part) - s.mean, s.rstd, rest);
    auto seen = fma(n, load(v.gain_cell + i, part), load(v.bias_cell + i, part));
    if (carried) {
      seen = rounded<T>(seen);
      put(row.c + i, seen, part);
    }
    put_hidden(r, row, seen, i, part);
  });
}

template <typename T>
void lstm_steps(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>* rows,
                int count) {
  using A = Accumulate<T>;
  for (int i = 0; i < count; ++i) {
    if (r.norm == NormKind::kNone)
      lstm_cell<T, false, false>(r, v, rows[i]);
    else if (r.inputs == Inputs::kSeparate)
      lstm_cell<T, true, true>(r, v, rows[i]);
    else
      lstm_cell<T, false, true>(r, v, rows[i]);
  }
  if (r.cell_norm == CellNorm::kNone) {
    for (int i = 0; i < count; ++i)
      each_block<A, 4>(r.hidden_size, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
        put_hidden(r, rows[i], load(rows[i].c + k, part), k, part);
      });
    return;
  }
  A* cells[kTogether];
  RowStats<A> stats[kTogether];
  A rstd[kTogether];
  for (int i = 0; i < count; ++i) cells[i] = rows[i].cell;
  measure(r, r.cell_eps, cells, count, r.hidden_size, stats, rstd);
  for (int i = 0; i < count; ++i) lstm_output<T>(r, v, rows[i], stats[i]);
}

// The gates of a GRU, and what the reset gate multiplies.
template <typename A, int k>
struct GruGates {
  Part<A, k> reset, update, candidate, reset_of;
};
template <bool kNorm, typename A>
LAYERNORM_INLINE auto gru_gates(const Recurrent& r, const Vectors<A>& v, const auto& row, int64_t i,
                                auto part) {
  constexpr int k = part.kVectors;
  const int64_t size = r.hidden_size;
  const int64_t n = 2 * size + i;
  GruGates<A, k> gates;
  if (r.inputs == Inputs::kSeparate) {
    const auto both = sigmoid(join(gate_at<true, kNorm>(v, row, 0, size, i, part),
                                   gate_at<true, kNorm>(v, row, 1, size, i, part)));
    gates.reset = piece<k>(both, 0);
    gates.update = piece<k>(both, 1);
    const GateNorm<A>* norm = nullptr;
    bool keep = false;
    if constexpr (kNorm) norm = &row.norm_h, keep = row.keep;
    const auto h = normalized_at<kNorm>(row.h, norm, 2, n, keep, part);
    gates.reset_of = fma(h, load(v.gain_h + n, part), load(v.bias_hn + i, part));
    const auto x = gate_at<false, kNorm>(v, row, 2, size, i, part);
    gates.candidate = nonlinear(r, fma(gates.reset, gates.reset_of, x));
    return gates;
  }
  const auto both = sigmoid(join(gate_at<false, kNorm>(v, row, 0, size, i, part),
                                 gate_at<false, kNorm>(v, row, 1, size, i, part)));
  gates.reset = piece<k>(both, 0);
  gates.update = piece<k>(both, 1);
  const auto last = gate_at<false, kNorm>(v, row, 2, size, i, part);
  const bool late = r.inputs == Inputs::kLate;
  gates.reset_of = late ? load(row.h + n, part) : last;
  gates.candidate = nonlinear(r, late ? last : gates.reset * last);
  return gates;
}

template <typename T, bool kNorm>
void gru_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  each_block<A, 2>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    row.soon.fetch(3, i, part);
    const auto gates = gru_gates<kNorm>(r, v, row, i, part);
    const auto& n = gates.candidate;
    put(row.hidden + i, fma(gates.update, load(row.h_prev + i, part) - n, n), part);
  });
}

template <typename T, bool kTwo, bool kNorm>
void rnn_step(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowStep<T>& row) {
  using A = Accumulate<T>;
  each_block<A, 4>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = gate_at<kTwo, kNorm>(v, row, 0, r.hidden_size, i, part);
    put(row.hidden + i, nonlinear(r, a), part);
  });
}

// The new states of at most kTogether rows. The norms of x are there where inputs are separate.
template <typename T>
void cell_steps(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                RowStep<T>* rows, int count) {
  using A = Accumulate<T>;
  const bool separate = r.inputs == Inputs::kSeparate;
  if (r.inputs == Inputs::kLate) {
    for (int i = 0; i < count; ++i) normalize_late(r, groups, v, rows[i]);
  } else if (r.norm != NormKind::kNone) {
    A* of[kTogether];
    A* kept[kTogether];
    GateNorm<A> norms[kTogether];
    for (int i = 0; i < count; ++i) {
      of[i] = separate ? rows[i].h : rows[i].x;
      kept[i] = rows[i].stats == nullptr ? nullptr : rows[i].stats + (separate ? groups.count : 0);
    }
    measure_groups(r, groups, of, count, norms, kept);
    for (int i = 0; i < count; ++i) (separate ? rows[i].norm_h : rows[i].norm_x) = norms[i];
  }
  if (r.cell == CellKind::kLstm) return lstm_steps<T>(r, v, rows, count);
  const bool normed = r.norm != NormKind::kNone && r.inputs != Inputs::kLate;
  for (int i = 0; i < count; ++i) {
    if (r.cell == CellKind::kGru)
      normed ? gru_step<T, true>(r, v, rows[i]) : gru_step<T, false>(r, v, rows[i]);
    else if (separate)
      rnn_step<T, true, true>(r, v, rows[i]);
    else
      normed ? rnn_step<T, false, true>(r, v, rows[i]) : rnn_step<T, false, false>(r, v, rows[i]);
  }
}

}  // namespace layernorm::LAYERNORM_ISA
