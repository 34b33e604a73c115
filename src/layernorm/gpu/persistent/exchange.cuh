// What blocks of a cluster tell each other: the barrier with its watchdog, and sums over the
// features of rows. Of forward.cu and backward.cu, which tell the whole.
#pragma once

namespace layernorm {

// Every block waits here until all of the cluster have arrived; what each wrote before is then seen
// by all. The block's own barrier orders its threads' writes before the arrivals, which release
// them. `phase` counts the exchanges.
inline void exchange(const Layer& layer, unsigned& phase) {
  auto* barrier = shared_at<unsigned long long>(0);
  const unsigned parity = phase++ % 2;
  sync_block();
  if (threadIdx.x < kBlocks) barrier_arrive(barrier, threadIdx.x);
  if (!barrier_try_wait(barrier, parity)) {
    const unsigned long long begin = nanoseconds();
    while (!barrier_try_wait(barrier, parity)) {
      if (nanoseconds() - begin >= static_cast<unsigned long long>(layer.time_limit)) trap();
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
inline int group_count(const Layer& layer) {
  return layer.scope == kGate ? kGates : kCell == kGru && layer.scope == kMatrix ? 2 : 1;
}
inline int group_of(const Layer& layer, int slot) {
  if (layer.scope == kGate) return kCell == kRnn ? 0 : slot;
  return kCell == kGru && layer.scope == kMatrix ? slot / 2 : 0;
}
inline Group group_at(const Layer& layer, int group) {
  if (layer.scope == kGate) return {group, group + 1};
  if (kCell == kGru && layer.scope == kMatrix) return group == 0 ? Group{0, 2} : Group{2, 3};
  return {0, kGates};
}

// To all blocks: two sums over the warp's units, for the 8 rows of a tile; they are the same in all
// lanes that have a row.
inline void send_sums(const Place& place, int at, int group, int tile, const float (&first)[2],
                      const float (&second)[2]) {
  const unsigned row = place.lane % 8, holder = row / 2;
  const float2 even = {shuffle(first[0], holder), shuffle(second[0], holder)};
  const float2 odd = {shuffle(first[1], holder), shuffle(second[1], holder)};
  float2* to = statistics_at(at, group, 8 * tile + row, place.unit / kWarpUnits);
  for (unsigned peer = place.lane / 8; peer < kBlocks; peer += 4)
    remote_store(to, (peer + place.rank) % kBlocks, row % 2 == 0 ? even : odd);
}
// To this thread's two rows, two values each that the first of a row's four lanes has.
inline float2 of_row(const Place& place, int e, float first, float second) {
  const unsigned holder = 8 * (place.lane % 4) + 4 * e;
  return {shuffle(first, holder), shuffle(second, holder)};
}

// To all blocks: mean and Σ(a - mean)² of the warp's units. Where the norm is by the root mean
// square the mean is taken for 0, here and in all that follows.
template <int kCount>
inline void send_statistics(const Layer& layer, const Place& place, int at, int group, Group gates,
                            int tile, const float (&a)[kCount][2]) {
  float mean[2], squares[2];
  for (int e = 0; e < 2; ++e) {
    float sum = 0, square = 0;
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (gates.has(slot)) sum += a[slot][e];
    mean[e] = layer.rms ? 0.0F : sum_units(sum) * gates.share();
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (gates.has(slot)) square = fmaf(a[slot][e] - mean[e], a[slot][e] - mean[e], square);
    squares[e] = sum_units(square);
  }
  send_sums(place, at, group, tile, mean, squares);
}

struct Norm {
  float mean, rstd;
};
constexpr float kLargest = 3.402823466e38F;
// Means and rstds of this thread's two rows, from all parts by four lanes a row. All parts are of
// as many features, so that the means' mean is the mean; the order is fixed.
inline void combine(const Layer& layer, const Place& place, int at, int group, Group gates,
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
      variance <= kLargest ? reciprocal_root(variance + layer.eps) : variance - variance;
  for (int e = 0; e < 2; ++e) {
    const float2 norm = of_row(place, e, mean, rstd);
    norms[e] = {norm.x, norm.y};
  }
}

// What the statistics take from the gradient t of a normalized n: that of what was normalized is
// rstd·(t - one - n·along), with the means of t and of t·n, whose sums the blocks exchange.
struct Along {
  float one, n;
};
template <int kCount>
inline void send_gradients(const Place& place, int at, int group, Group gates, int tile,
                           const float (&t)[kCount][2], const float (&n)[kCount][2]) {
  float sums[2], products[2];
  for (int e = 0; e < 2; ++e) {
    float sum = 0, product = 0;
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot)
      if (gates.has(slot)) sum += t[slot][e], product = fmaf(t[slot][e], n[slot][e], product);
    sums[e] = sum_units(sum), products[e] = sum_units(product);
  }
  send_sums(place, at, group, tile, sums, products);
}
inline void combine_gradients(const Layer& layer, const Place& place, int at, int group,
                              Group gates, int tile, Along (&along)[2]) {
  const int row = 8 * tile + static_cast<int>(place.lane) / 4;
  float sum = 0, product = 0;
  for (int part = static_cast<int>(place.lane) % 4; part < kParts; part += 4) {
    const float2 of = load(statistics_at(at, group, row, part));
    sum += of.x, product += of.y;
  }
  const float share = gates.share() * (1.0F / kParts);
  sum = layer.rms ? 0.0F : sum_quad(sum) * share;
  product = sum_quad(product) * share;
  for (int e = 0; e < 2; ++e) {
    const float2 found = of_row(place, e, sum, product);
    along[e] = {found.x, found.y};
  }
}

}  // namespace layernorm
