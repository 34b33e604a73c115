// What the persistent kernels of both directions have in common: constants, which are their plan's;
// arguments; and where things are in shared memory. Of forward.cu and backward.cu,
// which tell the whole.
#pragma once

namespace layernorm {

constexpr int kLstm = 0, kGru = 1, kRnn = 2;
constexpr int kCell = LAYERNORM_CELL, kHidden = LAYERNORM_HIDDEN, kBlocks = LAYERNORM_BLOCKS;
constexpr int kUnits = LAYERNORM_UNITS, kSplit = LAYERNORM_SPLIT, kRows = LAYERNORM_ROWS;

// A warp has 8 units side by side in each slot, which is a gate, or of an RNN one of two eights.
constexpr int kGates = kCell == kLstm ? 4 : kCell == kGru ? 3 : 1;
constexpr int kSlots = kCell == kRnn ? 2 : kGates;
constexpr int kWarpUnits = kCell == kRnn ? 16 : 8;
constexpr int kUnitWarps = kUnits / kWarpUnits;
// Of backward perhaps more than have units.
constexpr int kWarps = LAYERNORM_WARPS, kThreads = 32 * kWarps;
constexpr int kTiles = kRows / 8;
constexpr int kWarpTiles = (kTiles + kSplit - 1) / kSplit;
// Pairs of sums of a row and group; in memory by fours, so that the four lanes of eight rows read
// without conflicts.
constexpr int kParts = kHidden / kWarpUnits;
constexpr int kStatistics = (kParts + 3) / 4 * 4 * kRows;

static_assert(kHidden % 16 == 0 && kUnits % kWarpUnits == 0 && kRows % 8 == 0);
static_assert(kHidden <= kUnits * kBlocks && kRows <= kThreads && kUnitWarps * kSplit <= kWarps);

// Where things are in shared memory, in bytes, up to what a direction has for itself.
constexpr int after(int begin, int bytes) { return (begin + bytes + 15) / 16 * 16; }
constexpr bool kHasCell = kCell == kLstm;
constexpr int kVectorsAt = 16;
constexpr int kBiasHnAt = after(kVectorsAt, 16 * kGates * kUnits);
constexpr int kCellVectorsAt = after(kBiasHnAt, kCell == kGru ? 4 * kUnits : 0);
constexpr int kDirectionAt = after(kCellVectorsAt, kHasCell ? 8 * kUnits : 0);

enum CellNorm { kNone, kOutput, kCarried };
enum Scope { kMatrix, kAll, kGate };

// One layer and direction, to which the kernels add what they have for themselves; persistent.py
// has the same in ctypes.
struct Layer {
  Half* x;  // [rows of all steps, G·H]; of backward those kept
  const Half *c0, *weight_hh;
  const Half *bias_hh, *gain_ih, *gain_hh, *bias, *bias_hn, *gain_cell, *bias_cell;  // or null
  const unsigned char* resets;                  // [rows of all steps], or null
  const long long *batch_sizes, *step_offsets;  // [steps], or null
  Half* saved_c;         // [rows of all steps, H], of an LSTM; forward, or null
  float* stats;          // rstd of a data row begins at stats_width·row + stats_first; or null
  long long time_limit;  // of a wait, in nanoseconds
  int batch, steps, stats_width, stats_first;
  float eps;
  int rms, summed, scope, cell_norm, relu, reverse;
};

// The rows of this cluster that take part in a step, and the first one's row in the data.
struct Step {
  long long row;
  int live;
};

// The loop's step of that number; without rows where there is none.
inline Step step_at(const Layer& layer, int index, int first) {
  if (index < 0 || index >= layer.steps) return {0, 0};
  const int t = layer.reverse ? layer.steps - 1 - index : index;
  long long live = layer.batch, row = static_cast<long long>(t) * layer.batch;
  if (layer.batch_sizes != nullptr) live = layer.batch_sizes[t], row = layer.step_offsets[t];
  live -= first;
  return {row + first, static_cast<int>(live < 0 ? 0 : live > kRows ? kRows : live)};
}
// Whether a reset parts a row's steps, one after the other in the loop. Before the first step there
// is the initial state, which forward alone may be parted from.
inline bool parted(const Layer& layer, Step earlier, Step later, int row) {
  const Step of = layer.reverse ? earlier : later;
  return layer.resets != nullptr && row < later.live && row < of.live &&
         layer.resets[of.row + row] != 0;
}

// A thread's place: lane/4 is its unit within an eight, 2·(lane%4) + {0, 1} its rows within a tile.
struct Place {
  unsigned rank, warp, lane;
  int unit_warp, split;  // which units, and which part of what the warps with these units share
  int unit;              // the warp's first; of a last block perhaps beyond the hidden size
  int first;             // the cluster's first row of the batch

  bool active() const {
    return unit < kHidden && (kWarps == kUnitWarps * kSplit || unit_warp < kUnitWarps);
  }
  int row(int tile, int e) const { return 8 * tile + 2 * static_cast<int>(lane % 4) + e; }
  int unit_of(int slot) const { return unit + (kCell == kRnn ? 8 * slot : 0) + lane / 4; }
  int feature(int slot) const { return (kCell == kRnn ? 0 : slot * kHidden) + unit_of(slot); }
  int local(int slot) const { return unit_of(slot) - static_cast<int>(rank) * kUnits; }
};
inline Place this_place() {
  Place place;
  place.rank = cluster_rank(), place.warp = warp_index(), place.lane = lane_index();
  place.unit_warp = place.warp / kSplit, place.split = place.warp % kSplit;
  place.unit = static_cast<int>(place.rank) * kUnits + place.unit_warp * kWarpUnits;
  place.first = static_cast<int>(blockIdx.x / kBlocks) * kRows;
  return place;
}
// The tiles whose gates the warp makes, by their number among its own and among all.
template <typename Body>
__forceinline__ void each_tile(const Place& place, Body body) {
#pragma unroll
  for (int own = 0; own < kWarpTiles; ++own) {
    const int tile = kSplit * own + place.split;
    if (place.active() && tile < kTiles) body(own, tile);
  }
}

template <typename V>
inline V* shared_at(int at) {
  return reinterpret_cast<V*>(shared_memory() + at);
}
inline float2* statistics_at(int at, int group, int row, int part) {
  return shared_at<float2>(at) + group * kStatistics + (part / 4 * kRows + row) * 4 + part % 4;
}
inline float4* vectors_at(const Place& place, int slot) {
  return shared_at<float4>(kVectorsAt) + (place.unit_warp * kSlots + slot) * 8 + place.lane / 4;
}

}  // namespace layernorm
