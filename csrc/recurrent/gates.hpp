// The part of an LSTM's step after its products, for networks that make these themselves: the
// norms, the gates and the new state. Backward computes the norms again; so nothing is kept.
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
    const int64_t rows = kTogether * gate_width(r);
    x_ = arena.take<A>(rows);
    h_ = two() ? arena.take<A>(rows) : x_;
    stats_ = arena.take<A>(kTogether * stats_width());
    gates_ = arena.take<A>(gate_width(r));
    below_out_ = arena.take<A>(kTogether * r.hidden_size);
    cell_ = arena.take<A>(kTogether * r.hidden_size);
    bytes = arena.used;
  }

  size_t bytes;

  void forward(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTogether) {
      const int count = static_cast<int>(least(kTogether, end - first));
      RowStep<T> rows[kTogether];
      A* x[kTogether];
      A* kept[kTogether] = {};
      for (int i = 0; i < count; ++i) {
        const int64_t n = first + i;
        const int64_t place = i * r_.hidden_size;
        take_products(n, i);
        auto& row = rows[i];
        x[i] = row.x = x_ + i * gate_width(r_);
        row.h = h_ + i * gate_width(r_);
        row.stats = nullptr;
        row.keep = false;
        row.c_prev = at(static_cast<const T*>(r_.c0), n);
        row.h_prev = nullptr;
        row.c = at(static_cast<T*>(r_.cn), n);
        row.hidden = at(static_cast<T*>(r_.hn), n);
        row.below_out = below_out_ + place;
        row.cell = cell_ + place;
      }
      if (two()) {
        GateNorm<A> norms[kTogether];
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
      }
    }
  }

 private:
  const Recurrent& r_;
  Groups groups_;
  Prepared<T> weights_;
  A *x_, *h_, *stats_, *gates_, *below_out_, *cell_;

  [[nodiscard]] bool two() const { return r_.inputs == Inputs::kSeparate; }
  [[nodiscard]] int64_t stats_width() const { return (two() ? 2 : 1) * groups_.count; }
  template <typename E>
  [[nodiscard]] E* at(E* states, int64_t n) const {
    return states + n * r_.hidden_size;
  }

  // Row n of the products, to place i.
  void take_products(int64_t n, int64_t i) {
    const int64_t width = gate_width(r_);
    const T* const from_x = static_cast<const T*>(r_.input) + n * width;
    const T* const from_h = static_cast<const T*>(r_.h0) + n * width;
    A* const x = x_ + i * width;
    A* const h = h_ + i * width;
    each_vector<A>(width, [&](int64_t k, auto part) LAYERNORM_LAMBDA {
      const auto of_x = load(weights_.bias_x + k, part) + load(from_x + k, part);
      const auto of_h = load(from_h + k, part);
      put(x + k, two() ? of_x : of_x + of_h, part);
      if (two()) put(h + k, load(weights_.bias_h + k, part) + of_h, part);
    });
  }

  RowGradient<T> row_gradient(const RecurrentGradients& g, int64_t n, int64_t i) {
    const int64_t width = gate_width(r_);
    take_products(n, i);
    A* const x = x_ + i * width;
    A* const h = h_ + i * width;
    A* const stats = stats_ + i * stats_width();
    normalize_groups(r_, groups_, 0, groups_.count, x, stats);
    if (two()) normalize_groups(r_, groups_, 0, groups_.count, h, stats + groups_.count);
    RowGradient<T> row{};
    row.x = x;
    row.h = h;
    row.stats = stats;
    row.c_prev = at(static_cast<const T*>(r_.c0), n);
    row.grad_hidden = at(static_cast<const A*>(g.grad_hn), n);
    row.grad_c = at(static_cast<A*>(g.grad_c0), n);
    std::memcpy(row.grad_c, at(static_cast<const A*>(g.grad_cn), n),
                static_cast<size_t>(r_.hidden_size) * sizeof(A));
    row.grad_x = static_cast<A*>(g.grad_input) + n * width;
    row.grad_h = two() ? static_cast<A*>(g.grad_h0) + n * width : row.grad_x;
    row.gates = gates_;
    row.cell = cell_;
    return row;
  }
};

}  // namespace layernorm::LAYERNORM_ISA
