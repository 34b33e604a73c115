// The names of src/layernorm/gpu/persistent/device.cuh for a CPU, where forward.cu then runs in the
// threads of a Machine. The fragments of mma are those of the PTX ISA.
#pragma once

#include <bit>
#include <cmath>

#include "machine.hpp"

#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index block_index;
#define blockIdx block_index
#define threadIdx (Index{emulator::machine().running().thread})

namespace layernorm {

using Half = unsigned short;
using emulator::machine;

inline unsigned lane_index() { return threadIdx.x % 32; }
inline unsigned warp_index() { return threadIdx.x / 32; }
inline unsigned cluster_rank() { return machine().running().rank; }
inline char* shared_memory() { return reinterpret_cast<char*>(machine().block().memory.data()); }

template <typename V>
inline V load(const V* p) {
  machine().access(cluster_rank(), p, sizeof(V), false);
  return *p;
}
template <typename V>
inline void store(V* p, V value) {
  machine().access(cluster_rank(), p, sizeof(V), true);
  *p = value;
}
template <typename V>
inline void remote_store(V* p, unsigned rank, V value) {
  void* to = machine().remote(p, rank, sizeof(V));
  machine().access(rank, to, sizeof(V), true);
  std::memcpy(to, &value, sizeof(V));
}

inline void barrier_init(unsigned long long* barrier, unsigned count) {
  store(barrier, static_cast<unsigned long long>(machine().make_barrier(count)));
}
inline void barrier_publish() {}
inline void barrier_arrive(unsigned long long* barrier, unsigned rank) {
  uint64_t number;
  const void* from = machine().remote(barrier, rank, sizeof(number));
  machine().access(rank, from, sizeof(number), false);  // it must have been made before
  std::memcpy(&number, from, sizeof(number));
  machine().arrive(number);
}
inline bool barrier_try_wait(unsigned long long* barrier, unsigned parity) {
  return machine().try_wait(load(barrier), parity);
}
inline void cluster_sync() { machine().meet(machine().everyone(), true); }
inline unsigned long long nanoseconds() { return machine().time(); }
inline void sync_block() { machine().meet(machine().block().meeting, true); }
inline void sync_warp() { machine().meet(machine().warp().meeting, true); }
[[noreturn]] inline void trap() { machine().fail("trap"); }

inline float shuffle(float a, unsigned lane) {
  auto& warp = machine().warp();
  auto& words = warp.words[warp.meeting.generation % 2];
  words[lane_index()][0] = std::bit_cast<unsigned>(a);
  machine().meet(warp.meeting, false);
  return std::bit_cast<float>(words[lane][0]);
}
inline float shuffle_xor(float a, unsigned mask) { return shuffle(a, lane_index() ^ mask); }

inline float widen(Half a) {
#if LAYERNORM_FLOAT16
  const int exponent = a >> 10 & 31, fraction = a & 1023;
  float wide = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? std::ldexp(1024.0F + fraction, exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return a >> 15 ? -wide : wide;
#else
  return std::bit_cast<float>(static_cast<unsigned>(a) << 16);
#endif
}
inline Half narrow(float a) {
  const auto bits = std::bit_cast<unsigned>(a);
#if LAYERNORM_FLOAT16
  const Half sign = bits >> 16 & 0x8000;
  const float size = std::fabs(a);
  if (std::isnan(a)) return 0x7FFF;
  if (size >= 65520) return sign | 0x7C00;
  // nearbyint takes the even one of two neighbours.
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -99, -14);
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<Half>(sign | (units + (static_cast<unsigned>(exponent + 14) << 10)));
#else
  if (std::isnan(a)) return 0x7FFF;
  return static_cast<Half>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
}

// The products of the warp's fragments, summed in double precision.
inline void mma_of_warp(uint32_t (&lanes)[32][10]) {
  double a[16][16], b[16][8], c[16][8];
  const auto half = [](uint32_t word, int which) {
    return static_cast<double>(widen(static_cast<Half>(word >> (16 * which))));
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int group = lane / 4, at = 2 * (lane % 4) + i;
      for (int upper = 0; upper < 2; ++upper) {
        for (int high = 0; high < 2; ++high)
          a[group + 8 * upper][at + 8 * high] = half(lanes[lane][upper + 2 * high], i);
        b[at + 8 * upper][group] = half(lanes[lane][4 + upper], i);
        c[group + 8 * upper][at] = std::bit_cast<float>(lanes[lane][6 + 2 * upper + i]);
      }
    }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      for (int upper = 0; upper < 2; ++upper)
        lanes[lane][6 + 2 * upper + i] = std::bit_cast<unsigned>(
            static_cast<float>(c[lane / 4 + 8 * upper][2 * (lane % 4) + i]));
}
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  auto& warp = machine().warp();
  auto& lanes = warp.words[warp.meeting.generation % 2];
  uint32_t* own = lanes[lane_index()];
  std::copy_n(a, 4, own);
  std::copy_n(b, 2, own + 4);
  for (int i = 0; i < 4; ++i) own[6 + i] = std::bit_cast<unsigned>(c[i]);
  machine().meet(warp.meeting, false, [&] { mma_of_warp(lanes); });
  for (int i = 0; i < 4; ++i) c[i] = std::bit_cast<float>(own[6 + i]);
}

inline float reciprocal(float a) { return 1 / a; }
inline float reciprocal_root(float a) { return 1 / std::sqrt(a); }

}  // namespace layernorm
