// The time loop backward, in chunks of steps: the steps of a chunk one by one, then the sums over
// all rows of the chunk as large products.
//
// What is summed over rows is summed in an order that the shapes alone decide: by chunks, and the
// gradients of gains and biases by blocks of rows, whatever the number of threads.
#pragma once

#include "backward_memory.hpp"

namespace layernorm::LAYERNORM_ISA {

template <typename T>
class Backward {
 public:
  using A = Accumulate<T>;

  Backward(const Recurrent& r, const RecurrentGradients& g, const void* prepared, void* shared,
           void* scratch, int64_t chunk, int64_t row_begin, int64_t row_end, Team& team, int rank)
      : r_(r),
        g_(g),
        rows_{r},
        groups_(groups_of(r)),
        weights_(r, true, const_cast<void*>(prepared)),
        shared_(r, g, shared),
        s_(scratch_of<BackwardScratch<T>>(r, row_end - row_begin, scratch, rank)),
        chunk_(r, chunk),
        begin_(row_begin),
        end_(row_end),
        team_(team),
        rank_(rank) {}

  void run() {
    std::memset(s_.zeros, 0, static_cast<size_t>(r_.hidden_size) * sizeof(T));
    mine_ = own_rows();
    if (chunk_.last == r_.steps) begin_state();
    int64_t computed = 0;
    if (r_.saved_x == nullptr) computed = compute_again();
    for (int64_t k = chunk_.last - 1; k >= chunk_.first; --k) {
      computed -= count(k);
      step(k, computed);
    }
    for (int64_t n = mine_.begin; n < mine_.end; n = block_end(n)) close_block(n);
  }

 private:
  const Recurrent& r_;
  const RecurrentGradients& g_;
  Rows<T> rows_;
  Groups groups_;
  Prepared<T> weights_;
  BackwardShared<T> shared_;
  BackwardScratch<T> s_;
  Chunk<T> chunk_;
  int64_t begin_, end_;
  Team& team_;
  int rank_;
  Share mine_{};  // rows of the batch whose steps this member computes: whole blocks

  [[nodiscard]] int64_t per_block() const { return rows_per_block(r_.batch); }
  [[nodiscard]] int64_t block_end(int64_t n) const {
    return least(mine_.end, (n / per_block() + 1) * per_block());
  }
  [[nodiscard]] Share own_rows() const {
    const int64_t first = begin_ / per_block();
    const Share blocks = share_of(parts_of(end_, per_block()) - first, rank_, team_.size());
    return {least(end_, (first + blocks.begin) * per_block()),
            least(end_, (first + blocks.end) * per_block())};
  }
  [[nodiscard]] int64_t count(int64_t k) const {
    const int64_t end = least(end_, rows_.count(k));
    return end > begin_ ? end - begin_ : 0;
  }
  [[nodiscard]] Share share(int64_t all) const { return share_of(all, rank_, team_.size()); }
  [[nodiscard]] A* grad_h(int64_t n) const { return shared_.grad_h + n * r_.output_size; }
  [[nodiscard]] A* grad_c(int64_t n) const { return shared_.grad_c + n * r_.hidden_size; }

  static void widen_row(const void* from, int64_t at, A* to, int64_t count) {
    const auto* const row = static_cast<const T*>(from) + at;
    each_vector<A>(count, [&](int64_t i, auto part)
                              LAYERNORM_LAMBDA { put(to + i, load(row + i, part), part); });
  }

  void begin_state() {
    const auto zero = [](A* row, int64_t count) {
      std::memset(row, 0, static_cast<size_t>(count) * sizeof(A));
    };
    const int64_t stride = shared_.layout.stride;
    for (int64_t n = mine_.begin; n < mine_.end; n = block_end(n)) {
      zero(shared_.block_sums + n / per_block() * stride, stride);
      zero(shared_.block_totals + n / per_block() * stride, stride);
    }
    for (int64_t n = mine_.begin; n < mine_.end; ++n) {
      zero(grad_h(n), r_.output_size);
      if (r_.cell == CellKind::kLstm) zero(grad_c(n), r_.hidden_size);
      if (g_.grad_hn != nullptr)
        widen_row(g_.grad_hn, n * r_.output_size, grad_h(n), r_.output_size);
      if (g_.grad_cn != nullptr)
        widen_row(g_.grad_cn, n * r_.hidden_size, grad_c(n), r_.hidden_size);
    }
    team_.wait();
  }

  // x and h of the chunk's rows, once more as forward had them. Returns the rows.
  int64_t compute_again() {
    const int64_t width = gate_width(r_);
    const bool summed = r_.inputs == Inputs::kSummed;
    int64_t all = 0;
    for (int64_t k = chunk_.first; k < chunk_.last; ++k) all += count(k);
    const Share mine = share(all);
    int64_t i = 0;
    for (int64_t k = chunk_.first; k < chunk_.last; ++k) {
      for (int64_t n = begin_; n < begin_ + count(k); ++n, ++i) {
        const bool own = i >= mine.begin && i < mine.end;
        s_.inputs.set(i, rows_.input(k, n), own);
        s_.states.set(i, rows_.h_prev(k, n, s_.zeros), own);
        s_.to_x[i] = s_.x + i * width;
        s_.to_h[i] = summed ? s_.to_x[i] : s_.h + i * width;
      }
    }
    team_.wait();
    weights_.ih.multiply(all, s_.inputs.rows, Onto::kBias, weights_.bias_x, s_.to_x,
                         share(weights_.ih.panels()), s_.panel);
    if (summed) team_.wait();
    weights_.hh.multiply(all, s_.states.rows, summed ? Onto::kSelf : Onto::kBias, weights_.bias_h,
                         s_.to_h, share(weights_.hh.panels()), s_.panel);
    team_.wait();
    for (i = mine.begin; i < mine.end; ++i) {
      RowStep<T> row{};
      row.x = s_.to_x[i];
      row.h = s_.to_h[i];
      row.stats = s_.stats + i * 2 * r_.gates;
      normalize_row(row);
    }
    team_.wait();
    return all;
  }

  void normalize_row(const RowStep<T>& row) {
    if (r_.inputs == Inputs::kLate) return normalize_late<T>(r_, groups_, weights_.vectors, row);
    const int count = groups_.count;
    normalize_groups(r_, groups_, 0, count, row.x, row.stats);
    if (r_.inputs == Inputs::kSeparate)
      normalize_groups(r_, groups_, 0, count, row.h, row.stats + count);
  }

  // Step k; its rows are those from `computed` on, where x and h were computed again.
  void step(int64_t k, int64_t computed) {
    const int64_t active = count(k);
    if (active == 0) return;
    const int64_t at = rows_.first(k) - chunk_.base;  // of the step's rows in the chunk
    const Share rows{mine_.begin, least(mine_.end, begin_ + active)};
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      if (g_.grad_output != nullptr) add_output(rows_.first(k) + n, grad_h(n));
      if (r_.projected)
        std::memcpy(shared_.grad_state + (at + n) * r_.output_size, grad_h(n),
                    static_cast<size_t>(r_.output_size) * sizeof(A));
    }
    if (r_.projected) {
      team_.wait();
      for (int64_t i = 0; i < active; ++i) {
        s_.left[i] = grad_h(begin_ + i);
        s_.to[i] = s_.grad_hidden + i * r_.hidden_size;
      }
      const Share panels = share(weights_.hr_back.panels());
      weights_.hr_back.multiply(active, s_.left, Onto::kZero, nullptr, s_.to, panels,
                                reinterpret_cast<A*>(s_.panel));
      team_.wait();
    }
    for (int64_t n = rows.begin; n < rows.end;) {
      const int64_t end = least(least(n + kTogether, block_end(n)), rows.end);
      rows_backward(k, n, end, at, computed - begin_);
      n = end;
    }
    team_.wait();
    for (int64_t i = 0; i < active; ++i) {
      s_.left_grads[i] = reinterpret_cast<const typename Operand<T>::Element*>(
          shared_.grad_wh + (at + begin_ + i) * shared_.grad_stride);
      s_.to[i] = grad_h(begin_ + i);
    }
    const Share panels = share(weights_.hh_back.panels());
    const Onto onto = r_.cell == CellKind::kGru ? Onto::kSelf : Onto::kZero;
    weights_.hh_back.multiply(active, s_.left_grads, onto, nullptr, s_.to, panels, s_.panel);
    team_.wait();
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      if (!rows_.reset(k, n)) continue;
      move_row(grad_h(n), g_.grad_reset_h, n, r_.output_size);
      if (r_.cell == CellKind::kLstm) move_row(grad_c(n), g_.grad_reset_c, n, r_.hidden_size);
    }
  }

  // Adds a gradient to row n of a sum, if there is one, and clears it.
  static void move_row(A* from, void* sums, int64_t n, int64_t size) {
    if (sums != nullptr) add_row(static_cast<A*>(sums) + n * size, from, size);
    std::memset(from, 0, static_cast<size_t>(size) * sizeof(A));
  }

  void add_output(int64_t row, A* sum) const {
    const auto* const grad = static_cast<const T*>(g_.grad_output) + row * r_.output_size;
    each_vector<A>(r_.output_size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      add_to(sum + i, load(grad + i, part), part);
    });
  }

  // Rows [first, last) of step k, of one block. Row n is row `at` + n of the chunk, and `computed`
  // + n of those that were computed again.
  void rows_backward(int64_t k, int64_t first, int64_t last, int64_t at, int64_t computed) {
    RowGradient<T> rows[kTogether];
    for (int64_t n = first; n < last; ++n)
      rows[n - first] = row_of(k, n, at + n, computed + n, n - first);
    const auto sums =
        shared_.layout.at(shared_.block_sums + first / per_block() * shared_.layout.stride);
    cells_backward<T>(r_, groups_, weights_.vectors, sums, rows, static_cast<int>(last - first));
    if constexpr (!BackwardScratch<T>::kSame) {
      for (int64_t n = first; n < last; ++n) {
        narrow_row(rows[n - first].grad_x, shared_.grad_x + (at + n) * shared_.grad_stride);
        if (r_.inputs != Inputs::kSummed)
          narrow_row(rows[n - first].grad_h, shared_.grad_wh + (at + n) * shared_.grad_stride);
      }
    }
  }

  // The gradient of a row's products, in the type that is multiplied.
  void narrow_row(const A* from, Grad<T>* to) const {
    to[shared_.grad_stride - 1] = Grad<T>{};
    each_block<A, 4>(gate_width(r_), [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      put(to + i, load(from + i, part), part);
    });
  }

  RowGradient<T> row_of(int64_t k, int64_t n, int64_t at, int64_t computed, int64_t place) const {
    const int64_t width = gate_width(r_);
    const int64_t size = r_.hidden_size;
    RowGradient<T> row{};
    if (r_.saved_x == nullptr) {
      row.x = s_.to_x[computed];
      row.h = s_.to_h[computed];
      row.stats = s_.stats + computed * 2 * r_.gates;
    } else {
      read_saved(rows_.first(k) + n, s_.row_x + place * width, s_.row_h + place * width, row);
    }
    row.h_prev = rows_.h_prev(k, n, s_.zeros);
    row.grad_hidden = r_.projected ? s_.grad_hidden + (n - begin_) * size : grad_h(n);
    row.grad_direct = grad_h(n);
    if (r_.cell == CellKind::kLstm) {
      row.c_prev = rows_.c_prev(k, n, s_.zeros);
      row.grad_c = grad_c(n);
    }
    if constexpr (BackwardScratch<T>::kSame) {
      row.grad_x = shared_.grad_x + at * width;
      row.grad_h = shared_.grad_wh + at * width;
    } else {
      row.grad_x = s_.row_grad_x + place * width;
      row.grad_h = r_.inputs == Inputs::kSummed ? row.grad_x : s_.row_grad_h + place * width;
    }
    row.hidden = r_.projected ? shared_.hidden + at * size : nullptr;
    row.gates = s_.gates;
    row.cell = s_.cell;
    // Rows that were kept long ago are read one after another.
    if constexpr (std::is_same_v<T, A>)
      row.soon = {row.x + width, r_.inputs == Inputs::kSeparate ? row.h + width : nullptr};
    return row;
  }

  // x, h and statistics that forward kept of a row; converted they go to wide_x and wide_h.
  void read_saved(int64_t saved, A* wide_x, A* wide_h, RowGradient<T>& row) const {
    const int64_t width = gate_width(r_);
    const bool two = r_.inputs == Inputs::kSeparate;
    row.stats = static_cast<const A*>(r_.saved_stats) + saved * (two ? 2 : 1) * groups_.count;
    if constexpr (std::is_same_v<T, A>) {
      row.x = static_cast<const A*>(r_.saved_x) + saved * width;
      if (two) row.h = static_cast<const A*>(r_.saved_h) + saved * width;
    } else {
      widen_row(r_.saved_x, saved * width, wide_x, width);
      if (two) widen_row(r_.saved_h, saved * width, wide_h, width);
      row.x = wide_x;
      row.h = wide_h;
    }
    if (r_.inputs != Inputs::kLate) return;
    const int64_t size = r_.hidden_size;
    widen_row(r_.saved_h, saved * size, wide_h + 2 * size, size);
    row.h = wide_h;
  }

  // Adds the chunk's sums of the block that row n is in to those of the chunks before.
  void close_block(int64_t n) {
    const int64_t at = n / per_block() * shared_.layout.stride;
    add_row(shared_.block_totals + at, shared_.block_sums + at, shared_.layout.stride);
    std::memset(shared_.block_sums + at, 0, static_cast<size_t>(shared_.layout.stride) * sizeof(A));
  }
};

// Gradients of gains and biases from the sums of the blocks.
template <typename A>
void finish_sums(const RecurrentGradients& g, const BlockSums<A>& layout, int64_t blocks,
                 const A* from) {
  void* const to[] = {g.gain_ih,   g.gain_hh,   g.bias,    g.bias_hn,
                      g.gain_cell, g.bias_cell, g.bias_ih, g.bias_hh};
  for (int v = 0; v < BlockSums<A>::kVectors; ++v) {
    const int64_t size = layout.sizes[v];
    each_vector<A>(size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      auto sum = load(from + i, part);
      for (int64_t block = 1; block < blocks; ++block)
        sum = sum + load(from + block * layout.stride + i, part);
      put(static_cast<A*>(to[v]) + i, sum, part);
    });
    from += parts_of(size, 16) * 16;
  }
}

// Gradients of the initial state, of gains and biases.
template <typename T>
void finish_backward(const Recurrent& r, const RecurrentGradients& g, void* memory) {
  using A = Accumulate<T>;
  const BackwardShared<T> shared(r, g, memory);
  const auto narrow_all = [](const A* from, void* to, int64_t count) {
    if (to == nullptr) return;
    each_vector<A>(count, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      put(static_cast<T*>(to) + i, load(from + i, part), part);
    });
  };
  narrow_all(shared.grad_h, g.grad_h0, r.batch * r.output_size);
  narrow_all(shared.grad_c, g.grad_c0, r.batch * r.hidden_size);
  finish_sums(g, shared.layout, shared.blocks, shared.block_totals);
}

}  // namespace layernorm::LAYERNORM_ISA
