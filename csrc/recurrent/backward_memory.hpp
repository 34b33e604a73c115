// The memory of the time loop backward: what threads share, the rows of a chunk of steps, and what
// the steps work in.
#pragma once

#include "cells_backward.hpp"
#include "sequence_forward.hpp"

namespace layernorm::LAYERNORM_ISA {

inline int64_t blocks_of(const Recurrent& r) { return parts_of(r.batch, rows_per_block(r.batch)); }

// Sums of gains and biases, for each block of rows: of the present chunk, and of those before.
template <typename A>
struct BlockSums {
  static constexpr int kVectors = 8;
  int64_t sizes[kVectors];
  int64_t stride = 0;

  BlockSums(const Recurrent& r, const RecurrentGradients& g) {
    const int64_t width = gate_width(r);
    const int64_t size = r.hidden_size;
    const int64_t all[kVectors] = {
        g.gain_ih != nullptr ? width : 0,  g.gain_hh != nullptr ? width : 0,
        g.bias != nullptr ? width : 0,     g.bias_hn != nullptr ? size : 0,
        g.gain_cell != nullptr ? size : 0, g.bias_cell != nullptr ? size : 0,
        g.bias_ih != nullptr ? width : 0,  g.bias_hh != nullptr ? width : 0};
    for (int i = 0; i < kVectors; ++i) {
      sizes[i] = all[i];
      stride += parts_of(all[i], 16) * 16;
    }
  }
  [[nodiscard]] VectorSums<A> at(A* row) const {
    A* to[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      to[i] = sizes[i] > 0 ? row : nullptr;
      row += parts_of(sizes[i], 16) * 16;
    }
    return {to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7]};
  }
};

// What all threads share from the first chunk to the last.
template <typename T>
struct BackwardShared {
  using A = Accumulate<T>;
  BlockSums<A> layout;
  int64_t blocks;
  A *grad_h, *grad_c;            // [N, P], [N, H]: of the state between steps
  A *block_sums, *block_totals;  // [blocks, stride]
  // Of the rows of a chunk, in their order among all rows:
  Grad<T>*grad_x, *grad_wh;  // [rows, grad_stride]; the same where inputs are summed
  int64_t grad_stride;       // G·H, or the next even number where pairs are multiplied
  A *grad_state, *hidden;    // [rows, P], [rows, H], where projected
  size_t bytes;

  BackwardShared(const Recurrent& r, const RecurrentGradients& g, void* memory)
      : layout(r, g), blocks(blocks_of(r)) {
    Arena arena{static_cast<char*>(memory)};
    const int64_t rows = chunk_steps(r) * r.batch;
    grad_h = arena.take<A>(r.batch * r.output_size);
    grad_c = arena.take<A>(r.cell == CellKind::kLstm ? r.batch * r.hidden_size : 0);
    block_sums = arena.take<A>(blocks * layout.stride);
    block_totals = arena.take<A>(blocks * layout.stride);
    grad_stride = parts_of(gate_width(r), Operand<T>::kPerElement) * Operand<T>::kPerElement;
    grad_x = arena.take<Grad<T>>(rows * grad_stride);
    grad_wh = r.inputs == Inputs::kSummed ? grad_x : arena.take<Grad<T>>(rows * grad_stride);
    grad_state = arena.take<A>(r.projected ? rows * r.output_size : 0);
    hidden = arena.take<A>(r.projected ? rows * r.hidden_size : 0);
    bytes = arena.used;
  }
};

// The rows of a chunk of steps.
template <typename T>
struct Chunk {
  int64_t first, last;  // steps
  int64_t base;         // its first row among all rows
  int64_t rows;

  Chunk(const Recurrent& r, int64_t chunk) {
    const Rows<T> all{r};
    first = chunk * chunk_steps(r);
    last = least(r.steps, first + chunk_steps(r));
    base = all.first(r.reverse ? last - 1 : first);
    rows = 0;
    for (int64_t k = first; k < last; ++k) rows += all.count(k);
  }
};

// Working memory of the steps.
template <typename T>
struct BackwardScratch {
  using A = Accumulate<T>;
  static constexpr bool kSame = std::is_same_v<Grad<T>, A>;
  A *x, *h, *stats;  // of the rows of a chunk, where forward did not keep them
  A* grad_hidden;    // [rows, H], where projected
  T* zeros;
  LeftRows<T> inputs, states;
  A **to_x, **to_h, **to;
  const A** left;
  const typename Operand<T>::Element** left_grads;
  A *row_x, *row_h, *row_grad_x, *row_grad_h, *gates, *cell;
  typename Operand<T>::Element* panel;  // of weights that are not packed
  size_t shared_bytes, own_bytes;

  BackwardScratch(const Recurrent& r, int64_t rows, Arena shared, Arena own)
      : x(shared.take<A>(again(r, rows) * gate_width(r))),
        h(shared.take<A>(r.inputs == Inputs::kSummed ? 0 : again(r, rows) * gate_width(r))),
        stats(shared.take<A>(again(r, rows) * 2 * r.gates)),
        grad_hidden(shared.take<A>(r.projected ? rows * r.hidden_size : 0)),
        zeros(own.take<T>(r.hidden_size)),
        inputs(shared, own, again(r, rows), r.input_size),
        states(shared, own, again(r, rows), r.output_size),
        to_x(own.take<A*>(again(r, rows))),
        to_h(own.take<A*>(again(r, rows))),
        to(own.take<A*>(rows)),
        left(own.take<const A*>(rows)),
        left_grads(own.take<const typename Operand<T>::Element*>(rows)),
        row_x(own.take<A>(kTogether * gate_width(r))),
        row_h(own.take<A>(kTogether * gate_width(r))),
        row_grad_x(own.take<A>(kSame ? 0 : kTogether * gate_width(r))),
        row_grad_h(own.take<A>(kSame ? 0 : kTogether * gate_width(r))),
        gates(own.take<A>(4 * r.hidden_size)),
        cell(own.take<A>(r.hidden_size)),
        panel(own.take<typename Operand<T>::Element>(kPanelMemory<Operand<T>>)),
        shared_bytes((shared.used + 63) / 64 * 64),
        own_bytes((own.used + 63) / 64 * 64) {}

 private:
  // Rows of a chunk that are computed again.
  static int64_t again(const Recurrent& r, int64_t rows) {
    return r.saved_x == nullptr ? chunk_steps(r) * rows : 0;
  }
};

}  // namespace layernorm::LAYERNORM_ISA
