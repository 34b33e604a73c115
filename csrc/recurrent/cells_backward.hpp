// A few rows of one step, backward: from the gradient of the new state to that of the products x
// and W_hh h, of the state before, and of gains and biases. Words and types as in cells.hpp.
#pragma once

#include "cells.hpp"

namespace layernorm::LAYERNORM_ISA {

// Where gradients of gains and biases are added up; null where there is none or it is not wanted.
template <typename A>
struct VectorSums {
  A *gain_x, *gain_h, *bias, *bias_hn, *gain_cell, *bias_cell, *bias_ih, *bias_hh;
};

template <typename T>
struct RowGradient {
  using A = Accumulate<T>;
  const A* x;  // normalized, as cell_step() read them
  const A* h;
  const A* stats;
  const T* c_prev;
  const T* h_prev;
  const A* grad_hidden;  // of h before any projection
  A* grad_direct;        // GRU: what of it goes to the h before without a product
  A* grad_c;             // LSTM: of what is carried on; becomes that of the c before
  A* grad_x;             // [G·H], of the products
  A* grad_h;             // [G·H]; the same row as grad_x where inputs are summed
  A* hidden;             // where wanted: h before any projection, again
  A* gates;              // [4·H], working memory, and
  A* cell;               // [H]
  Soon<T> soon;
};

template <typename A>
LAYERNORM_INLINE void add_product_to(A* sum, const auto& a, const auto& b, auto part) {
  if (sum != nullptr) put(sum, fma(a, b, load(sum, part)), part);
}
// Where element k of a row of sums is, if there is such a row.
template <typename A>
LAYERNORM_INLINE A* at(A* sums, int64_t k) {
  return sums == nullptr ? nullptr : sums + k;
}

// Of the gradient t of a normalized n: sums of t and of t·n.
template <typename A>
struct NormSums {
  Vec<A> t = {}, tn = {};
  template <int k>
  LAYERNORM_INLINE void add(const Part<A, k>& some_t, const Part<A, k>& n) {
#pragma GCC unroll 4
    for (int i = 0; i < k; ++i) t += some_t.v[i], tn = fma(some_t.v[i], n.v[i], tn);
  }
};
// What the statistics take from t: rstd·(t - one - n·along) is the gradient of what was normalized.
template <typename A>
struct Along {
  A one, n;
};
template <typename A>
Along<A> along(const Recurrent& r, const NormSums<A>* sums, int count, int64_t width) {
  NormSums<A> all = sums[0];
  for (int i = 1; i < count; ++i) all.t += sums[i].t, all.tn += sums[i].tn;
  const double inverse = 1.0 / static_cast<double>(width);
  return {r.centred ? static_cast<A>(static_cast<double>(add_lanes(all.t)) * inverse) : A{0},
          static_cast<A>(static_cast<double>(add_lanes(all.tn)) * inverse)};
}

// Where the gradient of a gate begins as h's part has it: the candidate of a GRU, inside of the
// reset product, has one of its own.
template <typename T>
LAYERNORM_INLINE const Accumulate<T>* gate_grad_of_h(const Recurrent& r, const RowGradient<T>& row,
                                                     int gate) {
  const bool own = r.cell == CellKind::kGru && gate == 2;
  return (own ? row.grad_h : row.grad_x) + gate * r.hidden_size;
}

// The sums that one gate of kRows rows is part of: over the rows those of gains and biases, over
// the features those of the norms.
template <typename T, bool kTwo, int kRows>
void sum_gate(const Recurrent& r, const Vectors<Accumulate<T>>& v,
              const VectorSums<Accumulate<T>>& sums, int gate, const RowGradient<T>* rows,
              NormSums<Accumulate<T>> (*of_x)[4], NormSums<Accumulate<T>> (*of_h)[4]) {
  using A = Accumulate<T>;
  const int64_t begin = gate * r.hidden_size;
  NormSums<A> x_sums[kRows], h_sums[kRows];
  const A *x[kRows], *h[kRows], *d_x[kRows], *d_h[kRows];
  for (int i = 0; i < kRows; ++i) {
    x[i] = rows[i].x + begin;
    h[i] = kTwo ? rows[i].h + begin : nullptr;
    d_x[i] = rows[i].grad_x + begin;
    d_h[i] = gate_grad_of_h(r, rows[i], gate);
  }
  each_vector<A>(r.hidden_size, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
    const auto gain_x = load(v.gain_x + begin + k, part);
    Part<A, 1> gain_h{}, bias{}, to_gain_x{}, to_gain_h{};
    if constexpr (kTwo) gain_h = load(v.gain_h + begin + k, part);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const auto d = load(d_x[i] + k, part);
      const auto n = load(x[i] + k, part);
      bias = bias + d;
      to_gain_x = fma(d, n, to_gain_x);
      x_sums[i].add(d * gain_x, n);
      if constexpr (kTwo) {
        const auto e = load(d_h[i] + k, part);
        const auto m = load(h[i] + k, part);
        to_gain_h = fma(e, m, to_gain_h);
        h_sums[i].add(e * gain_h, m);
      }
    }
    add_to(at(sums.bias, begin + k), bias, part);
    add_to(at(sums.gain_x, begin + k), to_gain_x, part);
    if constexpr (kTwo) add_to(at(sums.gain_h, begin + k), to_gain_h, part);
  });
  for (int i = 0; i < kRows; ++i) of_x[i][gate] = x_sums[i], of_h[i][gate] = h_sums[i];
}

// result = rstd·(grad·gain - one - n·along), the gradient of what was normalized.
template <typename A>
void norm_backward(const Along<A>& a, A rstd, const A* n, const A* gain, const A* grad,
                   int64_t width, A* result) {
  each_block<A, 4>(width, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
    const auto t = load(grad + k, part) * load(gain + k, part) - a.one;
    put(result + k, fma(load(n + k, part), -a.n, t) * rstd, part);
  });
}

// Takes the gradients of the gates of these groups, of at most kTogether rows, through the norms:
// to those of the products, in grad_x and, for two, in grad_h.
template <typename T, bool kTwo>
void through_norms(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>* rows, int count) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  NormSums<A> of_x[kTogether][4], of_h[kTogether][4];
  const auto first_of = [&](int g) { return static_cast<int>(groups.begin(g) / size); };
  const int gates =
      first_of(groups.count - 1) + static_cast<int>(groups.width(groups.count - 1) / size);
  for (int gate = 0; gate < gates; ++gate) {
    if (count == kTogether)
      sum_gate<T, kTwo, kTogether>(r, v, sums, gate, rows, of_x, of_h);
    else
      for (int i = 0; i < count; ++i)
        sum_gate<T, kTwo, 1>(r, v, sums, gate, rows + i, of_x + i, of_h + i);
  }
  for (int i = 0; i < count; ++i) {
    const auto& row = rows[i];
    for (int g = 0; g < groups.count; ++g) {
      const int first = first_of(g);
      const int64_t width = groups.width(g);
      const int number = static_cast<int>(width / size);
      const auto a = along(r, of_x[i] + first, number, width);
      Along<A> b{};
      if (kTwo) b = along(r, of_h[i] + first, number, width);
      for (int gate = first; gate < first + number; ++gate) {
        const int64_t k = gate * size;
        if constexpr (kTwo)
          norm_backward(b, row.stats[groups.count + g], row.h + k, v.gain_h + k,
                        gate_grad_of_h(r, row, gate), size, row.grad_h + k);
        norm_backward(a, row.stats[g], row.x + k, v.gain_x + k, row.grad_x + k, size,
                      row.grad_x + k);
      }
    }
  }
}

// The gates of an LSTM's row: their gradients, before their nonlinearities, to grad_x.
template <typename T, bool kTwo>
void lstm_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  A* const gates = row.gates;
  A* const cell = row.cell;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    row.soon.fetch(4, i, part);
    const auto all = lstm_gates<kTwo, false>(r, v, row, i, part).divided();
    const auto gate = [&](int which) { return piece<1>(all, which); };
#pragma GCC unroll 4
    for (int which = 0; which < 4; ++which) put(gates + which * size + i, gate(which), part);
    const auto c = fma(gate(1), load(row.c_prev + i, part), gate(0) * gate(2));
    put(cell + i, rounded<T>(clipped(r, c)), part);
  });
  const bool normed = r.cell_norm != CellNorm::kNone;
  const bool carried = r.cell_norm == CellNorm::kCarried;
  RowStats<A> s{A{0}, A{0}, A{1}};
  A rstd{1};
  if (normed) measure(r, r.cell_eps, &cell, 1, size, &s, &rstd);
  // The output gate's gradient replaces that gate, and in grad_h for now is that of the cell.
  A* const grad_cell = row.grad_h;
  NormSums<A> of_cell;
  each_block<A, 4>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto n = load(cell + i, part);
    auto seen = n;
    if (normed) {
      n = fma(n - s.mean, s.rstd, -s.rest * s.rstd);
      put(cell + i, n, part);
      seen = fma(n, load(v.gain_cell + i, part), load(v.bias_cell + i, part));
    }
    if (carried) seen = rounded<T>(seen);
    const auto shown = nonlinear(r, seen);
    const auto output = load(gates + 3 * size + i, part);
    const auto grad = load(row.grad_hidden + i, part);
    if (row.hidden != nullptr) put(row.hidden + i, rounded<T>(output * shown), part);
    put(gates + 3 * size + i, grad * shown * output * one_minus(output), part);
    auto d = through_nonlinear(r, shown, grad * output);
    if (carried || !normed) d = d + load(row.grad_c + i, part);
    if (normed) {
      add_product_to(at(sums.gain_cell, i), d, n, part);
      add_to(at(sums.bias_cell, i), d, part);
      d = d * load(v.gain_cell + i, part);
      of_cell.add(d, n);
    }
    put(grad_cell + i, d, part);
  });
  Along<A> a{};
  if (normed) a = along(r, &of_cell, 1, size);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto d = load(grad_cell + i, part);
    if (normed) d = fma(load(cell + i, part), -a.n, d - a.one) * rstd;
    if (normed && !carried) d = d + load(row.grad_c + i, part);
    const auto gate = [&](int which) { return load(gates + which * size + i, part); };
    const auto input = gate(0);
    const auto forget = gate(1);
    const auto candidate = gate(2);
    if (r.cell_clip != 0) {
      const auto c = fma(forget, load(row.c_prev + i, part), input * candidate);
      const auto most = splat(static_cast<A>(r.cell_clip));
      d = each<A, part.kVectors>([&](int k) {
        const Vec<A> none = {};
        const auto within = c.v[k] > most ? none : d.v[k];
        return c.v[k] < -most ? none : within;
      });
    }
    put(row.grad_c + i, d * forget, part);
    const auto of_input = d * candidate * input * one_minus(input);
    const auto of_forget = d * load(row.c_prev + i, part) * forget * one_minus(forget);
    const auto of_candidate = through_nonlinear(r, candidate, d * input);
    const auto of_output = gate(3);
    put(row.grad_x + i, of_input, part);
    put(row.grad_x + size + i, of_forget, part);
    put(row.grad_x + 2 * size + i, of_candidate, part);
    put(row.grad_x + 3 * size + i, of_output, part);
  });
}

// Likewise of a GRU's; of the candidate's part of h to grad_h.
template <typename T, bool kTwo>
void gru_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v,
                  const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const bool late = r.inputs == Inputs::kLate;
  each_block<A, 2>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    row.soon.fetch(3, i, part);
    const auto gates = gru_gates<false>(r, v, row, i, part);
    const auto& n = gates.candidate;
    const auto& z = gates.update;
    const auto grad = load(row.grad_hidden + i, part);
    const auto of_update = grad * (load(row.h_prev + i, part) - n) * z * one_minus(z);
    put(row.grad_direct + i, grad * z, part);
    put(row.grad_x + size + i, of_update, part);
    const auto d = through_nonlinear(r, n, grad * one_minus(z));
    if (late) {
      put(row.gates + i, gates.reset, part);
      return put(row.grad_x + 2 * size + i, d, part);
    }
    const auto through = d * gates.reset;
    put(row.grad_x + i, d * gates.reset_of * gates.reset * one_minus(gates.reset), part);
    put(row.grad_x + 2 * size + i, kTwo ? d : through, part);
    if constexpr (kTwo) {
      put(row.grad_h + 2 * size + i, through, part);
      add_to(at(sums.bias_hn, i), through, part);
    }
  });
}

// Where the candidate is summed after the reset its norm comes first: the reset gate is inside of
// it.
template <typename T>
void late_norm_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v,
                        const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row,
                        Accumulate<T> rstd) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const int64_t last = 2 * size;
  NormSums<A> of_x[1][4], of_h[1][4];
  sum_gate<T, false, 1>(r, v, sums, 2, &row, of_x, of_h);
  norm_backward(along(r, of_x[0] + 2, 1, size), rstd, row.x + last, v.gain_x + last,
                row.grad_x + last, size, row.grad_x + last);
  each_block<A, 2>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto d = load(row.grad_x + last + i, part);
    const auto reset = load(row.gates + i, part);
    put(row.grad_x + i, d * load(row.h + last + i, part) * reset * one_minus(reset), part);
    put(row.grad_h + last + i, d * reset, part);
  });
}

template <typename T, bool kTwo>
void rnn_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v,
                  const VectorSums<Accumulate<T>>&, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  each_block<A, 4>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = gate_at<kTwo, false>(v, row, 0, r.hidden_size, i, part);
    const auto d = load(row.grad_hidden + i, part);
    put(row.grad_x + i, through_nonlinear(r, nonlinear(r, a), d), part);
  });
}

// At most kTogether rows, whose sums are the same.
template <typename T, bool kTwo>
void rows_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>* rows, int count) {
  const auto bytes = [&](int64_t gates) {
    return static_cast<size_t>(gates * r.hidden_size) * sizeof(Accumulate<T>);
  };
  const bool gru = r.cell == CellKind::kGru;
  const auto gates_backward = gru                         ? gru_backward<T, kTwo>
                              : r.cell == CellKind::kLstm ? lstm_backward<T, kTwo>
                                                          : rnn_backward<T, kTwo>;
  const bool late = r.inputs == Inputs::kLate;
  const int last = groups.count - 1;
  for (int i = 0; i < count; ++i) {
    gates_backward(r, v, sums, rows[i]);
    if (late) late_norm_backward<T>(r, v, sums, rows[i], rows[i].stats[last]);
  }
  if (r.norm != NormKind::kNone)
    through_norms<T, kTwo>(r, late ? Groups{groups.first, groups.size, last} : groups, v, sums,
                           rows, count);
  for (int i = 0; i < count; ++i) {
    const auto& row = rows[i];
    // Without a norm, or with one for both, the products of a GRU's reset and update gate are
    // alike.
    if (late || (gru && r.norm == NormKind::kNone)) std::memcpy(row.grad_h, row.grad_x, bytes(2));
    add_row(sums.bias_ih, row.grad_x, r.gates * r.hidden_size);
    add_row(sums.bias_hh, row.grad_h, r.gates * r.hidden_size);
  }
}
template <typename T>
void cells_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                    const VectorSums<Accumulate<T>>& sums, const RowGradient<T>* rows, int count) {
  r.inputs == Inputs::kSeparate ? rows_backward<T, true>(r, groups, v, sums, rows, count)
                                : rows_backward<T, false>(r, groups, v, sums, rows, count);
}

}  // namespace layernorm::LAYERNORM_ISA
