// What blocks of a cluster tell each other: the barrier with its watchdog, statistics of rows,
// states. Of persistent.cu, which tells the whole.
#pragma once

namespace layernorm {

// Every block waits here until all of the cluster have arrived; what each wrote before is then seen
// by all. The block's own barrier orders its threads' writes before the arrivals, which release
// them. `phase` counts the exchanges.
inline void exchange(const Arguments& args, unsigned& phase) {
  auto* barrier = shared_at<unsigned long long>(0);
  const unsigned parity = phase++ % 2;
  sync_block();
  if (threadIdx.x < kBlocks) barrier_arrive(barrier, threadIdx.x);
  if (!barrier_try_wait(barrier, parity)) {
    const unsigned long long begin = nanoseconds();
    while (!barrier_try_wait(barrier, parity)) {
      if (nanoseconds() - begin < static_cast<unsigned long long>(args.time_limit)) continue;
      if (args.error != nullptr) *args.error = phase;
      trap();
    }
  }
  sync_warp();  // whose lanes may have waited for different times, and mma wants them together
}

// Over the eight lanes that have the same rows; over the four that have the same unit.
inline float sum_units(float a) {
  for (unsigned mask = 4; mask < 32; mask *= 2) a += shuffle_xor(a, mask);
  return a;
}
inline float sum_quad(float a) {
  for (unsigned mask = 1; mask < 4; mask *= 2) a += shuffle_xor(a, mask);
  return a;
}

// The gates that share a group's statistics.
struct Group {
  int begin, end;
  bool has(int slot) const { return kCell == kRnn || (begin <= slot && slot < end); }
  // The features that a warp has of it, in eights, and one over their number.
  int eights() const { return kCell == kRnn ? 2 : end - begin; }
  float share() const {
    const int n = eights();
    return n == 1 ? 1.0F / 8 : n == 2 ? 1.0F / 16 : n == 3 ? 1.0F / 24 : 1.0F / 32;
  }
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
  float mean[2], squares[2];
  for (int e = 0; e < 2; ++e) {
    float sum = 0, square = 0;
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (gates.has(slot)) sum += a[slot][e];
    mean[e] = args.rms ? 0.0F : sum_units(sum) * gates.share();
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (gates.has(slot)) square = fmaf(a[slot][e] - mean[e], a[slot][e] - mean[e], square);
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
constexpr float kLargest = 3.402823466e38F;
// Means and rstds of this thread's two rows, from all parts by four lanes a row. All parts are of
// as many features, so that the means' mean is the mean; the order is fixed.
inline void combine(const Arguments& args, const Place& place, int at, int group, Group gates,
                    int tile, Norm (&norms)[2]) {
  const int row = 8 * tile + static_cast<int>(place.lane) / 4;
  const int begin = static_cast<int>(place.lane) % 4;
  const float count = 8 * gates.eights();
  float means = 0, squares = 0;
  for (int part = begin; part < kParts; part += 4)
    means += load(statistics_at(at, group, row, part)).x;
  const float mean = sum_quad(means) * (1.0F / kParts);
  for (int part = begin; part < kParts; part += 4) {
    const float2 of = load(statistics_at(at, group, row, part));
    squares += fmaf(count * (of.x - mean), of.x - mean, of.y);
  }
  const float variance = sum_quad(squares) * (gates.share() * (1.0F / kParts));
  // Squares that float32 cannot hold make NaN, not a row of zeros.
  const float rstd =
      variance <= kLargest ? reciprocal_root(variance + args.eps) : variance - variance;
  for (unsigned e = 0; e < 2; ++e) {
    const unsigned holder = 8 * (place.lane % 4) + 4 * e;
    norms[e] = {shuffle(mean, holder), shuffle(rstd, holder)};
  }
}

// A tile's 8 rows of the warp's h, from where they are gathered to all blocks; live rows only.
inline void send_rows(const Place& place, int tile, int live) {
  constexpr int kVectors = kWarpUnits / 8;
  const int local = place.unit - static_cast<int>(place.rank) * kUnits;
  for (unsigned i = place.lane; i < 8 * kVectors * kBlocks; i += 32) {
    const int row = 8 * tile + i % 8, unit = 8 * (i / 8 % kVectors);
    if (row >= live) continue;
    const uint4 h = load(reinterpret_cast<const uint4*>(own_at(kOwnHAt, row, local + unit)));
    remote_store(reinterpret_cast<uint4*>(hidden_at(row, place.unit + unit)),
                 (i / 8 / kVectors + place.rank) % kBlocks, h);
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

}  // namespace layernorm
