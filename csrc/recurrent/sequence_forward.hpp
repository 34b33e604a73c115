// The one time loop, forward, for all cells and variants.
#pragma once

#include "sequence.hpp"

namespace layernorm::LAYERNORM_ISA {

// Working memory of a team and of its member.
template <typename T>
struct ForwardScratch {
  using A = Accumulate<T>;
  // Products go straight where they are kept, if that is in their type.
  static constexpr bool kSame = std::is_same_v<T, A>;
  bool keep_x, keep_h;
  int64_t chunk;  // steps
  A *x, *h, *wide;
  T *c, *hidden, *zeros;
  LeftRows<T> inputs, states, hiddens;
  A **to_x, **to_h, **to_wide;
  A *below_out, *cell;
  typename Operand<T>::Element* panel;  // of weights that are not packed
  GateNorm<A>* norms;                   // of the rows of x, where they are their own
  size_t shared_bytes, own_bytes;

  // Null memory only counts.
  ForwardScratch(const Recurrent& r, int64_t rows, Arena shared, Arena own)
      : keep_x(kSame && r.saved_x != nullptr),
        keep_h(kSame && r.saved_h != nullptr && r.inputs == Inputs::kSeparate),
        chunk(least(r.steps, parts_of(kChunkRows, rows))),
        x(shared.take<A>(keep_x ? 0 : chunk * rows * gate_width(r))),
        h(shared.take<A>(keep_h || r.inputs == Inputs::kSummed ? 0 : rows * gate_width(r))),
        wide(shared.take<A>(r.projected && !kSame ? rows * r.output_size : 0)),
        c(shared.take<T>(r.cell == CellKind::kLstm && r.saved_c == nullptr ? rows * r.hidden_size
                                                                           : 0)),
        hidden(shared.take<T>(r.projected ? rows * r.hidden_size : 0)),
        zeros(own.take<T>(r.hidden_size)),
        inputs(shared, own, chunk * rows, r.input_size),
        states(shared, own, rows, r.output_size),
        hiddens(shared, own, r.projected ? rows : 0, r.hidden_size),
        to_x(own.take<A*>(chunk * rows)),
        to_h(own.take<A*>(rows)),
        to_wide(own.take<A*>(rows)),
        below_out(own.take<A>(kTogether * r.hidden_size)),
        cell(own.take<A>(kTogether * r.hidden_size)),
        panel(own.take<typename Operand<T>::Element>(panel_elements(r, chunk * rows))),
        norms(shared.take<GateNorm<A>>(r.inputs == Inputs::kSeparate ? chunk * rows : 0)),
        shared_bytes((shared.used + 63) / 64 * 64),
        own_bytes((own.used + 63) / 64 * 64) {}

 private:
  static int64_t panel_elements(const Recurrent& r, int64_t rows) {
    const Prepared<T> weights(r, false, nullptr);
    int64_t most = 0;
    for (const int64_t some :
         {weights.ih.memory(rows), weights.hh.memory(rows), weights.hr.memory(rows)})
      most = some > most ? some : most;
    return most;
  }
};

// Where member `rank`'s own memory begins: behind the shared.
template <typename Scratch>
Scratch scratch_of(const Recurrent& r, int64_t rows, void* memory, int rank) {
  const Scratch sizes(r, rows, Arena{nullptr}, Arena{nullptr});
  auto* const base = static_cast<char*>(memory);
  return Scratch(r, rows, Arena{base},
                 Arena{base + sizes.shared_bytes + sizes.own_bytes * static_cast<size_t>(rank)});
}
template <typename Scratch>
size_t scratch_bytes(const Recurrent& r, int64_t rows, int members) {
  const Scratch sizes(r, rows, Arena{nullptr}, Arena{nullptr});
  return sizes.shared_bytes + sizes.own_bytes * static_cast<size_t>(members);
}

template <typename T>
class Forward {
 public:
  using A = Accumulate<T>;

  Forward(const Recurrent& r, const void* prepared, void* scratch, int64_t row_begin,
          int64_t row_end, Team& team, int rank)
      : r_(r),
        rows_{r},
        groups_(groups_of(r)),
        weights_(r, false, const_cast<void*>(prepared)),
        s_(scratch_of<ForwardScratch<T>>(r, row_end - row_begin, scratch, rank)),
        begin_(row_begin),
        end_(row_end),
        team_(team),
        rank_(rank) {}

  void run() {
    std::memset(s_.zeros, 0, static_cast<size_t>(r_.hidden_size) * sizeof(T));
    for (int64_t first = 0; first < r_.steps; first += s_.chunk) {
      const int64_t last = least(r_.steps, first + s_.chunk);
      const int64_t count = project(first, last);
      int64_t at = 0;
      for (int64_t k = first; k < last && at < count; ++k) at += step(k, at);
    }
    keep_final_state();
  }

 private:
  const Recurrent& r_;
  Rows<T> rows_;
  Groups groups_;
  Prepared<T> weights_;
  ForwardScratch<T> s_;
  int64_t begin_, end_;
  Team& team_;
  int rank_;

  [[nodiscard]] int64_t count(int64_t k) const {
    const int64_t end = least(end_, rows_.count(k));
    return end > begin_ ? end - begin_ : 0;
  }
  [[nodiscard]] Share share(int64_t all) const { return share_of(all, rank_, team_.size()); }
  [[nodiscard]] A* stats_of(int64_t row) const {
    if (r_.saved_stats == nullptr) return nullptr;
    const int both = r_.inputs == Inputs::kSeparate ? 2 : 1;
    return static_cast<A*>(r_.saved_stats) + row * both * groups_.count;
  }

  // x for the steps [first, last), and its norm where it has one of its own. Returns the rows.
  int64_t project(int64_t first, int64_t last) {
    const int64_t width = gate_width(r_);
    int64_t all = 0;
    for (int64_t k = first; k < last; ++k) all += count(k);
    const Share mine = share(all);
    int64_t i = 0;
    for (int64_t k = first; k < last; ++k) {
      for (int64_t n = begin_; n < begin_ + count(k); ++n, ++i) {
        s_.inputs.set(i, rows_.input(k, n), i >= mine.begin && i < mine.end);
        s_.to_x[i] = s_.keep_x ? static_cast<A*>(r_.saved_x) + (rows_.first(k) + n) * width
                               : s_.x + i * width;
      }
    }
    if (s_.inputs.copies != nullptr) team_.wait();
    const Share panels = share(weights_.ih.panels());
    weights_.ih.multiply(all, s_.inputs.rows, Onto::kBias, weights_.bias_x, s_.to_x, panels,
                         s_.panel);
    team_.wait();
    if (r_.inputs != Inputs::kSeparate || groups_.count == 0) return all;
    A* kept[kTogether];
    int waiting = 0;
    const auto measure_waiting = [&](int64_t end) {
      measure_groups(r_, groups_, s_.to_x + end - waiting, waiting, s_.norms + end - waiting, kept);
      waiting = 0;
    };
    i = 0;
    for (int64_t k = first; k < last; ++k) {
      for (int64_t n = begin_; n < begin_ + count(k); ++n, ++i) {
        if (i < mine.begin || i >= mine.end) continue;
        kept[waiting++] = stats_of(rows_.first(k) + n);
        if (waiting == kTogether) measure_waiting(i + 1);
      }
    }
    measure_waiting(mine.end);
    team_.wait();
    return all;
  }

  // One step; its rows of x begin with number `at`. Returns how many these are.
  int64_t step(int64_t k, int64_t at) {
    const int64_t active = count(k);
    if (active == 0) return 0;
    const int64_t width = gate_width(r_);
    const bool summed = r_.inputs == Inputs::kSummed;
    const Share mine = share(active);
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = begin_ + i;
      s_.states.set(i, rows_.h_prev(k, n, s_.zeros), i >= mine.begin && i < mine.end);
      s_.to_h[i] = summed      ? s_.to_x[at + i]
                   : s_.keep_h ? static_cast<A*>(r_.saved_h) + (rows_.first(k) + n) * width
                               : s_.h + i * width;
    }
    if (s_.states.copies != nullptr) team_.wait();
    const Share panels = share(weights_.hh.panels());
    weights_.hh.multiply(active, s_.states.rows, summed ? Onto::kSelf : Onto::kBias,
                         weights_.bias_h, s_.to_h, panels, s_.panel);
    team_.wait();
    for (int64_t i = mine.begin; i < mine.end; i += kTogether) {
      const int some = static_cast<int>(least(kTogether, mine.end - i));
      RowStep<T> rows[kTogether];
      for (int j = 0; j < some; ++j) rows[j] = row_step(k, i + j, at + i + j, j);
      cell_steps<T>(r_, groups_, weights_.vectors, rows, some);
      for (int j = 0; j < some; ++j) keep(rows_.first(k) + begin_ + i + j, rows[j]);
    }
    team_.wait();
    if (r_.projected) project_state(k, active);
    return active;
  }

  // Row i of step k, whose x is number `at`; `place` is that of its working memory.
  RowStep<T> row_step(int64_t k, int64_t i, int64_t at, int place) const {
    const int64_t n = begin_ + i;
    const int64_t row = rows_.first(k) + n;
    const int64_t size = r_.hidden_size;
    RowStep<T> step;
    step.x = s_.to_x[at];
    step.h = s_.to_h[i];
    if (r_.inputs == Inputs::kSeparate) step.norm_x = s_.norms[at];
    step.stats = stats_of(row);
    step.keep = r_.saved_x != nullptr;
    step.h_prev = rows_.h_prev(k, n, s_.zeros);
    step.hidden = r_.projected ? s_.hidden + i * size : rows_.output(k, n);
    step.below_out = s_.below_out + place * size;
    step.cell = s_.cell + place * size;
    if (r_.cell != CellKind::kLstm) return step;
    if (r_.saved_c != nullptr) {
      step.c = static_cast<T*>(r_.saved_c) + row * size;
      step.c_prev = rows_.c_prev(k, n, s_.zeros);
      return step;
    }
    step.c = s_.c + i * size;
    if (rows_.reset(k, n))
      step.c_prev = rows_.reset_c(n, s_.zeros);
    else if (rows_.begins(k, n))
      step.c_prev = static_cast<const T*>(r_.c0) + n * size;
    else
      step.c_prev = step.c;
    return step;
  }

  // What backward needs and the products were not written to already.
  void keep(int64_t row, const RowStep<T>& step) {
    const int64_t width = gate_width(r_);
    const auto copy = [](const A* from, T* to, int64_t count) {
      each_vector<A>(count, [&](int64_t i, auto part)
                                LAYERNORM_LAMBDA { put(to + i, load(from + i, part), part); });
    };
    if (r_.saved_x != nullptr && !s_.keep_x)
      copy(step.x, static_cast<T*>(r_.saved_x) + row * width, width);
    if (r_.saved_h == nullptr || s_.keep_h) return;
    const int64_t kept = r_.inputs == Inputs::kLate ? r_.hidden_size : width;
    copy(step.h + (width - kept), static_cast<T*>(r_.saved_h) + row * kept, kept);
  }

  // h = W_hr hidden, where there is a projection.
  void project_state(int64_t k, int64_t active) {
    const Share mine = share(active);
    for (int64_t i = 0; i < active; ++i) {
      s_.hiddens.set(i, s_.hidden + i * r_.hidden_size, i >= mine.begin && i < mine.end);
      if constexpr (ForwardScratch<T>::kSame)
        s_.to_wide[i] = rows_.output(k, begin_ + i);
      else
        s_.to_wide[i] = s_.wide + i * r_.output_size;
    }
    if (s_.hiddens.copies != nullptr) team_.wait();
    const Share panels = share(weights_.hr.panels());
    weights_.hr.multiply(active, s_.hiddens.rows, Onto::kZero, nullptr, s_.to_wide, panels,
                         s_.panel);
    team_.wait();
    if constexpr (!ForwardScratch<T>::kSame) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        T* const to = rows_.output(k, begin_ + i);
        each_vector<A>(r_.output_size, [&](int64_t j, auto part) LAYERNORM_LAMBDA {
          put(to + j, load(s_.to_wide[i] + j, part), part);
        });
      }
      team_.wait();
    }
  }

  void keep_final_state() {
    const Share mine = share(end_ - begin_);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t n = begin_ + i;
      const int64_t k = rows_.last(n);
      const auto h_bytes = static_cast<size_t>(r_.output_size) * sizeof(T);
      std::memcpy(static_cast<T*>(r_.hn) + n * r_.output_size, rows_.output(k, n), h_bytes);
      if (r_.cell != CellKind::kLstm) continue;
      const int64_t size = r_.hidden_size;
      const T* const c = r_.saved_c == nullptr
                             ? s_.c + i * size
                             : static_cast<const T*>(r_.saved_c) + (rows_.first(k) + n) * size;
      std::memcpy(static_cast<T*>(r_.cn) + n * size, c, static_cast<size_t>(size) * sizeof(T));
    }
  }
};

}  // namespace layernorm::LAYERNORM_ISA
