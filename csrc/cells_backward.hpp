// One row of one step, backward: from the gradient of the new state to that of the products x and
// W_hh h, of the state before, and of gains and biases. Words and types as in cells.hpp.
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
};

template <typename A>
LAYERNORM_INLINE void add_to(A* sum, Vec<A> v, auto part) {
  put(sum, get(sum, part) + v, part);
}
template <typename A>
void add_row(A* sum, const A* row, int64_t count) {
  if (sum == nullptr) return;
  each_vector<A>(count, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    add_to<A>(sum + i, get(row + i, part), part);
  });
}

// What the norm's statistics take from t, the gradient of the normalized n: with them
// rstd·(t - along_one - n·along_n) is the gradient of what was normalized.
template <typename A>
struct Along {
  A one, n;
};
template <typename A>
Along<A> along(const Recurrent& r, Vec<A> sum_t, Vec<A> sum_tn, int64_t width) {
  const double inverse = 1.0 / static_cast<double>(width);
  const bool centred = r.norm == NormKind::kLayer;
  return {centred ? static_cast<A>(static_cast<double>(add_lanes(sum_t)) * inverse) : A{0},
          static_cast<A>(static_cast<double>(add_lanes(sum_tn)) * inverse)};
}

// Groups [begin, end) of a row: from grad, that of the gates, to that of the products; may be in
// place. n is the normalized row.
template <typename A>
void groups_backward(const Recurrent& r, const Groups& groups, int begin, int end, const A* grad,
                     const A* n, const A* gain, const A* rstd, A* sum_gain, A* result) {
  for (int g = begin; g < end; ++g) {
    const int64_t from = groups.begin(g);
    const int64_t width = groups.width(g);
    Vec<A> sum_t = {};
    Vec<A> sum_tn = {};
    each_vector<A>(width, [&](int64_t at, auto part) LAYERNORM_LAMBDA {
      const int64_t i = from + at;
      const auto d = get(grad + i, part);
      const auto v = get(n + i, part);
      const auto t = d * get(gain + i, part);
      sum_t += t;
      sum_tn = fma(t, v, sum_tn);
      if (sum_gain != nullptr) put(sum_gain + i, fma(d, v, get(sum_gain + i, part)), part);
    });
    const auto a = along<A>(r, sum_t, sum_tn, width);
    each_vector<A>(width, [&](int64_t at, auto part) LAYERNORM_LAMBDA {
      const int64_t i = from + at;
      const auto t = fma(get(grad + i, part), get(gain + i, part), splat(-a.one));
      put(result + i, splat(rstd[g]) * fma(get(n + i, part), splat(-a.n), t), part);
    });
  }
}

// From the gradients of the gates, in grad_x and for separate inputs also in grad_h, to those of the
// products.
template <typename T>
void through_norms(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  add_row(sums.bias, row.grad_x, r.gates * r.hidden_size);
  if (r.inputs == Inputs::kSeparate)
    groups_backward(r, groups, 0, groups.count, row.grad_h, row.h, v.gain_h,
                    row.stats + groups.count, sums.gain_h, row.grad_h);
  groups_backward(r, groups, 0, groups.count, row.grad_x, row.x, v.gain_x, row.stats, sums.gain_x,
                  row.grad_x);
}

template <typename T, bool kTwo>
void lstm_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const auto one = splat(A{1});
  A* const gates = row.gates;
  A* const cell = row.cell;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto input = sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, i, part));
    const auto forget = sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, size + i, part));
    const auto candidate = tanh<A>(gate_at<A, kTwo>(v, row.x, row.h, 2 * size + i, part));
    put(gates + i, input, part);
    put(gates + size + i, forget, part);
    put(gates + 2 * size + i, candidate, part);
    put(gates + 3 * size + i,
        sigmoid<A>(gate_at<A, kTwo>(v, row.x, row.h, 3 * size + i, part)), part);
    put(cell + i, rounded<T>(fma(forget, get(row.c_prev + i, part), input * candidate)), part);
  });
  const bool normed = r.cell_norm != CellNorm::kNone;
  const bool carried = r.cell_norm == CellNorm::kCarried;
  const A rstd = normed ? normalize(r, cell, size) : A{1};
  // grad_x takes the output gate's gradient, and in the candidate's place for now that of the cell.
  A* const grad_cell = row.grad_x + 2 * size;
  Vec<A> sum_t = {};
  Vec<A> sum_tn = {};
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto n = get(cell + i, part);
    auto seen = n;
    if (normed) seen = fma(n, get(v.gain_cell + i, part), get(v.bias_cell + i, part));
    if (carried) seen = rounded<T>(seen);
    const auto shown = tanh<A>(seen);
    const auto output = get(gates + 3 * size + i, part);
    const auto grad = get(row.grad_hidden + i, part);
    if (row.hidden != nullptr) put(row.hidden + i, rounded<T>(output * shown), part);
    put(row.grad_x + 3 * size + i, grad * shown * output * (one - output), part);
    auto d = grad * output * fma(-shown, shown, one);
    if (carried || !normed) d += get(row.grad_c + i, part);
    if (normed) {
      if (sums.gain_cell != nullptr)
        put(sums.gain_cell + i, fma(d, n, get(sums.gain_cell + i, part)), part);
      if (sums.bias_cell != nullptr) add_to<A>(sums.bias_cell + i, d, part);
      d = d * get(v.gain_cell + i, part);
      sum_t += d;  // 0 beyond the row, as all that was loaded
      sum_tn = fma(d, n, sum_tn);
    }
    put(grad_cell + i, d, part);
  });
  Along<A> a{};
  if (normed) a = along<A>(r, sum_t, sum_tn, size);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto d = get(grad_cell + i, part);
    if (normed) d = splat(rstd) * fma(get(cell + i, part), splat(-a.n), d - splat(a.one));
    if (normed && !carried) d += get(row.grad_c + i, part);
    const auto input = get(gates + i, part);
    const auto forget = get(gates + size + i, part);
    const auto candidate = get(gates + 2 * size + i, part);
    put(row.grad_x + i, d * candidate * input * (one - input), part);
    put(row.grad_x + size + i, d * get(row.c_prev + i, part) * forget * (one - forget), part);
    put(row.grad_x + 2 * size + i, d * input * fma(-candidate, candidate, one), part);
    put(row.grad_c + i, d * forget, part);
  });
  if (r.inputs == Inputs::kSeparate)
    std::memcpy(row.grad_h, row.grad_x, static_cast<size_t>(4 * size) * sizeof(A));
}

template <typename T>
void gru_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                  const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const auto one = splat(A{1});
  const bool late = r.inputs == Inputs::kLate;
  const bool two = r.inputs == Inputs::kSeparate;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto gates = gru_gates<A>(r, v, row.x, row.h, i, part);
    const auto grad = get(row.grad_hidden + i, part);
    const auto z = gates.update;
    const auto n = gates.candidate;
    const auto d = grad * (one - z) * fma(-n, n, one);
    const auto reset_slope = gates.reset * (one - gates.reset);
    put(row.grad_x + size + i, grad * (get(row.h_prev + i, part) - n) * z * (one - z), part);
    put(row.grad_direct + i, grad * z, part);
    if (late) {
      put(row.grad_x + 2 * size + i, d, part);
      put(row.gates + i, gates.reset, part);
      return;
    }
    const auto through = d * gates.reset;
    put(row.grad_x + i, d * gates.reset_of * reset_slope, part);
    put(row.grad_x + 2 * size + i, two ? d : through, part);
    if (!two) return;
    put(row.grad_h + 2 * size + i, through, part);
    if (sums.bias_hn != nullptr) add_to<A>(sums.bias_hn + i, through, part);
  });
  if (two) std::memcpy(row.grad_h, row.grad_x, static_cast<size_t>(2 * size) * sizeof(A));
  if (!late) return through_norms<T>(r, groups, v, sums, row);
  // The candidate's norm first: the reset gate is inside of it.
  const int last = groups.count - 1;
  const int64_t at = 2 * size;
  if (sums.bias != nullptr) add_row(sums.bias + at, row.grad_x + at, size);
  groups_backward(r, groups, last, groups.count, row.grad_x, row.x, v.gain_x, row.stats,
                  sums.gain_x, row.grad_x);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto d = get(row.grad_x + at + i, part);
    const auto reset = get(row.gates + i, part);
    put(row.grad_x + i, d * get(row.h + at + i, part) * reset * (one - reset), part);
    put(row.grad_h + at + i, d * reset, part);
  });
  add_row(sums.bias, row.grad_x, at);
  groups_backward(r, groups, 0, last, row.grad_x, row.x, v.gain_x, row.stats, sums.gain_x,
                  row.grad_x);
  std::memcpy(row.grad_h, row.grad_x, static_cast<size_t>(at) * sizeof(A));
}

template <typename T>
void rnn_backward(const Recurrent& r, const Vectors<Accumulate<T>>& v, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const bool two = r.inputs == Inputs::kSeparate;
  each_vector<A>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = two ? gate_at<A, true>(v, row.x, row.h, i, part)
                       : gate_at<A, false>(v, row.x, row.h, i, part);
    const auto grad = get(row.grad_hidden + i, part);
    Vec<A> d;
    if (r.relu) {
      d = a <= Vec<A>{} ? Vec<A>{} : grad;
    } else {
      const auto hidden = tanh<A>(a);
      d = grad * fma(-hidden, hidden, splat(A{1}));
    }
    put(row.grad_x + i, d, part);
    if (two) put(row.grad_h + i, d, part);
  });
}

template <typename T>
void cell_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  if (r.cell == CellKind::kGru) {
    gru_backward<T>(r, groups, v, sums, row);
  } else {
    if (r.cell == CellKind::kRnn)
      rnn_backward<T>(r, v, row);
    else if (r.inputs == Inputs::kSeparate)
      lstm_backward<T, true>(r, v, sums, row);
    else
      lstm_backward<T, false>(r, v, sums, row);
    through_norms<T>(r, groups, v, sums, row);
  }
  add_row(sums.bias_ih, row.grad_x, r.gates * r.hidden_size);
  add_row(sums.bias_hh, row.grad_h, r.gates * r.hidden_size);
}

}  // namespace layernorm::LAYERNORM_ISA
