// The persistent kernel's constants, which are its plan's; its arguments; and where things are in
// shared memory. Of persistent.cu, which tells the whole.
#pragma once

namespace layernorm {

constexpr int kLstm = 0, kGru = 1, kRnn = 2;
constexpr int kCell = LAYERNORM_CELL, kHidden = LAYERNORM_HIDDEN, kBlocks = LAYERNORM_BLOCKS;
constexpr int kUnits = LAYERNORM_UNITS, kKSplit = LAYERNORM_K_SPLIT, kRows = LAYERNORM_ROWS;
// Pairs of k-steps, 32 features of h, of a warp; and those of them with weights in registers.
constexpr int kPairs = (kHidden + 32 * kKSplit - 1) / (32 * kKSplit);
constexpr int kRegisterPairs = LAYERNORM_REGISTER_PAIRS, kSharedPairs = kPairs - kRegisterPairs;

// A warp has 8 units side by side in each slot, which is a gate, or of an RNN one of two eights.
// Two slots make the 16 rows of an mma, so that a thread holds all gates of its units.
constexpr int kGates = kCell == kLstm ? 4 : kCell == kGru ? 3 : 1;
constexpr int kSlots = kCell == kRnn ? 2 : kGates;
constexpr int kProducts = (kSlots + 1) / 2;
constexpr int kWarpUnits = kCell == kRnn ? 16 : 8;
constexpr int kUnitWarps = kUnits / kWarpUnits;
constexpr int kThreads = 32 * kUnitWarps * kKSplit;
constexpr int kTiles = kRows / 8;
constexpr int kWarpTiles = (kTiles + kKSplit - 1) / kKSplit;
// Pairs of (mean, sum of squares) of a row and group; in memory by fours, so that the four lanes of
// eight rows read without conflicts.
constexpr int kParts = kHidden / kWarpUnits;
constexpr int kStatistics = (kParts + 3) / 4 * 4 * kRows;
// A row of h begins half of the banks after the one before.
constexpr int kWidth = 32 * kKSplit * kPairs;
constexpr int kStride = kWidth + (kWidth / 32 % 2 == 0 ? 32 : 0);

static_assert(kHidden % 16 == 0 && kUnits % kWarpUnits == 0 && kRows % 8 == 0);
static_assert(kHidden <= kUnits * kBlocks && kRows <= kThreads);
static_assert(0 <= kSharedPairs && kRegisterPairs >= 0);

// Where things are in shared memory, in bytes; the statistics of the product, of as many groups as
// the variant has, come last.
constexpr int after(int begin, int bytes) { return (begin + bytes + 15) / 16 * 16; }
constexpr bool kHasCell = kCell == kLstm;
constexpr int kHiddenAt = 16;
constexpr int kWeightsAt = after(kHiddenAt, 2 * kRows * kStride);
constexpr int kSumsAt = after(kWeightsAt, 16 * kThreads * kSharedPairs * kSlots);
constexpr int kVectorsAt = after(kSumsAt, kKSplit == 1 ? 0 : 16 * kTiles * kThreads * kProducts);
constexpr int kBiasHnAt = after(kVectorsAt, 16 * kGates * kUnits);
constexpr int kOwnHAt = after(kBiasHnAt, kCell == kGru ? 4 * kUnits : 0);
constexpr int kOwnCAt = after(kOwnHAt, 2 * kRows * kUnits);
constexpr int kCellVectorsAt = after(kOwnCAt, kHasCell ? 2 * kRows* kUnits : 0);
constexpr int kCellStatisticsAt = after(kCellVectorsAt, kHasCell ? 8 * kUnits : 0);
constexpr int kClearedAt = after(kCellStatisticsAt, kHasCell ? 8 * kStatistics : 0);
constexpr int kStatisticsAt = after(kClearedAt, 4 * kRows);
static_assert(kStatisticsAt + 8 * kStatistics == LAYERNORM_SHARED_BYTES, "as the plan has it");

enum CellNorm { kNone, kOutput, kCarried };
enum Scope { kMatrix, kAll, kGate };

// One layer and direction; persistent.py has the same in ctypes.
struct Arguments {
  Half* x;  // [rows of all steps, G·H]
  const Half *h0, *c0, *weight_hh;
  const Half *bias_hh, *gain_ih, *gain_hh, *bias, *bias_hn, *gain_cell, *bias_cell;  // or null
  const unsigned char* resets;                  // [rows of all steps], or null
  const long long *batch_sizes, *step_offsets;  // [steps], or null
  Half *output, *hn, *cn, *saved_c;
  Half* normalized;      // [rows of all steps, G·H]; may be x; or null
  float* stats;          // rstd of a data row begins at stats_width·row + stats_first; or null
  unsigned* error;       // set where the watchdog stops the kernel; or null
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

inline Step step_at(const Arguments& args, int index, int first) {
  if (index >= args.steps) return {0, 0};
  const int t = args.reverse ? args.steps - 1 - index : index;
  long long live = args.batch, row = static_cast<long long>(t) * args.batch;
  if (args.batch_sizes != nullptr) live = args.batch_sizes[t], row = args.step_offsets[t];
  live -= first;
  return {row + first, static_cast<int>(live < 0 ? 0 : live > kRows ? kRows : live)};
}

// A thread's place: lane/4 is its unit within an eight, 2·(lane%4) + {0, 1} its rows within a tile.
struct Place {
  unsigned rank, warp, lane;
  int unit_warp, split;  // which units, and which part of K and of the tiles
  int unit;              // the warp's first; of a last block perhaps beyond the hidden size
  int first;             // the cluster's first row of the batch

  bool active() const { return unit < kHidden; }
  int unit_of(int slot) const { return unit + (kCell == kRnn ? 8 * slot : 0) + lane / 4; }
  int feature(int slot) const { return (kCell == kRnn ? 0 : slot * kHidden) + unit_of(slot); }
  int local(int slot) const { return unit_of(slot) - static_cast<int>(rank) * kUnits; }
};

template <typename V>
inline V* shared_at(int at) {
  return reinterpret_cast<V*>(shared_memory() + at);
}
inline Half* hidden_at(int row, int unit) {
  return shared_at<Half>(kHiddenAt) + row * kStride + unit;
}
inline Half* own_at(int at, int row, int local) {
  return shared_at<Half>(at) + row * kUnits + local;
}
inline float2* statistics_at(int at, int group, int row, int part) {
  return shared_at<float2>(at) + group * kStatistics + (part / 4 * kRows + row) * 4 + part % 4;
}
inline float4* vectors_at(const Place& place, int slot) {
  return shared_at<float4>(kVectorsAt) + (place.unit_warp * kSlots + slot) * 8 + place.lane / 4;
}
inline uint4* weights_at(const Place& place, int pair, int slot) {
  const int block = (place.warp * kSharedPairs + pair - kRegisterPairs) * kSlots + slot;
  return shared_at<uint4>(kWeightsAt) + block * 32 + place.lane;
}

}  // namespace layernorm
