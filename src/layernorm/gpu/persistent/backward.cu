// The backward loop of a normalized LSTM, GRU or RNN over some of its steps in one launch, for
// sm_90 and later. Compiled as forward.cu is, whose words and clusters it shares, with the
// macros of a plan of its own (persistent_backward_plan.py). It finds the gradients of the gates
// and of W_hh h of its steps and takes that of the state back to the step before them; the sums
// over rows, which no step waits for, come after it.
//
// A step is, for a block's own units,
//
//   gates    made again of what forward kept; an LSTM's up to the cell as it is seen
//   exchange of the sums that the norm of the cell needs, where there is one
//   gates    their gradients
//   exchange of the sums that the norm of W_hh h needs
//   product  W_hhᵀ times the gradients of the block's gates: for all units the part of a sum that
//            is the block's, with units as mma's rows and the batch's rows as its columns
//   exchange of these parts, which the blocks that have the units add up
//
// The weights of the product are the rows of W_hh that a block has in forward too. The other way
// round, with all gates' gradients in every block, it would be sent G·H values of 2 bytes for each
// row, not H of 4; and its sums would be split between warps.
//
// In which order a sum is made follows from how the units lie in blocks, `units` of the plan, and
// neither from rows nor from where the weights are.
//
// Why no buffer is double, why the exchanges have one barrier, and why no block waits in the end:
// as in forward.cu. The sums are read before the next exchange; the parts are read before the
// next step's first, and written after its last but one, where all have read them. The gates'
// gradients are a block's alone, between barriers of its own.

namespace layernorm {

using Weights = uint4[kRegisterSteps + 1][kWarpSixteens];

// The first unit of one of the warp's sixteens, from the block's own ones on, lest all blocks send
// to the same one at a time; kHidden or more where there is none.
inline int first_unit(const Place& place, int own) {
  const int sixteen = own * kWarps + static_cast<int>(place.warp);
  if (sixteen >= kSixteens) return kHidden;
  return (sixteen + static_cast<int>(place.rank) * kBlockSixteens) % kSixteens * 16;
}

// Fragments of W_hhᵀ. Of a k-step's 16 gates a lane has four side by side from 4·(lane%4) on: mma's
// k in another order than the ISA's, the same for weights and gradients.
inline void load_weights(const Arguments& args, const Place& place, Weights& kept) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int k = 16 * step + 4 * (place.lane % 4);
    const int gate = static_cast<int>(place.rank) * kUnits + k % kUnits;
    const Half* rows =
        args.weight_hh + (static_cast<long long>(k / kUnits) * kHidden + gate) * kHidden;
#pragma unroll
    for (int own = 0; own < kWarpSixteens; ++own) {
      const int unit = first_unit(place, own);
      const auto two = [&](int from, int eight) {
        if (gate >= kHidden || unit >= kHidden) return 0U;
        const Half* at = rows + from * kHidden + unit + 8 * eight + place.lane / 4;
        return static_cast<unsigned>(at[0]) | static_cast<unsigned>(at[kHidden]) << 16;
      };
      const uint4 w = {two(0, 0), two(0, 1), two(2, 0), two(2, 1)};
      if (step < kRegisterSteps)
        kept[step][own] = w;
      else
        store(weights_at(place, step, own), w);
    }
  }
}

__forceinline__ void multiply(const Place& place, int step, const uint4 (&w)[kWarpSixteens],
                              float (&sums)[kWarpSixteens][kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint2 grads = load(reinterpret_cast<const uint2*>(
        grads_at(8 * tile + place.lane / 4, 16 * step + 4 * (place.lane % 4))));
#pragma unroll
    for (int own = 0; own < kWarpSixteens; ++own)
      mma(sums[own][tile], {w[own].x, w[own].y, w[own].z, w[own].w}, {grads.x, grads.y});
  }
}

// The block's part of the gradient of h before the step, to the blocks that have the units.
__forceinline__ void product(const Place& place, const Weights& kept, int live) {
  if (place.warp >= kSixteens || static_cast<int>(place.rank) >= kSources) return;
  float sums[kWarpSixteens][kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kRegisterSteps; ++step) multiply(place, step, kept[step], sums);
#pragma unroll 2
  for (int step = kRegisterSteps; step < kSteps; ++step) {
    uint4 w[kWarpSixteens];
#pragma unroll
    for (int own = 0; own < kWarpSixteens; ++own) w[own] = load(weights_at(place, step, own));
    multiply(place, step, w, sums);
  }
#pragma unroll
  for (int own = 0; own < kWarpSixteens; ++own) {
    const int unit = first_unit(place, own);
    if (unit >= kHidden) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (8 * tile >= live) continue;
      const float (&s)[4] = sums[own][tile];
      remote_store(parts_at(place.rank, unit % kUnits / 16, tile, place.lane), unit / kUnits,
                   float4{s[0], s[1], s[2], s[3]});
    }
  }
}

// Barriers, parameters and no gradients of gates that are not there, up to where the cluster meets
// for the first time.
inline void prepare(const Arguments& args, const Place& place) {
  if (threadIdx.x == 0) {
    barrier_init(shared_at<unsigned long long>(0), kBlocks);
    barrier_publish();
  }
  load_vectors(args, place);
  for (int i = threadIdx.x; i < kRows * (kDepth / 4); i += kThreads)
    store(reinterpret_cast<uint2*>(grads_at(i / (kDepth / 4), 4 * (i % (kDepth / 4)))),
          uint2{0, 0});
  sync_block();
  cluster_sync();
}

// Between registers and memory: the carried gradients of the batch's rows of a tile.
template <typename Move>
inline void each_carried(const Arguments& args, const Place& place, int tile, Carried& carried,
                         Move move) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = place.first + place.row(tile, e);
    if (row >= args.batch) continue;
    const long long at = static_cast<long long>(row) * kHidden;
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
      move(carried.h[eight][e], args.grad_h[at + place.unit_of(eight)]);
    if (kHasCell) move(carried.c[e], args.grad_c[at + place.unit_of(0)]);
  }
}

}  // namespace layernorm

extern "C" __global__ void __cluster_dims__(LAYERNORM_BLOCKS, 1, 1)
    __launch_bounds__(layernorm::kThreads, 1)
        layernorm_persistent(const __grid_constant__ layernorm::Arguments args) {
  using namespace layernorm;
  const Place place = this_place();
  Weights weights;
  load_weights(args, place, weights);
  Carried carried[kWarpTiles] = {};
  each_tile(place, [&](int own, int tile) {
    each_carried(args, place, tile, carried[own], [](float& to, float& from) { to = from; });
  });
  const int last = args.steps - 1 - args.done;
  Around around = {step_at(args, last - 1, place.first), step_at(args, last, place.first),
                   step_at(args, last + 1, place.first)};
  // Read a step ahead, while the products run.
  Read of[kWarpTiles];
  each_tile(place, [&](int own, int tile) { read(args, place, around, tile, of[own]); });
  prepare(args, place);
  unsigned phase = 0;
  for (int index = 0; index < args.count; ++index) {
    Around then = {step_at(args, last - index - 2, place.first), around.before, around.step};
    if (index + 1 == args.count) then.step.live = 0;  // of the next chunk
    if (around.step.live > 0) {
      Gradient grad[kWarpTiles];
      each_tile(place, [&](int own, int tile) {
        open_tile(args, place, around, tile, of[own], carried[own], grad[own]);
      });
      if (kHasCell && args.cell_norm != kNone) exchange(args, phase);
      each_tile(place, [&](int own, int tile) {
        if (kHasCell) through_cell(args, place, around, tile, of[own], carried[own], grad[own]);
        keep_gates(args, place, around, tile, of[own], grad[own]);
      });
      exchange(args, phase);
      each_tile(place, [&](int own, int tile) {
        through_norms(args, place, around, tile, of[own], grad[own]);
      });
      sync_block();
      each_tile(place, [&](int own, int tile) { read(args, place, then, tile, of[own]); });
      product(place, weights, around.step.live);
      exchange(args, phase);
      each_tile(place,
                [&](int own, int tile) { collect(place, around, tile, grad[own], carried[own]); });
    } else {
      each_tile(place, [&](int own, int tile) { read(args, place, then, tile, of[own]); });
    }
    around = then;
  }
  each_tile(place, [&](int own, int tile) {
    each_carried(args, place, tile, carried[own], [](float& from, float& to) { to = from; });
  });
}
