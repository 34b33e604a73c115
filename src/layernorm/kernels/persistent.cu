// A normalized LSTM, GRU or RNN over a whole sequence in one launch; forward, for sm_90 and later.
// Compiled behind device.cuh, or for a CPU behind tests/emulator/device.hpp, with the macros of a
// plan (persistent.py), which also says why a shape is not served. The words are those of
// csrc/recurrent.hpp.
//
// A cluster of BLOCKS blocks takes ROWS rows of the batch through all steps. Each block owns UNITS
// hidden units, whose rows of W_hh stay on the chip: in registers, what does not fit there in
// shared memory. A step is
//
//   begin    the h of all units, in every block: where the cell is normalized from c, σ(o) and the
//            statistics of c that the exchange A brought, else A brought h; rows that a reset
//            clears
//   product  W_hh·hᵀ with gates as mma's rows and the batch's rows as its columns, so that a column
//            never meets another: a NaN stays in its row, whose bits depend on no neighbour
//   B        exchange of the statistics of the product over the units of a warp
//   gates    norms, gates, c and h of a block's own units
//   A        exchange of what `begin` needs
//
// Why no buffer is double. Each is written by peers before one exchange and read only between it
// and the other: h, c, σ(o) and the statistics of c are written before A and read before B; the
// statistics of the product written before B and read before A. A block writes before A only after
// it has passed B, where every peer arrives after its last reading; and the other way round. Each
// exchange has a barrier of its own: of one barrier for both a quick block's next arrival could
// complete a phase in which a slow one's is still on its way.
//
// Why no block waits in the end: having passed its last A it has all that peers ever write to its
// memory, their arrivals included.

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
static_assert(kUnits * (kBlocks - 1) < kHidden && kHidden <= kUnits * kBlocks);
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
constexpr int kOwnOpenAt = after(kOwnCAt, kHasCell ? 2 * kRows* kUnits : 0);
constexpr int kOpenAt = after(kOwnOpenAt, kHasCell ? 4 * kRows* kUnits : 0);
constexpr int kCellVectorsAt = after(kOpenAt, kHasCell ? 4 * kRows* kHidden : 0);
constexpr int kCellStatisticsAt = after(kCellVectorsAt, kHasCell ? 8 * kHidden : 0);
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
  int unit_of(int slot) const {
    return unit + (kCell == kRnn ? 8 * slot : 0) + lane / 4;
  }
  int feature(int slot) const {
    return (kCell == kRnn ? 0 : slot * kHidden) + unit_of(slot);
  }
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

// Every block waits here until all of the cluster have arrived; what each wrote before is then seen
// by all. The block's own barrier orders its threads' writes before the arrivals, which release
// them.
inline void exchange(const Arguments& args, int which, unsigned parity) {
  unsigned long long* barrier = shared_at<unsigned long long>(0) + which;
  sync_block();
  if (threadIdx.x < kBlocks) barrier_arrive(barrier, threadIdx.x);
  if (barrier_try_wait(barrier, parity)) return;
  const unsigned long long begin = nanoseconds();
  while (!barrier_try_wait(barrier, parity)) {
    if (nanoseconds() - begin < static_cast<unsigned long long>(args.time_limit)) continue;
    if (args.error != nullptr) *args.error = 1U + which;
    trap();
  }
}

inline float sigmoid(float a) { return reciprocal(1.0F + expf(-a)); }
// Below 1/4 by its series, whose next term is 1e-8 of it: the other form cancels there.
inline float hyperbolic_tangent(float a) {
  const float s = a * a;
  const float series =
      fmaf(a * s, fmaf(s, fmaf(s, fmaf(s, 62.0F / 2835, -17.0F / 315), 2.0F / 15), -1.0F / 3), a);
  const float far = fmaf(-2.0F, reciprocal(expf(2 * fabsf(a)) + 1), 1.0F);
  return fabsf(a) < 0.25F ? series : copysignf(far, a);
}
inline float rounded(float a) { return widen(narrow(a)); }
inline float at_or(const Half* vector, long long index, float otherwise) {
  return vector == nullptr ? otherwise : widen(vector[index]);
}

// Over the eight lanes that have the same rows; over the four that have the same unit; over all.
inline float sum_units(float a) {
  for (unsigned mask = 4; mask < 32; mask *= 2) a += shuffle_xor(a, mask);
  return a;
}
inline float sum_quad(float a) {
  for (unsigned mask = 1; mask < 4; mask *= 2) a += shuffle_xor(a, mask);
  return a;
}
inline float sum_warp(float a) { return sum_units(sum_quad(a)); }

// The gates that share a group's statistics.
struct Group {
  int begin, end;
  bool has(int slot) const { return kCell == kRnn || (begin <= slot && slot < end); }
  int gates() const { return end - begin; }
};
inline int group_count(const Arguments& args) {
  return args.scope == kGate ? kGates : kCell == kGru && args.scope == kMatrix ? 2 : 1;
}
inline Group group_at(const Arguments& args, int group) {
  if (args.scope == kGate) return {group, group + 1};
  if (kCell == kGru && args.scope == kMatrix) return group == 0 ? Group{0, 2} : Group{2, 3};
  return {0, kGates};
}

// To all blocks: mean and Σ(a - mean)² of the warp's units, for the 8 rows of a tile. Where the
// norm is by the root mean square the mean is taken for 0, here and in all that follows.
template <int kCount>
inline void send_statistics(const Arguments& args, const Place& place, int at, int group,
                                       Group gates, int tile, const float (&a)[kCount][2]) {
  const float count = kCount == 1 || kCell == kRnn ? 8 * kCount : 8 * gates.gates();
  float mean[2], squares[2];
  for (int e = 0; e < 2; ++e) {
    float sum = 0, square = 0;
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (kCount == 1 || gates.has(slot)) sum += a[slot][e];
    mean[e] = args.rms ? 0.0F : sum_units(sum) / count;
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (kCount == 1 || gates.has(slot))
        square = fmaf(a[slot][e] - mean[e], a[slot][e] - mean[e], square);
    squares[e] = sum_units(square);
  }
  const unsigned row = place.lane % 8, holder = row / 2;
  const float2 even = {shuffle(mean[0], holder), shuffle(squares[0], holder)};
  const float2 odd = {shuffle(mean[1], holder), shuffle(squares[1], holder)};
  float2* to = statistics_at(at, group, 8 * tile + row, place.unit / kWarpUnits);
  for (unsigned peer = place.lane / 8; peer < kBlocks; peer += 4)
    remote_store(to, (peer + place.rank) % kBlocks, row % 2 == 0 ? even : odd);
}

struct Norm {
  float mean, rstd;
};
// Mean and rstd of a row from all parts, each of `count` features, by the lanes of which this is
// one of `kLanes`. With equal counts the means' mean is the mean; the order is fixed.
template <int kLanes>
inline Norm combined(const Arguments& args, int at, int group, int row, int count) {
  const auto sum = [](float a) { return kLanes == 4 ? sum_quad(a) : sum_warp(a); };
  const int begin = static_cast<int>(lane_index()) % kLanes;
  float means = 0, squares = 0;
  for (int part = begin; part < kParts; part += kLanes)
    means += load(statistics_at(at, group, row, part)).x;
  const float mean = sum(means) * (1.0F / kParts);
  for (int part = begin; part < kParts; part += kLanes) {
    const float2 of = load(statistics_at(at, group, row, part));
    squares += fmaf(count * (of.x - mean), of.x - mean, of.y);
  }
  const float variance = sum(squares) / static_cast<float>(kParts * count);
  return {mean, 1.0F / sqrtf(variance + args.eps)};
}

// A tile's 8 rows of own units, from where they are gathered to all blocks; live rows only.
template <typename V>
inline void send_rows(const Place& place, const V* own, V* all, int stride, int tile,
                                 int live) {
  constexpr int kVector = 16 / sizeof(V), kVectors = kWarpUnits / kVector;
  const int local = place.unit - static_cast<int>(place.rank) * kUnits;
  for (unsigned i = place.lane; i < 8 * kVectors * kBlocks; i += 32) {
    const int row = 8 * tile + i % 8, unit = kVector * (i / 8 % kVectors);
    if (row >= live) continue;
    const uint4 v = load(reinterpret_cast<const uint4*>(own + row * kUnits + local + unit));
    remote_store(reinterpret_cast<uint4*>(all + row * stride + place.unit + unit),
                 (i / 8 / kVectors + place.rank) % kBlocks, v);
  }
}
// And to where they belong in global memory, [rows, H] from the tile's cluster's first row on.
inline void keep_rows(const Place& place, int own, Half* to, int tile, int live) {
  constexpr int kVectors = kWarpUnits / 8;
  const int row = 8 * tile + place.lane % 8, unit = 8 * (place.lane / 8);
  if (to == nullptr || place.lane >= 8 * kVectors || row >= live) return;
  const int local = place.unit - static_cast<int>(place.rank) * kUnits;
  *reinterpret_cast<uint4*>(to + static_cast<long long>(row) * kHidden + place.unit + unit) =
      load(reinterpret_cast<const uint4*>(own_at(own, row, local + unit)));
}

inline void unpack(uint2 bits, float (&a)[4]) {
  a[0] = widen(static_cast<Half>(bits.x)), a[1] = widen(static_cast<Half>(bits.x >> 16));
  a[2] = widen(static_cast<Half>(bits.y)), a[3] = widen(static_cast<Half>(bits.y >> 16));
}
inline uint2 pack(const float (&a)[4]) {
  const auto two = [](float low, float high) {
    return narrow(low) | static_cast<unsigned>(narrow(high)) << 16;
  };
  return {two(a[0], a[1]), two(a[2], a[3])};
}

// h of four units of a row from c, σ(o) and the norm of c, which are in place of it; the owner of
// the units keeps them.
inline uint2 show_cell(const Arguments& args, const Place& place, long long data_row,
                                  int row, int unit, Norm norm) {
  float c[4];
  unpack(load(reinterpret_cast<const uint2*>(hidden_at(row, unit))), c);
  const float4 open =
      load(reinterpret_cast<const float4*>(shared_at<float>(kOpenAt) + row * kHidden + unit));
  const float opens[4] = {open.x, open.y, open.z, open.w};
  float h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 vectors = load(shared_at<float2>(kCellVectorsAt) + unit + i);
    c[i] = fmaf((c[i] - norm.mean) * norm.rstd, vectors.x, vectors.y);
    if (args.cell_norm == kCarried) c[i] = rounded(c[i]);
    h[i] = opens[i] * hyperbolic_tangent(c[i]);
  }
  const uint2 shown = pack(h);
  const int local = unit - static_cast<int>(place.rank) * kUnits;
  if (local < 0 || local >= kUnits) return shown;
  const long long at = data_row * kHidden + unit;
  *reinterpret_cast<uint2*>(args.output + at) = shown;
  if (args.cell_norm == kCarried) {
    store(reinterpret_cast<uint2*>(own_at(kOwnCAt, row, local)), pack(c));
    if (args.saved_c != nullptr) *reinterpret_cast<uint2*>(args.saved_c + at) = pack(c);
  }
  return shown;
}

// What stands between the exchange A of the step before and the product: h where the cell is
// normalized, and zeros in the rows that a reset clears.
inline void begin(const Arguments& args, const Place& place, Step before) {
  constexpr int kRounds = (kHidden / 4 + 31) / 32;
  const bool normed = kHasCell && args.cell_norm != kNone;
  if (!normed && args.resets == nullptr) return;
  for (int item = place.warp; item < kRows * kRounds; item += kThreads / 32) {
    const int row = item % kRows, unit = 4 * (item / kRows * 32 + static_cast<int>(place.lane));
    const bool shown = normed && row < before.live;
    const bool cleared = load(shared_at<int>(kClearedAt) + row) != 0;
    if (!shown && !cleared) continue;
    Norm norm = {0, 0};
    if (shown) norm = combined<32>(args, kCellStatisticsAt, 0, row, 8);
    if (unit >= kHidden) continue;
    uint2 h = {0, 0};
    if (shown) h = show_cell(args, place, before.row + row, row, unit, norm);
    if (cleared) h = {0, 0};
    store(reinterpret_cast<uint2*>(hidden_at(row, unit)), h);
    const int local = unit - static_cast<int>(place.rank) * kUnits;
    if (kHasCell && cleared && 0 <= local && local < kUnits)
      store(reinterpret_cast<uint2*>(own_at(kOwnCAt, row, local)), uint2{0, 0});
  }
}

// Of row lane/4 of an eight in each slot, the 8 features from 8·(lane%4) on of 32: mma's k in
// another order than the ISA's, the same for weights and h, so that a lane's share of two steps is
// together.
using Fragments = uint4[kSlots];

inline void load_weights(const Arguments& args, const Place& place,
                                    Fragments (&kept)[kRegisterPairs + 1]) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int k = (place.split * kPairs + pair) * 32 + 8 * (place.lane % 4);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      uint4 w = {0, 0, 0, 0};
      if (place.active() && k < kHidden)
        w = *reinterpret_cast<const uint4*>(
            args.weight_hh + static_cast<long long>(place.feature(slot)) * kHidden + k);
      if (pair < kRegisterPairs)
        kept[pair][slot] = w;
      else
        store(shared_at<uint4>(kWeightsAt) +
                  ((place.warp * kSharedPairs + pair - kRegisterPairs) * kSlots + slot) * 32 +
                  place.lane,
              w);
    }
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
      const uint4 zero = {0, 0, 0, 0};
      const uint4 low = w[2 * i], high = 2 * i + 1 < kSlots ? w[(2 * i + 1) % kSlots] : zero;
      mma(sums[tile][i], {low.x, high.x, low.y, high.y}, {h.x, h.y});
      mma(sums[tile][i], {low.z, high.z, low.w, high.w}, {h.z, h.w});
    }
  }
}

// W_hh·hᵀ of the warp's units, for the tiles that it goes on with.
using Sums = float[kSlots][2];

__forceinline__ void product(const Place& place,
                                        const Fragments (&kept)[kRegisterPairs + 1],
                                        Sums (&result)[kWarpTiles]) {
  float sums[kTiles][kProducts][4] = {};
  if (place.active()) {
#pragma unroll
    for (int pair = 0; pair < kRegisterPairs; ++pair) multiply(place, pair, kept[pair], sums);
#pragma unroll 4
    for (int pair = 0; pair < kSharedPairs; ++pair) {
      Fragments w;
      for (int slot = 0; slot < kSlots; ++slot)
        w[slot] = load(shared_at<uint4>(kWeightsAt) +
                       ((place.warp * kSharedPairs + pair) * kSlots + slot) * 32 + place.lane);
      multiply(place, kRegisterPairs + pair, w, sums);
    }
  }
  const auto at = [&](int tile, int split, int i) {
    const int warp = (tile * kUnitWarps + place.unit_warp) * kKSplit + split;
    return shared_at<float4>(kSumsAt) + (warp * kProducts + i) * 32 + place.lane;
  };
  if (kKSplit > 1) {
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
    const int tile = kKSplit * own + place.split;
    if (kKSplit > 1 && tile >= kTiles) continue;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      float total[4] = {};
      if (kKSplit == 1)
        for (int j = 0; j < 4; ++j) total[j] = sums[own][i][j];
      else
        for (int split = 0; split < kKSplit; ++split) {
          const float4 s = load(at(tile, split, i));
          total[0] += s.x, total[1] += s.y, total[2] += s.z, total[3] += s.w;
        }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (2 * i + j / 2 < kSlots) result[own][2 * i + j / 2][j % 2] = total[j];
    }
  }
}

using Inputs = Half[kSlots][2];

inline void load_inputs(const Arguments& args, const Place& place, Step step, int tile,
                                   Inputs& x) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 8 * tile + 2 * (place.lane % 4) + e;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      x[slot][e] = row < step.live
                       ? args.x[(step.row + row) * kGates * kHidden + place.feature(slot)]
                       : Half{0};
  }
}

// Adds to the product what belongs inside the norm, and sends its statistics.
inline void measure(const Arguments& args, const Place& place, int tile, const Inputs& x,
                               Sums& a) {
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
inline void normalize(const Arguments& args, const Place& place, Step step, int tile,
                                 Sums& a) {
  const unsigned quad = place.lane % 4;
  for (int group = 0; group < group_count(args); ++group) {
    const Group gates = group_at(args, group);
    const Norm of =
        combined<4>(args, kStatisticsAt, group, 8 * tile + static_cast<int>(place.lane) / 4,
                    kCell == kRnn ? 16 : 8 * gates.gates());
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned holder = 8 * quad + 4 * e;
      const float mean = shuffle(of.mean, holder), rstd = shuffle(of.rstd, holder);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        if (gates.has(slot)) a[slot][e] = (a[slot][e] - mean) * rstd;
      const int row = 8 * tile + 2 * quad + e;
      if (args.stats != nullptr && place.unit == 0 && place.lane < 4 && row < step.live)
        args.stats[(step.row + row) * args.stats_width + args.stats_first + group] = rstd;
    }
  }
  if (args.normalized == nullptr) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 8 * tile + 2 * quad + e;
    if (row >= step.live) continue;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      args.normalized[(step.row + row) * kGates * kHidden + place.feature(slot)] =
          narrow(a[slot][e]);
  }
}

// The gates of one tile and its new state, sent to all blocks.
inline void step_tile(const Arguments& args, const Place& place, Step step, int tile,
                                 const Inputs& x, Sums& a) {
  normalize(args, place, step, tile, a);
  const bool normed = kHasCell && args.cell_norm != kNone;
  float cell[1][2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 8 * tile + 2 * (place.lane % 4) + e;
    // Of x and of both; the candidate of a GRU has x and h apart.
    float of_x[kSlots], gate[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float4 vectors = load(vectors_at(place, slot));
      of_x[slot] = fmaf(args.summed ? a[slot][e] : widen(x[slot][e]), vectors.x, vectors.z);
      gate[slot] = args.summed ? of_x[slot] : fmaf(a[slot][e], vectors.y, of_x[slot]);
    }
    if constexpr (kCell == kLstm) {
      Half* own = own_at(kOwnCAt, row, place.local(0));
      const float entering = sigmoid(gate[0]) * hyperbolic_tangent(gate[2]);
      const float c = rounded(fmaf(sigmoid(gate[1]), widen(load(own)), entering));
      const float open = sigmoid(gate[3]);
      cell[0][e] = c;
      if (row >= step.live) continue;
      store(own, narrow(c));
      if (normed)
        store(shared_at<float>(kOwnOpenAt) + row * kUnits + place.local(0), open);
      else
        store(own_at(kOwnHAt, row, place.local(0)), narrow(open * hyperbolic_tangent(c)));
    } else if constexpr (kCell == kGru) {
      const float h = widen(load(hidden_at(row, place.unit_of(0))));
      float reset_of = gate[2];
      if (!args.summed)
        reset_of = fmaf(a[2][e], load(vectors_at(place, 2)).y,
                        load(shared_at<float>(kBiasHnAt) + place.local(0)));
      const float n =
          hyperbolic_tangent(fmaf(sigmoid(gate[0]), reset_of, args.summed ? 0.0F : of_x[2]));
      store(own_at(kOwnHAt, row, place.local(0)), narrow(fmaf(sigmoid(gate[1]), h - n, n)));
    } else {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float h =
            args.relu ? (gate[slot] < 0 ? 0.0F : gate[slot]) : hyperbolic_tangent(gate[slot]);
        store(own_at(kOwnHAt, row, place.local(slot)), narrow(h));
      }
    }
  }
  sync_warp();
  const long long data = step.row * kHidden;
  if (kHasCell && args.cell_norm != kCarried)
    keep_rows(place, kOwnCAt, args.saved_c == nullptr ? nullptr : args.saved_c + data, tile,
              step.live);
  if (normed) {
    send_rows(place, own_at(kOwnCAt, 0, 0), hidden_at(0, 0), kStride, tile, step.live);
    send_rows(place, shared_at<float>(kOwnOpenAt), shared_at<float>(kOpenAt), kHidden, tile,
              step.live);
    send_statistics(args, place, kCellStatisticsAt, 0, {0, 1}, tile, cell);
  } else {
    send_rows(place, own_at(kOwnHAt, 0, 0), hidden_at(0, 0), kStride, tile, step.live);
    keep_rows(place, kOwnHAt, args.output + data, tile, step.live);
  }
}

// Barriers, parameters and initial states, up to where the cluster meets for the first time.
inline void prepare(const Arguments& args, const Place& place, Step step) {
  const int unit = static_cast<int>(place.rank) * kUnits;
  if (threadIdx.x == 0) {
    for (int which = 0; which < 2; ++which)
      barrier_init(shared_at<unsigned long long>(0) + which, kBlocks);
    barrier_publish();
  }
  for (int i = threadIdx.x; i < kGates * kUnits; i += kThreads) {
    const int slot = i / 8 % kSlots;
    const int of = unit + i / 8 / kSlots * kWarpUnits + (kCell == kRnn ? 8 * slot : 0) + i % 8;
    const int feature = (kCell == kRnn ? 0 : slot * kHidden) + of;
    float4 v = {1, 1, 0, 0};
    if (of < kHidden)
      v = {at_or(args.gain_ih, feature, 1), at_or(args.gain_hh, feature, 1),
           at_or(args.bias, feature, 0), at_or(args.bias_hh, feature, 0)};
    store(shared_at<float4>(kVectorsAt) + i, v);
  }
  if (kCell == kGru)
    for (int i = threadIdx.x; i < kUnits; i += kThreads)
      store(shared_at<float>(kBiasHnAt) + i,
            unit + i < kHidden ? at_or(args.bias_hn, unit + i, 0) : 0.0F);
  if (kHasCell)
    for (int i = threadIdx.x; i < kHidden; i += kThreads)
      store(shared_at<float2>(kCellVectorsAt) + i,
            float2{at_or(args.gain_cell, i, 1), at_or(args.bias_cell, i, 0)});
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
    store(shared_at<int>(kClearedAt) + row,
          static_cast<int>(args.resets != nullptr && !args.reverse && row < step.live &&
                           args.resets[step.row + row] != 0));
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
  Place place;
  place.rank = cluster_rank(), place.warp = warp_index(), place.lane = lane_index();
  place.unit_warp = place.warp / kKSplit, place.split = place.warp % kKSplit;
  place.unit = static_cast<int>(place.rank) * kUnits + place.unit_warp * kWarpUnits;
  place.first = static_cast<int>(blockIdx.x / kBlocks) * kRows;
  Fragments weights[kRegisterPairs + 1];
  load_weights(args, place, weights);
  // Read two steps ahead, for what a step needs of the next one is read in it.
  Step before = {0, 0}, step = step_at(args, 0, place.first), next = step_at(args, 1, place.first);
  prepare(args, place, step);
  unsigned parity = 0;
  for (int index = 0; index < args.steps; ++index) {
    const Step later = step_at(args, index + 2, place.first);
    if (step.live > 0) {
      begin(args, place, before);
      sync_block();
      Inputs x[kWarpTiles];
      Sums a[kWarpTiles];
      const auto each_tile = [&](auto body) {
#pragma unroll
        for (int own = 0; own < kWarpTiles; ++own) {
          const int tile = kKSplit * own + place.split;
          if (place.active() && tile < kTiles) body(tile, x[own], a[own]);
        }
      };
      each_tile([&](int tile, Inputs& of_x, Sums&) { load_inputs(args, place, step, tile, of_x); });
      const Step parted = args.reverse ? step : next;  // its resets come before the next step
      const int row = threadIdx.x;
      const bool cleared = args.resets != nullptr && index + 1 < args.steps && row < parted.live &&
                           args.resets[parted.row + row] != 0;
      product(place, weights, a);
      each_tile([&](int tile, Inputs& of_x, Sums& of) { measure(args, place, tile, of_x, of); });
      exchange(args, 0, parity);
      if (row < kRows) store(shared_at<int>(kClearedAt) + row, static_cast<int>(cleared));
      each_tile(
          [&](int tile, Inputs& of_x, Sums& of) { step_tile(args, place, step, tile, of_x, of); });
      exchange(args, 1, parity);
      before = step, parity ^= 1;
    }
    step = next, next = later;
  }
  begin(args, place, before);
  sync_block();
  finish(args, place);
}
