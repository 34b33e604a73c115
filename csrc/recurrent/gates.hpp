// The part of a step after its products, of an LSTM or a GRU, for networks that make these
// themselves: the norms, the gates and the new state. Backward computes the norms again; so nothing
// is kept.
#pragma once

#include "sequence_backward.hpp"

namespace layernorm::LAYERNORM_ISA {

// A few rows: where the products, with what is added to them, become the normalized; and working
// memory of one caller.
template <typename T>
class Gates {
 public:
  using A = Accumulate<T>;

  Gates(const Recurrent& r, const void* prepared, void* memory)
      : r_(r), groups_(groups_of(r)), weights_(r, false, const_cast<void*>(prepared)) {
    Arena arena{static_cast<char*>(memory)};
    const int64_t products = kTogether * gate_width(r);
    const int64_t states = kTogether * r.hidden_size;
    x_ = arena.take<A>(products);
    h_ = is_summed() ? x_ : arena.take<A>(products);
    stats_ = arena.take<A>(kTogether * stats_width());
    cell_ = arena.take<A>(states);
    below_out_ = arena.take<A>(states);
    gates_ = arena.take<A>(4 * r.hidden_size);
    grad_x_ = arena.take<A>(products);
    grad_h_ = arena.take<A>(products);
    grad_hidden_ = arena.take<A>(states);
    grad_state_ = arena.take<A>(states);
    bytes = arena.used;
  }

  size_t bytes;

  void forward(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTogether) {
      const int count = static_cast<int>(least(kTogether, end - first));
      RowStep<T> rows[kTogether];
      for (int i = 0; i < count; ++i) rows[i] = row_step(first + i, i);
      if (r_.inputs == Inputs::kSeparate) {
        A* x[kTogether];
        A* kept[kTogether] = {};
        GateNorm<A> norms[kTogether];
        for (int i = 0; i < count; ++i) x[i] = rows[i].x;
        measure_groups(r_, groups_, x, count, norms, kept);
        for (int i = 0; i < count; ++i) rows[i].norm_x = norms[i];
      }
      cell_steps<T>(r_, groups_, weights_.vectors, rows, count);
    }
  }

  // Blocks [begin, end) of rows_per_block() rows, each with its sums.
  void backward(const RecurrentGradients& g, A* sums, int64_t begin, int64_t end) {
    const BlockSums<A> layout(r_, g);
    const int64_t per_block = rows_per_block(r_.batch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = least(r_.batch, (block + 1) * per_block);
      for (int64_t first = block * per_block; first < last; first += kTogether) {
        const int count = static_cast<int>(least(kTogether, last - first));
        RowGradient<T> rows[kTogether];
        for (int i = 0; i < count; ++i) rows[i] = row_gradient(g, first + i, i);
        cells_backward<T>(r_, groups_, weights_.vectors, layout.at(sums + block * layout.stride),
                          rows, count);
        for (int i = 0; i < count; ++i) hand_over(g, first + i, rows[i]);
      }
    }
  }

 private:
  const Recurrent& r_;
  Groups groups_;
  Prepared<T> weights_;
  A *x_, *h_, *stats_, *cell_, *below_out_, *gates_;
  A *grad_x_, *grad_h_, *grad_hidden_, *grad_state_;

  [[nodiscard]] bool is_lstm() const { return r_.cell == CellKind::kLstm; }
  [[nodiscard]] bool is_summed() const { return r_.inputs == Inputs::kSummed; }
  [[nodiscard]] int64_t stats_width() const {
    return (r_.inputs == Inputs::kSeparate ? 2 : 1) * groups_.count;
  }
  template <typename E>
  [[nodiscard]] E* state_at(E* states, int64_t n) const {
    return states + n * r_.hidden_size;
  }

  [[nodiscard]] Soon<T> soon(int64_t n) const {
    const int64_t next = n + kTogether;
    if (next >= r_.batch) return {};
    const int64_t at = next * gate_width(r_);
    return {static_cast<const T*>(r_.input) + at, static_cast<const T*>(r_.hidden_gates) + at};
  }

  // Row n of the products, to place i.
  void take_products(int64_t n, int64_t i) {
    const int64_t width = gate_width(r_);
    const T* const from_x = static_cast<const T*>(r_.input) + n * width;
    const T* const from_h = static_cast<const T*>(r_.hidden_gates) + n * width;
    A* const x = x_ + i * width;
    A* const h = h_ + i * width;
    each_vector<A>(width, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
      const auto of_x = load(weights_.bias_x + k, part) + load(from_x + k, part);
      const auto of_h = load(from_h + k, part);
      put(x + k, is_summed() ? of_x + of_h : of_x, part);
      if (!is_summed()) put(h + k, load(weights_.bias_h + k, part) + of_h, part);
    });
  }

  // Row n at place i, as forward reads and writes it.
  RowStep<T> row_step(int64_t n, int64_t i) {
    take_products(n, i);
    RowStep<T> row{};
    row.x = x_ + i * gate_width(r_);
    row.h = h_ + i * gate_width(r_);
    row.hidden = state_at(static_cast<T*>(r_.hn), n);
    row.soon = soon(n);
    if (is_lstm()) {
      row.c_prev = state_at(static_cast<const T*>(r_.c0), n);
      row.c = state_at(static_cast<T*>(r_.cn), n);
      row.below_out = state_at(below_out_, i);
      row.cell = state_at(cell_, i);
    } else {
      row.h_prev = state_at(static_cast<const T*>(r_.h0), n);
    }
    return row;
  }

  RowGradient<T> row_gradient(const RecurrentGradients& g, int64_t n, int64_t i) {
    const int64_t width = gate_width(r_);
    RowGradient<T> row{};
    row.x = x_ + i * width;
    row.h = h_ + i * width;
    row.stats = stats_ + i * stats_width();
    take_products(n, i);
    normalize_products(i);
    row.grad_hidden = given(g.grad_hn, n, state_at(grad_hidden_, i));
    row.grad_x = result_row(g.grad_input, n, width, grad_x_ + i * width);
    row.grad_h =
        is_summed() ? row.grad_x : result_row(g.grad_hidden_gates, n, width, grad_h_ + i * width);
    if (is_lstm()) {
      row.c_prev = state_at(static_cast<const T*>(r_.c0), n);
      row.grad_c = result_row(g.grad_c0, n, r_.hidden_size, state_at(grad_state_, i));
      read_state(g.grad_cn, n, row.grad_c);
    } else {
      row.h_prev = state_at(static_cast<const T*>(r_.h0), n);
      row.grad_direct = result_row(g.grad_h0, n, r_.hidden_size, state_at(grad_state_, i));
    }
    row.gates = gates_;
    row.cell = cell_;
    row.soon = soon(n);
    return row;
  }

  void normalize_products(int64_t i) {
    RowStep<T> row{};
    row.x = x_ + i * gate_width(r_);
    row.h = h_ + i * gate_width(r_);
    row.stats = stats_ + i * stats_width();
    if (r_.inputs == Inputs::kLate) return normalize_late<T>(r_, groups_, weights_.vectors, row);
    normalize_groups(r_, groups_, 0, groups_.count, row.x, row.stats);
    if (r_.inputs == Inputs::kSeparate)
      normalize_groups(r_, groups_, 0, groups_.count, row.h, row.stats + groups_.count);
  }

  // Gradients are read and written in place where they are in the type computed in, else in memory
  // of this caller's own.
  static constexpr bool kSame = std::is_same_v<T, A>;

  // Row n of the gradient of a state; 0 where there is none.
  void read_state(const void* grads, int64_t n, A* to) const {
    if (grads == nullptr)
      return static_cast<void>(std::memset(to, 0, static_cast<size_t>(r_.hidden_size) * sizeof(A)));
    const T* const from = state_at(static_cast<const T*>(grads), n);
    each_vector<A>(r_.hidden_size, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
      put(to + k, load(from + k, part), part);
    });
  }
  const A* given(const void* grads, int64_t n, A* own) const {
    if constexpr (kSame)
      if (grads != nullptr) return state_at(static_cast<const A*>(grads), n);
    read_state(grads, n, own);
    return own;
  }
  static A* result_row(void* grads, int64_t n, int64_t width, A* own) {
    if constexpr (kSame)
      if (grads != nullptr) return static_cast<A*>(grads) + n * width;
    return own;
  }

  // Row n of what is wanted, in its type.
  void hand_over(const RecurrentGradients& g, int64_t n, const RowGradient<T>& row) const {
    if constexpr (!kSame) {
      const auto write = [&](void* grads, const A* from, int64_t width) {
        if (grads == nullptr) return;
        T* const to = static_cast<T*>(grads) + n * width;
        each_block<A, 4>(width, [&](int64_t k, auto part)
                                    LAYERNORM_LAMBDA { put(to + k, load(from + k, part), part); });
      };
      write(g.grad_input, row.grad_x, gate_width(r_));
      write(g.grad_hidden_gates, row.grad_h, gate_width(r_));
      write(g.grad_c0, row.grad_c, r_.hidden_size);
      write(g.grad_h0, row.grad_direct, r_.hidden_size);
    }
  }
};

}  // namespace layernorm::LAYERNORM_ISA
