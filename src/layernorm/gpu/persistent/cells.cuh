// From the product of a step to the next state: norms, gates, the cell. Of forward.cu, which
// tells the whole; csrc/recurrent/cells.hpp has the same for a CPU.
#pragma once

namespace layernorm {

// Zeros in the rows that a reset parts from the step before.
inline void clear(const Place& place) {
  for (int row = place.warp; row < kRows; row += kThreads / 32) {
    if (load(shared_at<int>(kClearedAt) + row) == 0) continue;
    for (int unit = 8 * place.lane; unit < kHidden; unit += 8 * 32)
      store(reinterpret_cast<uint4*>(hidden_at(row, unit)), uint4{0, 0, 0, 0});
    if (kHasCell)
      for (int local = 8 * place.lane; local < kUnits; local += 8 * 32)
        store(reinterpret_cast<uint4*>(own_at(kOwnCAt, row, local)), uint4{0, 0, 0, 0});
  }
}

// c and σ(o) of a thread's unit and rows, where the cell is normalized.
struct Cells {
  float c[1][2], open[2];
};

inline void load_inputs(const Arguments& args, const Place& place, Step step, int tile, Inputs& x) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      x[slot][e] = row < step.live
                       ? args.x[(step.row + row) * kGates * kHidden + place.feature(slot)]
                       : Half{0};
  }
}

// Adds to the product what belongs inside the norm, and sends its statistics.
inline void measure(const Arguments& args, const Place& place, int tile, const Inputs& x, Sums& a) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const float bias = load(vectors_at(place, slot)).w;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      a[slot][e] += bias;
      if (args.summed) a[slot][e] += widen(x[slot][e]);
    }
  }
  for (int group = 0; group < group_count(args); ++group)
    send_statistics(args, place, kStatisticsAt, group, group_at(args, group), tile, a);
}

// The norm in place of the product; kept for backward where that is wanted.
inline void normalize(const Arguments& args, const Place& place, Step step, int tile, Sums& a) {
  for (int group = 0; group < group_count(args); ++group) {
    const Group gates = group_at(args, group);
    Norm norms[2];
    combine(args, place, kStatisticsAt, group, gates, tile, norms);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        if (gates.has(slot)) a[slot][e] = (a[slot][e] - norms[e].mean) * norms[e].rstd;
      const int row = place.row(tile, e);
      if (args.stats != nullptr && place.unit == 0 && place.lane < 4 && row < step.live)
        args.stats[(step.row + row) * args.stats_width + args.stats_first + group] = norms[e].rstd;
    }
  }
  if (args.normalized == nullptr) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    if (row >= step.live) continue;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      args.normalized[(step.row + row) * kGates * kHidden + place.feature(slot)] =
          narrow(a[slot][e]);
  }
}

// h of one tile, gathered by its warp, to all blocks and to the output.
inline void send_hidden(const Arguments& args, const Place& place, Step step, int tile) {
  sync_warp();
  send_rows(place, tile, step.live);
  keep_rows(place, kOwnHAt, args.output + step.row * kHidden, tile, step.live);
}
inline void keep_cells(const Arguments& args, const Place& place, Step step, int tile) {
  sync_warp();
  if (args.saved_c != nullptr)
    keep_rows(place, kOwnCAt, args.saved_c + step.row * kHidden, tile, step.live);
}

// The gates of one tile and its new state; where the cell is normalized, up to the statistics of c.
inline void step_tile(const Arguments& args, const Place& place, Step step, int tile,
                      const Inputs& x, Sums& a, Cells& cells) {
  normalize(args, place, step, tile, a);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    Gate gate[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      gate[slot] =
          gate_of(args, place, slot, args.summed ? a[slot][e] : widen(x[slot][e]), a[slot][e]);
    if constexpr (kCell == kLstm) {
      Half* own = own_at(kOwnCAt, row, place.local(0));
      const float entering = sigmoid(gate[0].whole) * hyperbolic_tangent(gate[2].whole);
      const float c = rounded(fmaf(sigmoid(gate[1].whole), widen(load(own)), entering));
      const float open = sigmoid(gate[3].whole);
      cells.c[0][e] = c, cells.open[e] = open;
      if (row < step.live) store(own, narrow(c));
      if (args.cell_norm == kNone)
        store(own_at(kOwnHAt, row, place.local(0)), narrow(open * hyperbolic_tangent(c)));
    } else if constexpr (kCell == kGru) {
      const float h = widen(load(hidden_at(row, place.unit_of(0))));
      const float part = reset_part(args, place, gate[2], a[2][e]);
      const float n = candidate_of(args, gate[2], sigmoid(gate[0].whole), part);
      store(own_at(kOwnHAt, row, place.local(0)), narrow(fmaf(sigmoid(gate[1].whole), h - n, n)));
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float h = args.relu ? (gate[slot].whole < 0 ? 0.0F : gate[slot].whole)
                                  : hyperbolic_tangent(gate[slot].whole);
        store(own_at(kOwnHAt, row, place.local(slot)), narrow(h));
      }
    }
  }
  if (kHasCell && args.cell_norm != kCarried) keep_cells(args, place, step, tile);
  if (kHasCell && args.cell_norm != kNone)
    send_statistics(args, place, kCellStatisticsAt, 0, {0, 1}, tile, cells.c);
  else
    send_hidden(args, place, step, tile);
}

// What is seen of a normalized cell, and h.
inline void show_tile(const Arguments& args, const Place& place, Step step, int tile,
                      const Cells& cells) {
  Norm norms[2];
  combine(args, place, kCellStatisticsAt, 0, {0, 1}, tile, norms);
  const float2 vectors = load(shared_at<float2>(kCellVectorsAt) + place.local(0));
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e);
    float seen = (cells.c[0][e] - norms[e].mean) * norms[e].rstd;
    seen = fmaf(seen, vectors.x, vectors.y);
    if (args.cell_norm == kCarried) {
      seen = rounded(seen);
      if (row < step.live) store(own_at(kOwnCAt, row, place.local(0)), narrow(seen));
    }
    store(own_at(kOwnHAt, row, place.local(0)), narrow(cells.open[e] * hyperbolic_tangent(seen)));
  }
  if (args.cell_norm == kCarried) keep_cells(args, place, step, tile);
  send_hidden(args, place, step, tile);
}

}  // namespace layernorm
