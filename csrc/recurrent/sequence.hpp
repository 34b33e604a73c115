// What forward and backward share: where the rows of a sequence lie, the order of the steps, the
// parameters prepared for all steps, and working memory.
#pragma once

#include <limits>

#include "cells.hpp"
#include "weights.hpp"

namespace layernorm::LAYERNORM_ISA {

// Memory handed out piece by piece. Without memory it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <typename E>
  E* take(int64_t count) {
    constexpr size_t kAlign = 64;
    const size_t at = (used + kAlign - 1) / kAlign * kAlign;
    used = at + static_cast<size_t>(count) * sizeof(E);
    return base == nullptr ? nullptr : reinterpret_cast<E*>(base + at);
  }
};

// About so many rows of all steps are projected together: enough that the weights are read from far
// away seldom, few enough that the products are still in a cache when their steps come.
inline constexpr int64_t kChunkRows = 96;
// About so many rows are summed in one product.
inline constexpr int64_t kSumRows = 512;

inline int64_t steps_of(const Recurrent& r, int64_t rows) {
  return least(r.steps, parts_of(rows, r.batch > 0 ? r.batch : 1));
}
inline int64_t chunk_steps(const Recurrent& r) { return steps_of(r, kSumRows); }

// The rows of a sequence as steps go by: step number k is the k-th that is computed.
template <typename T>
struct Rows {
  const Recurrent& r;

  [[nodiscard]] int64_t time(int64_t k) const { return r.reverse ? r.steps - 1 - k : k; }
  // How many rows take part in the step.
  [[nodiscard]] int64_t count(int64_t k) const {
    return r.batch_sizes == nullptr ? r.batch : r.batch_sizes[time(k)];
  }
  // The first row of the step among the rows of all steps.
  [[nodiscard]] int64_t first(int64_t k) const {
    return r.batch_sizes == nullptr ? time(k) * r.batch : r.step_offsets[time(k)];
  }
  [[nodiscard]] const T* input(int64_t k, int64_t n) const {
    const int64_t offset =
        r.batch_sizes == nullptr ? time(k) * r.input_step_stride : first(k) * r.input_row_stride;
    return static_cast<const T*>(r.input) + offset + n * r.input_row_stride;
  }
  [[nodiscard]] T* output(int64_t k, int64_t n) const {
    return static_cast<T*>(r.output) + (first(k) + n) * r.output_size;
  }
  // Whether row n begins anew before step k.
  [[nodiscard]] bool reset(int64_t k, int64_t n) const {
    if (r.resets == nullptr) return false;
    // A reset at time t parts t - 1 from t: backward in time, step t + 1 from step t.
    if (!r.reverse) return r.resets[first(k) + n] != 0;
    return k > 0 && n < count(k - 1) && r.resets[first(k - 1) + n] != 0;
  }
  // Whether the state before step k is the initial one, and not that of step k - 1.
  [[nodiscard]] bool begins(int64_t k, int64_t n) const { return k == 0 || n >= count(k - 1); }
  [[nodiscard]] const T* h_prev(int64_t k, int64_t n, const T* zeros) const {
    if (reset(k, n)) return reset_row(r.reset_h, n, r.output_size, zeros);
    return begins(k, n) ? static_cast<const T*>(r.h0) + n * r.output_size : output(k - 1, n);
  }
  // Of c only where it is kept for all steps.
  [[nodiscard]] const T* c_prev(int64_t k, int64_t n, const T* zeros) const {
    if (reset(k, n)) return reset_c(n, zeros);
    return begins(k, n) ? static_cast<const T*>(r.c0) + n * r.hidden_size
                        : static_cast<const T*>(r.saved_c) + (first(k - 1) + n) * r.hidden_size;
  }
  // Where row n goes on from where it is reset.
  [[nodiscard]] const T* reset_c(int64_t n, const T* zeros) const {
    return reset_row(r.reset_c, n, r.hidden_size, zeros);
  }
  // The last step that row n takes part in.
  [[nodiscard]] int64_t last(int64_t n) const {
    int64_t k = r.steps - 1;
    while (n >= count(k)) --k;
    return k;
  }

 private:
  static const T* reset_row(const void* rows, int64_t n, int64_t size, const T* zeros) {
    return rows == nullptr ? zeros : static_cast<const T*>(rows) + n * size;
  }
};

inline int64_t gate_width(const Recurrent& r) { return r.gates * r.hidden_size; }

// The parameters as the kernels read them.
template <typename T>
struct Prepared {
  using A = Accumulate<T>;
  using O = Operand<T>;
  static constexpr int kVectors = 8;

  // For products W x transposed, for backward as they are.
  Weights<O, T, true> ih, hh, hr;
  Weights<O, T, false> ih_back, hh_back;
  Weights<Numbers<A>, T, false> hr_back;
  Vectors<A> vectors{};
  const A *bias_x = nullptr, *bias_h = nullptr;
  A* all_vectors;

  // What the vectors are in `all_vectors`, one after another.
  struct Vector {
    const void* from;
    const void* also;  // added
    int64_t size;
    A otherwise;
    const A** to;
  };

  Prepared(const Recurrent& r, bool backward, void* memory)
      : ih(r.weight_ih, r.input_size, gate_width(r), uses(r, backward ? kSumRows : kChunkRows),
           r.steps * r.batch, r.weight_kind),
        hh(r.weight_hh, r.output_size, gate_width(r), uses(r, backward ? kSumRows : 1), r.batch,
           r.weight_kind),
        hr(r.weight_hr, r.hidden_size, r.projected ? r.output_size : 0, uses(r, 1), r.batch,
           r.weight_kind),
        ih_back(r.weight_ih, gate_width(r), r.input_size, uses(r, kChunkRows), r.steps * r.batch),
        hh_back(r.weight_hh, gate_width(r), r.output_size, uses(r, 1), r.batch),
        hr_back(r.weight_hr, r.output_size, r.projected ? r.hidden_size : 0, uses(r, 1), r.batch) {
    Arena arena{static_cast<char*>(memory)};
    forward_ = !backward || r.saved_x == nullptr;
    backward_ = backward;
    each_matrix([&](auto& weights) {
      weights.pack_to(
          arena.take<std::remove_pointer_t<decltype(weights.packed())>>(weights.packed_elements()));
    });
    Vector list[kVectors];
    int64_t size = 0;
    list_vectors(r, list);
    for (const auto& one : list) size += parts_of(one.size, 16) * 16;
    all_vectors = arena.take<A>(size);
    bytes = arena.used;
    const A* next = all_vectors;
    for (const auto& one : list) {
      *one.to = next;
      if (next != nullptr) next += parts_of(one.size, 16) * 16;
    }
  }

  size_t bytes;

  void list_vectors(const Recurrent& r, Vector (&list)[kVectors]) {
    const int64_t width = gate_width(r);
    const int64_t size = r.hidden_size;
    const bool two = r.inputs == Inputs::kSeparate;
    const bool late = r.inputs == Inputs::kLate;
    const Vector all[kVectors] = {
        {r.gain_ih, nullptr, width, A{1}, &vectors.gain_x},
        {r.gain_hh, nullptr, two ? width : 0, A{1}, &vectors.gain_h},
        {r.bias, nullptr, width, A{0}, &vectors.bias},
        {r.bias_hn, nullptr, r.cell == CellKind::kGru ? size : 0, A{0}, &vectors.bias_hn},
        {r.gain_cell, nullptr, size, A{1}, &vectors.gain_cell},
        {r.bias_cell, nullptr, size, A{0}, &vectors.bias_cell},
        // Of summed products both biases come with x.
        {r.bias_ih, two || late ? nullptr : r.bias_hh, width, A{0}, &bias_x},
        {r.bias_hh, nullptr, two || late ? width : 0, A{0}, &bias_h},
    };
    for (int i = 0; i < kVectors; ++i) list[i] = all[i];
  }

  // Panels of what is packed, and last the vectors.
  int64_t parts() {
    int64_t count = 1;
    each_matrix([&](const auto& weights) { count += weights.packed_panels(); });
    return count;
  }

  void prepare(const Recurrent& r, int64_t part) {
    bool is_done = false;
    each_matrix([&](const auto& weights) {
      if (!is_done && part < weights.packed_panels()) {
        weights.pack(part);
        is_done = true;
      }
      part -= weights.packed_panels();
    });
    if (!is_done) prepare_vectors(r);
  }

 private:
  bool forward_, backward_;

  // How many products are made with a matrix, of so many rows at least.
  static int64_t uses(const Recurrent& r, int64_t rows) {
    if (r.streamed) return std::numeric_limits<int64_t>::max();
    return parts_of(r.steps, steps_of(r, rows));
  }
  template <typename Do>
  void each_matrix(const Do& run) {
    if (forward_) run(ih), run(hh), run(hr);
    if (backward_) run(ih_back), run(hh_back), run(hr_back);
  }

  void prepare_vectors(const Recurrent& r) {
    Vector list[kVectors];
    list_vectors(r, list);
    A* next = all_vectors;
    for (const auto& one : list) {
      const int64_t size = parts_of(one.size, 16) * 16;
      for (int64_t i = 0; i < size; ++i) next[i] = one.otherwise;
      if (r.wide_vectors)
        read_vector(one, static_cast<const A*>(one.from), static_cast<const A*>(one.also), next);
      else
        read_vector(one, static_cast<const T*>(one.from), static_cast<const T*>(one.also), next);
      next += size;
    }
  }

  template <typename V>
  static void read_vector(const Vector& one, const V* from, const V* also, A* to) {
    each_vector<A>(one.size, [&](int64_t i, auto part) LAYERNORM_LAMBDA {
      if (from != nullptr) put(to + i, load(from + i, part), part);
      if (also != nullptr) put(to + i, load(to + i, part) + load(also + i, part), part);
    });
  }
};

// Rows as a product's left operand: in place where they can be, or copied first.
template <typename T>
struct LeftRows {
  using O = Operand<T>;
  using E = typename O::Element;
  int64_t numbers, depth, stride;
  const E** rows;  // [most]
  E* copies;       // [most, stride], shared by the team; null where the rows are read in place

  LeftRows(Arena& shared, Arena& own, int64_t most, int64_t all_numbers)
      : numbers(all_numbers),
        depth(parts_of(all_numbers, O::kPerElement)),
        stride(depth + kLine),
        rows(own.take<const E*>(most)),
        copies(is_copied(most) ? shared.take<E>(most * stride) : nullptr) {}

  // Row i is at `from`; this member copies it if the row is among its own.
  void set(int64_t i, const T* from, bool own) {
    if (copies == nullptr) {
      rows[i] = reinterpret_cast<const E*>(from);
      return;
    }
    E* const to = copies + i * stride;
    rows[i] = to;
    if (!own) return;
    if constexpr (O::kPerElement == 1) {
      each_vector<typename O::Sum>(numbers, [&](int64_t j, auto part) LAYERNORM_LAMBDA {
        put(reinterpret_cast<typename O::Sum*>(to) + j, load(from + j, part), part);
      });
    } else {
      to[depth - 1] = 0;
      std::memcpy(to, from, static_cast<size_t>(numbers) * sizeof(T));
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(E);

  [[nodiscard]] bool is_copied(int64_t most) const {
    // Rows whose distance is a multiple of this push one another out of a cache.
    constexpr int64_t kAlias = 2048 / sizeof(E);
    if (most > 1 && depth % kAlias == 0) return true;
    // Pairs of which the last is half a row's end must not read on; other types are converted.
    if constexpr (O::kPerElement == 1) return !std::is_same_v<E, T>;
    return numbers % O::kPerElement != 0;
  }
};

}  // namespace layernorm::LAYERNORM_ISA
