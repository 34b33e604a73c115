// A normalized LSTM, GRU or RNN over a whole sequence in one launch; forward, for sm_90 and later.
// Compiled behind device.cuh, or for a CPU behind tests/gpu/persistent/emulator/device.hpp, and the
// other files of compiling.py, with the macros of a plan (plan.py). The words are those of
// csrc/recurrent/recurrent.hpp.
//
// A cluster of BLOCKS blocks takes ROWS rows of the batch through all steps. Each block owns UNITS
// hidden units, whose rows of W_hh stay on the chip: in registers, what does not fit there in
// shared memory. A step is
//
//   product  W_hh·hᵀ with gates as mma's rows and the batch's rows as its columns, so that a column
//            never meets another: a NaN stays in its row, whose bits depend on no neighbour
//   exchange of the product's statistics over the units of a warp
//   gates    norms, gates and c of a block's own units
//   exchange of c's statistics, where the cell is normalized; and then h of its own units
//   exchange of h, which every block has whole
//
// Why no buffer is double. Each is written by peers before one exchange and read only between it
// and the next: h before the last and read before the first of the next step; the statistics before
// the first or the second and read before the one after. (A GRU's gates read h later: that of their
// own units, which their own warp writes.) What a block writes next time it writes after that next
// exchange, where every peer arrives after its last reading.
//
// Why all exchanges have one barrier, although arrivals may be slow. A block arrives for the next
// phase when it has passed this one. So where its arrival stands in for one that is still on its
// way, all have arrived; and no barrier gets two phases ahead of its block, whose own arrivals it
// needs.
//
// Why no block waits in the end: having passed its last exchange it has all that peers ever write
// to its memory, their arrivals included.

namespace layernorm {

// A lane's share of a pair of k-steps. Of a row it has the 8 features from 8·(lane%4) on of 32:
// mma's k in another order than the ISA's, the same for weights and h, so that two steps are
// together in memory. The vectors are fragments of mma, two for each product; that of a GRU's
// candidate, which has but eight rows, is one vector for both steps.
using Fragments = uint4[kSlots];

inline void load_weights(const Arguments& args, const Place& place,
                         Fragments (&kept)[kRegisterPairs + 1]) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int k = (place.split * kPairs + pair) * 32 + 8 * (place.lane % 4);
    Fragments w = {};
    for (int slot = 0; slot < kSlots; ++slot)
      if (place.active() && k < kHidden)
        w[slot] = *reinterpret_cast<const uint4*>(
            args.weight_hh + static_cast<long long>(place.feature(slot)) * kHidden + k);
    for (int slot = 0; slot + 1 < kSlots; slot += 2) {
      const uint4 low = w[slot], high = w[slot + 1];
      w[slot] = {low.x, high.x, low.y, high.y}, w[slot + 1] = {low.z, high.z, low.w, high.w};
    }
    for (int slot = 0; slot < kSlots; ++slot)
      if (pair < kRegisterPairs)
        kept[pair][slot] = w[slot];
      else
        store(weights_at(place, pair, slot), w[slot]);
  }
}

__forceinline__ void multiply(const Place& place, int pair, const Fragments& w,
                              float (&sums)[kTiles][kProducts][4]) {
  const int k = (place.split * kPairs + pair) * 32 + 8 * (place.lane % 4);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4 h = load(reinterpret_cast<const uint4*>(hidden_at(8 * tile + place.lane / 4, k)));
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const uint4 first = w[2 * i];
      if (2 * i + 1 < kSlots) {
        const uint4 second = w[(2 * i + 1) % kSlots];
        mma(sums[tile][i], {first.x, first.y, first.z, first.w}, {h.x, h.y});
        mma(sums[tile][i], {second.x, second.y, second.z, second.w}, {h.z, h.w});
      } else {
        mma(sums[tile][i], {first.x, 0, first.y, 0}, {h.x, h.y});
        mma(sums[tile][i], {first.z, 0, first.w, 0}, {h.z, h.w});
      }
    }
  }
}

// W_hh·hᵀ of the warp's units, for the tiles that it goes on with.

__forceinline__ void product(const Place& place, const Fragments (&kept)[kRegisterPairs + 1],
                             Sums (&result)[kWarpTiles]) {
  float sums[kTiles][kProducts][4] = {};
  if (place.active()) {
#pragma unroll
    for (int pair = 0; pair < kRegisterPairs; ++pair) multiply(place, pair, kept[pair], sums);
#pragma unroll 2
    for (int pair = 0; pair < kSharedPairs; ++pair) {
      Fragments w;
      for (int slot = 0; slot < kSlots; ++slot)
        w[slot] = load(weights_at(place, kRegisterPairs + pair, slot));
      multiply(place, kRegisterPairs + pair, w, sums);
    }
  }
  const auto at = [&](int tile, int split, int i) {
    const int warp = (tile * kUnitWarps + place.unit_warp) * kSplit + split;
    return shared_at<float4>(kSumsAt) + (warp * kProducts + i) * 32 + place.lane;
  };
  if (kSplit > 1) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      for (int i = 0; i < kProducts; ++i) {
        const float (&s)[4] = sums[tile][i];
        store(at(tile, place.split, i), float4{s[0], s[1], s[2], s[3]});
      }
    sync_block();
  }
#pragma unroll
  for (int own = 0; own < kWarpTiles; ++own) {
    const int tile = kSplit * own + place.split;
    if (kSplit > 1 && tile >= kTiles) continue;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      float total[4] = {};
      if (kSplit == 1)
        for (int j = 0; j < 4; ++j) total[j] = sums[own][i][j];
      else
        for (int split = 0; split < kSplit; ++split) {
          const float4 s = load(at(tile, split, i));
          total[0] += s.x, total[1] += s.y, total[2] += s.z, total[3] += s.w;
        }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (2 * i + j / 2 < kSlots) result[own][2 * i + j / 2][j % 2] = total[j];
    }
  }
}

// Barriers, parameters and initial states, up to where the cluster meets for the first time.
inline void prepare(const Arguments& args, const Place& place, Step step) {
  const int unit = static_cast<int>(place.rank) * kUnits;
  if (threadIdx.x == 0) {
    barrier_init(shared_at<unsigned long long>(0), kBlocks);
    barrier_publish();
  }
  load_vectors(args, place);
  const auto state = [&](const Half* of, int row, int u) {
    const bool real = place.first + row < args.batch && u < kHidden;
    return real ? *reinterpret_cast<const uint4*>(
                      of + static_cast<long long>(place.first + row) * kHidden + u)
                : uint4{0, 0, 0, 0};
  };
  for (int i = threadIdx.x; i < kRows * (kWidth / 8); i += kThreads) {
    const int row = i / (kWidth / 8), u = 8 * (i % (kWidth / 8));
    store(reinterpret_cast<uint4*>(hidden_at(row, u)), state(args.h0, row, u));
  }
  if (kHasCell)
    for (int i = threadIdx.x; i < kRows * (kUnits / 8); i += kThreads) {
      const int row = i / (kUnits / 8), u = 8 * (i % (kUnits / 8));
      store(reinterpret_cast<uint4*>(own_at(kOwnCAt, row, u)), state(args.c0, row, unit + u));
    }
  for (int row = threadIdx.x; row < kRows; row += kThreads)
    store(shared_at<int>(kClearedAt) + row, static_cast<int>(parted(args, {0, 0}, step, row)));
  sync_block();
  cluster_sync();
}

inline void finish(const Arguments& args, const Place& place) {
  for (int i = threadIdx.x; i < kRows * (kUnits / 8); i += kThreads) {
    const int row = i / (kUnits / 8), local = 8 * (i % (kUnits / 8));
    const int unit = static_cast<int>(place.rank) * kUnits + local;
    if (unit >= kHidden || place.first + row >= args.batch) continue;
    const long long at = static_cast<long long>(place.first + row) * kHidden + unit;
    *reinterpret_cast<uint4*>(args.hn + at) =
        load(reinterpret_cast<const uint4*>(hidden_at(row, unit)));
    if (kHasCell)
      *reinterpret_cast<uint4*>(args.cn + at) =
          load(reinterpret_cast<const uint4*>(own_at(kOwnCAt, row, local)));
  }
}

}  // namespace layernorm

extern "C" __global__ void __cluster_dims__(LAYERNORM_BLOCKS, 1, 1)
    __launch_bounds__(layernorm::kThreads, 1)
        layernorm_persistent(const __grid_constant__ layernorm::Arguments args) {
  using namespace layernorm;
  const Place place = this_place();
  Fragments weights[kRegisterPairs + 1];
  load_weights(args, place, weights);
  // Read two steps ahead, for what a step needs of the next one is read in it.
  Step step = step_at(args, 0, place.first), next = step_at(args, 1, place.first);
  prepare(args, place, step);
  unsigned phase = 0;
  for (int index = 0; index < args.steps; ++index) {
    const Step later = step_at(args, index + 2, place.first);
    if (step.live > 0) {
      if (args.resets != nullptr) {
        clear(place);
        sync_block();
      }
      Inputs x[kWarpTiles];
      Sums a[kWarpTiles];
      Cells cells[kWarpTiles];
      each_tile(place, [&](int own, int tile) { load_inputs(args, place, step, tile, x[own]); });
      const int row = threadIdx.x;
      const bool cleared = parted(args, step, next, row);
      product(place, weights, a);
      each_tile(place, [&](int own, int tile) { measure(args, place, tile, x[own], a[own]); });
      exchange(args, phase);
      if (row < kRows) store(shared_at<int>(kClearedAt) + row, static_cast<int>(cleared));
      each_tile(place, [&](int own, int tile) {
        step_tile(args, place, step, tile, x[own], a[own], cells[own]);
      });
      if (kHasCell && args.cell_norm != kNone) {
        exchange(args, phase);
        each_tile(place,
                  [&](int own, int tile) { show_tile(args, place, step, tile, cells[own]); });
      }
      exchange(args, phase);
    }
    step = next, next = later;
  }
  finish(args, place);
}
