// What the backward kernel has for itself: constants, arguments, where things are in shared memory,
// and what a step reads. Of backward.cu, which tells the whole.
#pragma once

namespace layernorm {

// K of the product are the block's gates, in k-steps of 16, the first of them with weights in
// registers; its M are all units, in sixteens, of which a warp has some.
constexpr int kDepth = kGates * kUnits, kSteps = kDepth / 16;
constexpr int kRegisterSteps = LAYERNORM_REGISTER_STEPS, kSharedSteps = kSteps - kRegisterSteps;
constexpr int kBlockSixteens = kUnits / 16, kSixteens = kBlocks * kBlockSixteens;
constexpr int kWarpSixteens = (kSixteens + kWarps - 1) / kWarps;
// Blocks that have units.
constexpr int kSources = (kHidden + kUnits - 1) / kUnits;
// Units of a thread; of an RNN two.
constexpr int kEights = kWarpUnits / 8;
// A row of gradients begins a quarter of the banks after the one before.
constexpr int kGradStride = kDepth + (80 - kDepth % 64) % 64;
static_assert(kUnits % 16 == 0 && 0 <= kSharedSteps && kRegisterSteps >= 0);

// The statistics of the gates' gradients, of as many groups as the variant has, come last.
constexpr int kGradsAt = kDirectionAt;
constexpr int kWeightsAt = after(kGradsAt, 2 * kRows * kGradStride);
constexpr int kPartsAt = after(kWeightsAt, 16 * kThreads * kWarpSixteens * kSharedSteps);
constexpr int kCellStatisticsAt = after(kPartsAt, 4 * kRows * kSources * kUnits);
constexpr int kStatisticsAt = after(kCellStatisticsAt, kHasCell ? 8 * kStatistics : 0);
static_assert(kStatisticsAt + 8 * kStatistics == LAYERNORM_SHARED_BYTES, "as the plan has it");

// x, saved_h and stats are those of the rows from `kept` on, the chunk's own of those from `base`.
struct Arguments : Layer {
  const Half* saved_h;                // [rows, G·H], where inputs are separate
  const Half* grad_output;            // [rows of all steps, H], or null
  const Half* h_before;               // [rows of the chunk, H], of a GRU
  const float* cell_stats;            // [rows of the chunk, 2], mean and rstd of a normalized cell
  Half *grad_gates, *grad_wh;         // [rows of the chunk, G·H]
  Half* grad_own;                     // [rows of the chunk, H], of a GRU whose inputs are separate
  Half *grad_cell, *normalized_cell;  // [rows of the chunk, H], of a normalized cell
  float *grad_h, *grad_c;             // [batch, H], of the state between steps
  long long base, kept;
  int done, count;  // steps that are behind the chunk, from the loop's end; and its own
};

// [row][gate][unit of the block]
inline Half* grads_at(int row, int k) { return shared_at<Half>(kGradsAt) + row * kGradStride + k; }
inline uint4* weights_at(const Place& place, int step, int own) {
  const int fragment = (place.warp * kSharedSteps + step - kRegisterSteps) * kWarpSixteens + own;
  return shared_at<uint4>(kWeightsAt) + fragment * 32 + place.lane;
}
// What a block has for sixteen units of another: for each lane two units, eight apart, of two rows.
inline float4* parts_at(unsigned source, int sixteen, int tile, unsigned lane) {
  const int block = (static_cast<int>(source) * kBlockSixteens + sixteen) * kTiles + tile;
  return shared_at<float4>(kPartsAt) + block * 32 + lane;
}

// A step with its neighbours in the loop.
struct Around {
  Step before, step, after;
};

// What a step reads of a thread's units and rows of a tile: what was kept of x and h, the gradient
// of the output, c (or of a GRU h) before the step, and mean and rstd of the cell.
struct Read {
  Inputs x, h;
  Half grad[kEights][2], before[2];
  float2 cell[2];
  bool passes[2];  // whether the gradient of the step after reaches this one
};

inline void read(const Arguments& args, const Place& place, const Around& around, int tile,
                 Read& of) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.row(tile, e), unit = place.unit_of(0);
    const bool live = row < around.step.live;
    const long long all = around.step.row + row;
    const long long kept = (all - args.kept) * kGates * kHidden;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      of.x[slot][e] = live ? args.x[kept + place.feature(slot)] : Half{0};
      of.h[slot][e] = live && !args.summed ? args.saved_h[kept + place.feature(slot)] : Half{0};
    }
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
      of.grad[eight][e] = live && args.grad_output != nullptr
                              ? args.grad_output[all * kHidden + place.unit_of(eight)]
                              : Half{0};
    of.passes[e] = live && !parted(args, around.step, around.after, row);
    of.before[e] = 0;
    if (kCell == kGru && live) of.before[e] = args.h_before[(all - args.base) * kHidden + unit];
    if (kCell == kLstm && live && !parted(args, around.before, around.step, row))
      of.before[e] = row < around.before.live
                         ? args.saved_c[(around.before.row + row) * kHidden + unit]
                         : args.c0[static_cast<long long>(place.first + row) * kHidden + unit];
    of.cell[e] = {0, 0};
    if (kHasCell && live && args.cell_norm != kNone)
      of.cell[e] = *reinterpret_cast<const float2*>(args.cell_stats + 2 * (all - args.base));
  }
}

}  // namespace layernorm
