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

// Backward reads rows that were kept long ago: while one is computed, the next may be fetched.
template <bool kTwo>
LAYERNORM_INLINE void fetch_next(const Recurrent& r, const auto& row, int64_t i) {
  for (int64_t k = i; k < r.gates * r.hidden_size; k += r.hidden_size) {
    __builtin_prefetch(row.x + r.gates * r.hidden_size + k);
    if constexpr (kTwo) __builtin_prefetch(row.h + r.gates * r.hidden_size + k);
  }
}

template <typename A>
LAYERNORM_INLINE void add_to(A* sum, const auto& a, auto part) {
  if (sum != nullptr) put(sum, load(sum, part) + a, part);
}
template <typename A>
LAYERNORM_INLINE void add_product_to(A* sum, const auto& a, const auto& b, auto part) {
  if (sum != nullptr) put(sum, fma(a, b, load(sum, part)), part);
}
// Where element k of a row of sums is, if there is such a row.
template <typename A>
LAYERNORM_INLINE A* at(A* sums, int64_t k) {
  return sums == nullptr ? nullptr : sums + k;
}
template <typename A>
void add_row(A* sum, const A* row, int64_t count) {
  if (sum == nullptr) return;
  each_block<A, 4>(count, [&](int64_t i, auto part)
                              LAYERNORM_LAMBDA { add_to(sum + i, load(row + i, part), part); });
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
  const bool centred = r.norm == NormKind::kLayer;
  return {centred ? static_cast<A>(static_cast<double>(add_lanes(all.t)) * inverse) : A{0},
          static_cast<A>(static_cast<double>(add_lanes(all.tn)) * inverse)};
}

// In place: from the gradient of the gates to that of the products, over [begin, begin + width).
template <typename A>
void norm_backward(const Along<A>& a, A rstd, const A* n, const A* gain, int64_t begin,
                   int64_t width, A* grad) {
  each_block<A, 4>(width, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const int64_t k = begin + i;
    const auto t = load(grad + k, part) * load(gain + k, part) - a.one;
    put(grad + k, fma(load(n + k, part), -a.n, t) * rstd, part);
  });
}

// Collects the gradients of the gates of one row, feature by feature, with all sums that they are
// part of; then takes them through the norms.
template <typename A, bool kTwo, bool kNorm>
class GateGradients {
 public:
  GateGradients(const Recurrent& r, const Vectors<A>& v, const VectorSums<A>& sums, const auto& row)
      : r_(r), v_(v), sums_(sums), x_(row.x), h_(row.h), grad_x_(row.grad_x), grad_h_(row.grad_h) {}

  // Feature i of this gate; d_h is that of h's part, where it has one.
  LAYERNORM_INLINE void add(int gate, int64_t i, const auto& d_x, const auto& d_h, auto part) {
    const int64_t k = gate * r_.hidden_size + i;
    put(grad_x_ + k, d_x, part);
    if constexpr (kTwo) put(grad_h_ + k, d_h, part);
    if constexpr (kNorm) {
      add_to(at(sums_.bias, k), d_x, part);
      const auto x = load(x_ + k, part);
      add_product_to(at(sums_.gain_x, k), d_x, x, part);
      of_x_[gate].add(d_x * load(v_.gain_x + k, part), x);
      if constexpr (kTwo) {
        const auto h = load(h_ + k, part);
        add_product_to(at(sums_.gain_h, k), d_h, h, part);
        of_h_[gate].add(d_h * load(v_.gain_h + k, part), h);
      }
    }
  }

  void finish(const Groups& groups, const A* stats) {
    through_norms(groups, stats);
    add_biases();
  }
  void through_norms(const Groups& groups, const A* stats) {
    if constexpr (kNorm) {
      for (int g = 0; g < groups.count; ++g) {
        const int64_t begin = groups.begin(g);
        const int64_t width = groups.width(g);
        const auto first = begin / r_.hidden_size;
        const auto count = static_cast<int>(width / r_.hidden_size);
        norm_backward(along(r_, of_x_ + first, count, width), stats[g], x_, v_.gain_x, begin, width,
                      grad_x_);
        if constexpr (kTwo)
          norm_backward(along(r_, of_h_ + first, count, width), stats[groups.count + g], h_,
                        v_.gain_h, begin, width, grad_h_);
      }
    }
  }
  // Of the biases inside the norm.
  void add_biases() {
    const int64_t all = r_.gates * r_.hidden_size;
    add_row(sums_.bias_ih, grad_x_, all);
    add_row(sums_.bias_hh, grad_h_, all);
  }

 private:
  const Recurrent& r_;
  const Vectors<A>& v_;
  const VectorSums<A>& sums_;
  const A *x_, *h_;
  A *grad_x_, *grad_h_;
  NormSums<A> of_x_[4], of_h_[4];
};

template <typename T, bool kTwo, bool kNorm>
void lstm_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  A* const gates = row.gates;
  A* const cell = row.cell;
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    fetch_next<kTwo>(r, row, i);
    const auto all = lstm_gates<kTwo, false>(v, row, size, i, part).divided();
    const auto gate = [&](int which) { return piece<1>(all, which); };
#pragma GCC unroll 4
    for (int which = 0; which < 4; ++which) put(gates + which * size + i, gate(which), part);
    const auto c = fma(gate(1), load(row.c_prev + i, part), gate(0) * gate(2));
    put(cell + i, rounded<T>(c), part);
  });
  const bool normed = r.cell_norm != CellNorm::kNone;
  const bool carried = r.cell_norm == CellNorm::kCarried;
  RowStats<A> s{A{0}, A{0}, A{1}};
  A rstd{1};
  if (normed) measure(r, &cell, 1, size, &s, &rstd);
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
    const auto shown = tanh(seen);
    const auto output = load(gates + 3 * size + i, part);
    const auto grad = load(row.grad_hidden + i, part);
    if (row.hidden != nullptr) put(row.hidden + i, rounded<T>(output * shown), part);
    put(gates + 3 * size + i, grad * shown * output * one_minus(output), part);
    auto d = grad * output * one_minus_square(shown);
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
  GateGradients<A, kTwo, kNorm> gradients(r, v, sums, row);
  each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    auto d = load(grad_cell + i, part);
    if (normed) d = fma(load(cell + i, part), -a.n, d - a.one) * rstd;
    if (normed && !carried) d = d + load(row.grad_c + i, part);
    const auto gate = [&](int which) { return load(gates + which * size + i, part); };
    const auto input = gate(0);
    const auto forget = gate(1);
    const auto candidate = gate(2);
    put(row.grad_c + i, d * forget, part);
    const auto of_input = d * candidate * input * one_minus(input);
    const auto of_forget = d * load(row.c_prev + i, part) * forget * one_minus(forget);
    const auto of_candidate = d * input * one_minus_square(candidate);
    const auto of_output = gate(3);
    gradients.add(0, i, of_input, of_input, part);
    gradients.add(1, i, of_forget, of_forget, part);
    gradients.add(2, i, of_candidate, of_candidate, part);
    gradients.add(3, i, of_output, of_output, part);
  });
  gradients.finish(groups, row.stats);
}

template <typename T, bool kTwo, bool kNorm>
void gru_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                  const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  GateGradients<A, kTwo, kNorm> gradients(r, v, sums, row);
  each_block<A, 2>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto gates = gru_gates<false>(r, v, row, i, part);
    const auto& n = gates.candidate;
    const auto& z = gates.update;
    const auto grad = load(row.grad_hidden + i, part);
    const auto of_update = grad * (load(row.h_prev + i, part) - n) * z * one_minus(z);
    put(row.grad_direct + i, grad * z, part);
    const auto d = grad * one_minus(z) * one_minus_square(n);
    const auto through = d * gates.reset;
    const auto of_reset = d * gates.reset_of * gates.reset * one_minus(gates.reset);
    if constexpr (kTwo) add_to(at(sums.bias_hn, i), through, part);
    gradients.add(0, i, of_reset, of_reset, part);
    gradients.add(1, i, of_update, of_update, part);
    gradients.add(2, i, kTwo ? d : through, through, part);
  });
  gradients.finish(groups, row.stats);
}

// Where the candidate is summed after the reset its norm comes first: the reset gate is inside of
// it.
template <typename T>
void gru_backward_late(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                       const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  const int64_t size = r.hidden_size;
  const int64_t last = 2 * size;
  NormSums<A> of_last;
  each_block<A, 2>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto gates = gru_gates<false>(r, v, row, i, part);
    const auto& n = gates.candidate;
    const auto& z = gates.update;
    const auto grad = load(row.grad_hidden + i, part);
    put(row.grad_direct + i, grad * z, part);
    put(row.gates + i, gates.reset, part);
    put(row.gates + size + i, grad * (load(row.h_prev + i, part) - n) * z * one_minus(z), part);
    const auto d = grad * one_minus(z) * one_minus_square(n);
    put(row.grad_x + last + i, d, part);
    const auto x = load(row.x + last + i, part);
    add_to(at(sums.bias, last + i), d, part);
    add_product_to(at(sums.gain_x, last + i), d, x, part);
    of_last.add(d * load(v.gain_x + last + i, part), x);
  });
  const int g = groups.count - 1;
  norm_backward(along(r, &of_last, 1, size), row.stats[g], row.x, v.gain_x, last, size, row.grad_x);
  GateGradients<A, false, true> gradients(r, v, sums, row);
  each_block<A, 2>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto d = load(row.grad_x + last + i, part);
    const auto reset = load(row.gates + i, part);
    const auto of_reset = d * load(row.h + last + i, part) * reset * one_minus(reset);
    put(row.grad_h + last + i, d * reset, part);
    gradients.add(0, i, of_reset, of_reset, part);
    const auto of_update = load(row.gates + size + i, part);
    gradients.add(1, i, of_update, of_update, part);
  });
  gradients.through_norms({groups.first, groups.size, g}, row.stats);
  std::memcpy(row.grad_h, row.grad_x, static_cast<size_t>(last) * sizeof(A));
  gradients.add_biases();
}

template <typename T, bool kTwo, bool kNorm>
void rnn_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                  const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  using A = Accumulate<T>;
  GateGradients<A, kTwo, kNorm> gradients(r, v, sums, row);
  each_block<A, 4>(r.hidden_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
    const auto a = gate_at<kTwo, false>(v, row, 0, r.hidden_size, i, part);
    auto d = load(row.grad_hidden + i, part);
    if (r.relu)
      d = each<A, part.kVectors>([&](int k) { return a.v[k] <= Vec<A>{} ? Vec<A>{} : d.v[k]; });
    else
      d = d * one_minus_square(tanh(a));
    gradients.add(0, i, d, d, part);
  });
  gradients.finish(groups, row.stats);
}

template <typename T>
void cell_backward(const Recurrent& r, const Groups& groups, const Vectors<Accumulate<T>>& v,
                   const VectorSums<Accumulate<T>>& sums, const RowGradient<T>& row) {
  if (r.inputs == Inputs::kLate) return gru_backward_late<T>(r, groups, v, sums, row);
  const bool two = r.inputs == Inputs::kSeparate;
  const bool normed = r.norm != NormKind::kNone;
  const auto call = [&](auto function) { function(r, groups, v, sums, row); };
  switch (r.cell) {
    case CellKind::kLstm:
      return call(!normed ? lstm_backward<T, false, false>
                  : two   ? lstm_backward<T, true, true>
                          : lstm_backward<T, false, true>);
    case CellKind::kGru:
      return call(!normed ? gru_backward<T, true, false>
                  : two   ? gru_backward<T, true, true>
                          : gru_backward<T, false, true>);
    default:
      return call(!normed ? rnn_backward<T, false, false>
                  : two   ? rnn_backward<T, true, true>
                          : rnn_backward<T, false, true>);
  }
}

}  // namespace layernorm::LAYERNORM_ISA
