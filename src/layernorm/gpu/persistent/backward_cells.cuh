// From the gradient of a step's state to those of its gates and of W_hh h. Of
// backward.cu, which tells the whole; csrc/recurrent/cells_backward.hpp has the same for a CPU.
#pragma once

namespace layernorm {

// The gradient of the state between steps, of a thread's units and rows, in registers throughout.
struct Carried {
  float h[kEights][2], c[2];
};
// What a thread has of a step and a tile.
struct Gradient {
  Sums d;                          // of the gates before their nonlinearities
  Sums t;                          // of what was normalized, times the gain
  Sums rstd;                       // of that norm
  float direct[2];                 // GRU: of h before the step, past the gates
  float cell[1][2], cell_n[1][2];  // LSTM: of what is seen of the cell; and the normalized cell
};

// x and h, or where they are summed their sum, as the norm has made it.
inline float normalized(const Arguments& args, const Read& of, int slot, int e) {
  return widen(args.summed ? of.x[slot][e] : of.h[slot][e]);
}
inline float less_square(float a) { return fmaf(-a, a, 1.0F); }
inline float sloped(float gate) { return gate * (1.0F - gate); }

// The gradients of a GRU's or RNN's gates; of an LSTM's output gate and of its cell as it is seen,
// with the other gates themselves for now.
inline void open_tile(const Arguments& args, const Place& place, const Around& around, int tile,
                      const Read& of, const Carried& carried, Gradient& grad) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    const bool live = row < around.step.live;
    float of_h[kEights];
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
      of_h[eight] = (of.passes[e] ? carried.h[eight][e] : 0.0F) + widen(of.grad[eight][e]);
    Gate gate[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      gate[slot] = gate_of(args, place, slot, widen(of.x[slot][e]), widen(of.h[slot][e]));
    if constexpr (kCell == kLstm) {
      const float enter = sigmoid(gate[0].whole), keep = sigmoid(gate[1].whole);
      const float candidate = hyperbolic_tangent(gate[2].whole), open = sigmoid(gate[3].whole);
      const float c = rounded(fmaf(keep, widen(of.before[e]), enter * candidate));
      const float2 vectors = load(shared_at<float2>(kCellVectorsAt) + place.local(0));
      const float n = (c - of.cell[e].x) * of.cell[e].y;
      float seen = args.cell_norm == kNone ? c : fmaf(n, vectors.x, vectors.y);
      if (args.cell_norm == kCarried) seen = rounded(seen);
      const float shown = hyperbolic_tangent(seen);
      float d = of_h[0] * open * less_square(shown);
      if (args.cell_norm != kOutput) d += of.passes[e] ? carried.c[e] : 0.0F;
      if (args.cell_norm != kNone) {
        const long long at = (around.step.row + row - args.base) * kHidden + place.unit_of(0);
        if (live) args.grad_cell[at] = narrow(d), args.normalized_cell[at] = narrow(n);
        d *= vectors.x;
      }
      grad.cell[0][e] = d, grad.cell_n[0][e] = n;
      grad.d[0][e] = enter, grad.d[1][e] = keep, grad.d[2][e] = candidate;
      grad.d[3][e] = of_h[0] * shown * sloped(open);
    } else if constexpr (kCell == kGru) {
      const float reset = sigmoid(gate[0].whole), update = sigmoid(gate[1].whole);
      const float part = reset_part(args, place, gate[2], widen(of.h[2][e]));
      const float candidate = candidate_of(args, gate[2], reset, part);
      const float d = of_h[0] * (1.0F - update) * less_square(candidate);
      grad.direct[e] = of_h[0] * update;
      grad.d[0][e] = d * part * sloped(reset);
      grad.d[1][e] = of_h[0] * (widen(of.before[e]) - candidate) * sloped(update);
      grad.d[2][e] = args.summed ? d * reset : d;
      grad.t[2][e] = d * reset;  // of the candidate's part of h
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float a = gate[slot].whole;
        grad.d[slot][e] = args.relu ? (a <= 0 ? 0.0F : of_h[slot])
                                    : of_h[slot] * less_square(hyperbolic_tangent(a));
      }
    }
  }
  if (kHasCell && args.cell_norm != kNone)
    send_gradients(place, kCellStatisticsAt, 0, {0, 1}, tile, grad.cell, grad.cell_n);
}

// An LSTM's: through the norm of its cell to c and the gates that made it.
inline void through_cell(const Arguments& args, const Place& place, const Around& around, int tile,
                         const Read& of, Carried& carried, Gradient& grad) {
  Along along[2] = {};
  if (args.cell_norm != kNone)
    combine_gradients(args, place, kCellStatisticsAt, 0, {0, 1}, tile, along);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float d = grad.cell[0][e];
    if (args.cell_norm != kNone)
      d = fmaf(-grad.cell_n[0][e], along[e].n, d - along[e].one) * of.cell[e].y;
    if (args.cell_norm == kOutput) d += of.passes[e] ? carried.c[e] : 0.0F;
    const float enter = grad.d[0][e], keep = grad.d[1][e], candidate = grad.d[2][e];
    if (place.row(tile, e) < around.step.live) carried.c[e] = d * keep;
    grad.d[0][e] = d * candidate * sloped(enter);
    grad.d[1][e] = d * widen(of.before[e]) * sloped(keep);
    grad.d[2][e] = d * enter * less_square(candidate);
  }
}

// The gates' gradients kept; and to all blocks the sums that their norm needs.
inline void keep_gates(const Arguments& args, const Place& place, const Around& around, int tile,
                       const Read& of, Gradient& grad) {
  Sums n;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    const bool live = row < around.step.live;
    const long long local = around.step.row + row - args.base;
    const long long stats = (around.step.row + row - args.kept) * args.stats_width;
    if (kCell == kGru && live && args.grad_own != nullptr)
      args.grad_own[local * kHidden + place.unit_of(0)] = narrow(grad.t[2][e]);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float4 vectors = load(vectors_at(place, slot));
      const float d = grad.d[slot][e];
      if (live) args.grad_gates[local * kGates * kHidden + place.feature(slot)] = narrow(d);
      grad.t[slot][e] = (kCell == kGru && slot == 2 ? grad.t[slot][e] : d) *
                        (args.summed ? vectors.x : vectors.y);
      n[slot][e] = normalized(args, of, slot, e);
      grad.rstd[slot][e] =
          live ? args.stats[stats + args.stats_first + group_of(args, slot)] : 0.0F;
    }
  }
  for (int group = 0; group < group_count(args); ++group)
    send_gradients(place, kStatisticsAt, group, group_at(args, group), tile, grad.t, n);
}

// Through the norm to W_hh h: kept, and to where the product finds it.
inline void through_norms(const Arguments& args, const Place& place, const Around& around, int tile,
                          const Read& of, Gradient& grad) {
  for (int group = 0; group < group_count(args); ++group) {
    const Group gates = group_at(args, group);
    Along along[2];
    combine_gradients(args, place, kStatisticsAt, group, gates, tile, along);
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        if (gates.has(slot))
          grad.t[slot][e] =
              fmaf(-normalized(args, of, slot, e), along[e].n, grad.t[slot][e] - along[e].one) *
              grad.rstd[slot][e];
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    const long long local = around.step.row + row - args.base;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const Half of_wh = narrow(grad.t[slot][e]);
      store(grads_at(row, (kCell == kRnn ? 0 : slot * kUnits) + place.local(slot)), of_wh);
      if (row < around.step.live)
        args.grad_wh[local * kGates * kHidden + place.feature(slot)] = of_wh;
    }
  }
}

// What all blocks have for the state before, in their order.
inline void collect(const Place& place, const Around& around, int tile, const Gradient& grad,
                    Carried& carried) {
  if (8 * tile >= around.step.live) return;
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight) {
    const int of = place.local(eight) / 8;
    float total[2] = {};
    for (unsigned source = 0; source < kSources; ++source) {
      const float4* parts = parts_at(source, of / 2, tile, place.lane);
      const float2 part = load(reinterpret_cast<const float2*>(parts) + of % 2);
      total[0] += part.x, total[1] += part.y;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (place.row(tile, e) < around.step.live)
        carried.h[eight][e] = kCell == kGru ? total[e] + grad.direct[e] : total[e];
  }
}

}  // namespace layernorm
