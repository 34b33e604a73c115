// What the gates of both directions are made of: nonlinearities, gains and biases. Of forward.cu
// and backward.cu, which tell the whole.
#pragma once

namespace layernorm {

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

using Sums = float[kSlots][2];  // of a warp's units and a tile, one thread's
using Inputs = Half[kSlots][2];

// The gains and biases of the block's units to shared memory.
inline void load_vectors(const Layer& layer, const Place& place) {
  const int unit = static_cast<int>(place.rank) * kUnits;
  for (int i = threadIdx.x; i < kGates * kUnits; i += kThreads) {
    const int slot = i / 8 % kSlots;
    const int of = unit + i / 8 / kSlots * kWarpUnits + (kCell == kRnn ? 8 * slot : 0) + i % 8;
    const int feature = (kCell == kRnn ? 0 : slot * kHidden) + of;
    float4 v = {1, 1, 0, 0};
    if (of < kHidden)
      v = {at_or(layer.gain_ih, feature, 1), at_or(layer.gain_hh, feature, 1),
           at_or(layer.bias, feature, 0), at_or(layer.bias_hh, feature, 0)};
    store(shared_at<float4>(kVectorsAt) + i, v);
  }
  if (kCell == kGru)
    for (int i = threadIdx.x; i < kUnits; i += kThreads)
      store(shared_at<float>(kBiasHnAt) + i,
            unit + i < kHidden ? at_or(layer.bias_hn, unit + i, 0) : 0.0F);
  if (kHasCell)
    for (int i = threadIdx.x; i < kUnits; i += kThreads) {
      float2 v = {1, 0};
      if (unit + i < kHidden)
        v = {at_or(layer.gain_cell, unit + i, 1), at_or(layer.bias_cell, unit + i, 0)};
      store(shared_at<float2>(kCellVectorsAt) + i, v);
    }
}

// What a gate has of x and of h, both normalized; where inputs are summed, x is their sum and all.
struct Gate {
  float of_x, whole;
};
inline Gate gate_of(const Layer& layer, const Place& place, int slot, float x, float h) {
  const float4 vectors = load(vectors_at(place, slot));
  const float of_x = fmaf(x, vectors.x, vectors.z);
  return {of_x, layer.summed ? of_x : fmaf(h, vectors.y, of_x)};
}
// What the reset gate of a GRU multiplies in the candidate.
inline float reset_part(const Layer& layer, const Place& place, Gate candidate, float h) {
  if (layer.summed) return candidate.whole;
  return fmaf(h, load(vectors_at(place, 2)).y, load(shared_at<float>(kBiasHnAt) + place.local(0)));
}
inline float candidate_of(const Layer& layer, Gate candidate, float reset, float part) {
  return hyperbolic_tangent(fmaf(reset, part, layer.summed ? 0.0F : candidate.of_x));
}

}  // namespace layernorm
