// What the forward kernel has for itself: constants, arguments, where things are in shared memory,
// and how states get from block to block. Of forward.cu, which tells the whole.
#pragma once

namespace layernorm {

// Two slots make the 16 rows of an mma, so that a thread holds all gates of its units.
constexpr int kProducts = (kSlots + 1) / 2;
// Pairs of k-steps, 32 features of h, of a warp; and those of them with weights in registers.
constexpr int kPairs = (kHidden + 32 * kSplit - 1) / (32 * kSplit);
constexpr int kRegisterPairs = LAYERNORM_REGISTER_PAIRS, kSharedPairs = kPairs - kRegisterPairs;
// A row of h begins half of the banks after the one before.
constexpr int kWidth = 32 * kSplit * kPairs;
constexpr int kStride = kWidth + (kWidth / 32 % 2 == 0 ? 32 : 0);
static_assert(0 <= kSharedPairs && kRegisterPairs >= 0);

// The statistics of the product, of as many groups as the variant has, come last.
constexpr int kHiddenAt = kDirectionAt;
constexpr int kWeightsAt = after(kHiddenAt, 2 * kRows * kStride);
constexpr int kSumsAt = after(kWeightsAt, 16 * kThreads * kSharedPairs * kSlots);
constexpr int kOwnHAt = after(kSumsAt, kSplit == 1 ? 0 : 16 * kTiles * kThreads * kProducts);
constexpr int kOwnCAt = after(kOwnHAt, 2 * kRows * kUnits);
constexpr int kCellStatisticsAt = after(kOwnCAt, kHasCell ? 2 * kRows* kUnits : 0);
constexpr int kClearedAt = after(kCellStatisticsAt, kHasCell ? 8 * kStatistics : 0);
constexpr int kStatisticsAt = after(kClearedAt, 4 * kRows);
static_assert(kStatisticsAt + 8 * kStatistics == LAYERNORM_SHARED_BYTES, "as the plan has it");

struct Arguments : Layer {
  const Half* h0;
  Half *output, *hn, *cn;
  Half* normalized;  // [rows of all steps, G·H]; may be x; or null
};

inline Half* hidden_at(int row, int unit) {
  return shared_at<Half>(kHiddenAt) + row * kStride + unit;
}
inline Half* own_at(int at, int row, int local) {
  return shared_at<Half>(at) + row * kUnits + local;
}
inline uint4* weights_at(const Place& place, int pair, int slot) {
  const int block = (place.warp * kSharedPairs + pair - kRegisterPairs) * kSlots + slot;
  return shared_at<uint4>(kWeightsAt) + block * 32 + place.lane;
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
