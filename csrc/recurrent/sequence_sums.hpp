// Backward's sums over all rows of a chunk of steps, as large products: the gradients of the weight
// matrices, and what goes to the input.
#pragma once

#include "sequence_backward.hpp"

namespace layernorm::LAYERNORM_ISA {

// The large products of a chunk. Their parts are tiles of rows of the result.
enum Sum { kSumWeightIh, kSumWeightHh, kSumWeightHr, kSumInput };
static_assert(kSumInput + 1 == kSumKinds);

template <typename T>
struct ChunkSums {
  using A = Accumulate<T>;
  const Recurrent& r;
  const RecurrentGradients& g;
  BackwardShared<T> shared;
  Chunk<T> chunk;
  Rows<T> rows{r};

  ChunkSums(const Recurrent& all, const RecurrentGradients& gradients, void* memory, int64_t which)
      : r(all), g(gradients), shared(all, gradients, memory), chunk(all, which) {}

  // Rows of the result; 0 where it is not wanted.
  [[nodiscard]] int64_t result_rows(Sum sum) const {
    switch (sum) {
      case kSumWeightIh:
        return g.weight_ih != nullptr ? gate_width(r) : 0;
      case kSumWeightHh:
        return g.weight_hh != nullptr ? gate_width(r) : 0;
      case kSumWeightHr:
        return g.weight_hr != nullptr ? r.output_size : 0;
      default:
        return g.grad_input != nullptr ? chunk.rows : 0;
    }
  }
  [[nodiscard]] int64_t parts(Sum sum) const { return parts_of(result_rows(sum), kTileRows); }

  static constexpr int64_t kAtOnce = 96;  // rows for each reading of the weights

  static size_t bytes(const Recurrent& r) {
    const int64_t rows = chunk_steps(r) * r.batch;
    const int64_t width = gate_width(r) > r.output_size ? gate_width(r) : r.output_size;
    Arena arena{nullptr};
    arena.take<A>(parts_of(width, kTileRows) * kTileRows * rows);
    arena.take<A>(rows * kPanel<A>);
    arena.take<const T*>(rows);
    arena.take<A*>(2 * (width + kTileRows));
    arena.take<A>(kAtOnce * r.input_size);
    arena.take<typename Operand<T>::Element>(kPanelMemory<Operand<T>>);
    return arena.used + static_cast<size_t>(r.hidden_size) * sizeof(T) + 512;
  }

  void run(Sum sum, const void* prepared, void* scratch, int64_t begin, int64_t end) const {
    const int64_t row_end = least(end * kTileRows, result_rows(sum));
    if (sum == kSumInput) return to_input(prepared, scratch, begin * kTileRows, row_end);
    Arena arena{static_cast<char*>(scratch)};
    auto* const zeros = arena.take<T>(r.hidden_size);
    std::memset(zeros, 0, static_cast<size_t>(r.hidden_size) * sizeof(T));
    const Share part{begin * kTileRows, row_end};
    if (sum == kSumWeightHr) {
      const auto right = [&](int64_t i) { return shared.hidden + i * r.hidden_size; };
      return outer<Numbers<A>, A, A>(arena, shared.grad_state, r.output_size, part, right,
                                     r.hidden_size, g.weight_hr);
    }
    auto** const right = arena.take<const T*>(chunk.rows);
    for (int64_t k = chunk.first; k < chunk.last; ++k) {
      for (int64_t n = 0; n < rows.count(k); ++n)
        right[rows.first(k) - chunk.base + n] =
            sum == kSumWeightIh ? rows.input(k, n) : rows.h_prev(k, n, zeros);
    }
    const auto row = [&](int64_t i) { return right[i]; };
    using O = Operand<T>;
    const int64_t stride = shared.grad_stride;
    if (sum == kSumWeightIh)
      outer<O, Grad<T>, T>(arena, shared.grad_x, stride, part, row, r.input_size, g.weight_ih);
    else
      outer<O, Grad<T>, T>(arena, shared.grad_wh, stride, part, row, r.output_size, g.weight_hh);
  }

  // result[i, :] += sum over the chunk's rows k of left[k, i]·right(k)[:], for the rows in `part`;
  // the first chunk's is the result.
  template <typename O, typename Left, typename Right, typename Row>
  void outer(Arena arena, const Left* left, int64_t stride, Share part, const Row& right,
             int64_t columns, void* result) const {
    using E = typename O::Element;
    const bool is_first = chunk.last == r.steps;  // to be summed
    if constexpr (O::kPerElement == 1) {
      if (chunk.rows == 1 && is_first) {  // written in the order in which it lies
        for (int64_t i = part.begin; i < part.end; ++i) {
          A* const to = static_cast<A*>(result) + i * columns;
          each_block<A, 4>(columns, [&](int64_t j, auto count) LAYERNORM_LAMBDA {
            put(to + j, fma(load(right(0) + j, count), left[i], A{}), count);
          });
        }
        return;
      }
    }
    const int64_t depth = parts_of(chunk.rows, O::kPerElement);
    const int64_t height = part.end - part.begin;
    const int64_t tiles = parts_of(height, kTileRows);
    E* const packed = arena.take<E>(tiles * kTileRows * depth);
    E* const panel = arena.take<E>(depth * kPanel<A>);
    pack_columns<O>(chunk.rows, left, stride, part.begin, part.end, packed);
    auto** const a = arena.take<const E*>(tiles * kTileRows);
    auto** const c = arena.take<A*>(tiles * kTileRows);
    for (int64_t i = 0; i < height; ++i) {
      a[i] = packed + i / kTileRows * kTileRows * depth + i % kTileRows;
      c[i] = static_cast<A*>(result) + (part.begin + i) * columns;
    }
    for (int64_t column = 0; column < columns; column += kPanel<A>) {
      const int64_t count = least(kPanel<A>, columns - column);
      pack_rows<O, Right>(chunk.rows, right, column, count, panel);
      for (int64_t k = 0; k < depth; k += O::kBlock)
        for (int64_t i = 0; i < height; i += kTileRows)
          tile_of<O, kTileRows>(least(kTileRows, height - i), a + i, k * kTileRows,
                                panel + k * kPanel<A>, kPanel<A>, least(O::kBlock, depth - k),
                                k == 0 && is_first ? Onto::kZero : Onto::kSelf,
                                static_cast<const A*>(nullptr), c + i, column, count);
    }
  }

  // grad_input = grad_x·W_ih for the chunk's rows [begin, end).
  void to_input(const void* prepared, void* scratch, int64_t begin, int64_t end) const {
    const Prepared<T> weights(r, true, const_cast<void*>(prepared));
    Arena arena{static_cast<char*>(scratch)};
    A* const wide = arena.take<A>(kAtOnce * r.input_size);
    auto* const memory = arena.take<typename Operand<T>::Element>(kPanelMemory<Operand<T>>);
    constexpr bool kSame = std::is_same_v<T, A>;
    using O = Operand<T>;
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t count = least(kAtOnce, end - first);
      const typename O::Element* left[kAtOnce];
      A* to[kAtOnce];
      const auto row = [&](int64_t i) {
        return static_cast<T*>(g.grad_input) + (chunk.base + first + i) * r.input_size;
      };
      for (int64_t i = 0; i < count; ++i) {
        left[i] = reinterpret_cast<const typename O::Element*>(shared.grad_x +
                                                               (first + i) * shared.grad_stride);
        if constexpr (kSame)
          to[i] = row(i);
        else
          to[i] = wide + i * r.input_size;
      }
      weights.ih_back.multiply(count, left, Onto::kZero, nullptr, to, {0, weights.ih_back.panels()},
                               memory);
      if constexpr (!kSame) {
        for (int64_t i = 0; i < count; ++i)
          each_block<A, 4>(r.input_size, [&](int64_t j, auto part) LAYERNORM_LAMBDA {
            put(row(i) + j, load(to[i] + j, part), part);
          });
      }
    }
  }
};

}  // namespace layernorm::LAYERNORM_ISA
