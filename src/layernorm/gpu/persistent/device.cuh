// What forward.cu needs of a device, in PTX: NVRTC finds no CUDA headers where a user runs it.
// tests/gpu/persistent/emulator/device.hpp has the same names for a CPU.
//
// The instructions are those of the PTX ISA 8.0 (sm_90): mma.sync.m16n8k16, mapa,
// st.shared::cluster, mbarrier, fence.mbarrier_init and barrier.cluster.
#pragma once

namespace layernorm {

using Half = unsigned short;  // the bits of a bfloat16 or a float16

inline unsigned lane_index() { return threadIdx.x % 32; }
inline unsigned warp_index() { return threadIdx.x / 32; }
inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Shared memory is read and written by these alone, so that an emulation sees all of it.
template <typename V>
inline V load(const V* p) {
  return *p;
}
template <typename V>
inline void store(V* p, V value) {
  *p = value;
}

// To where `p`, in this block's shared memory, lies in that of a block of the cluster.
inline unsigned remote_address(const void* p, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
inline void remote_store(uint4* p, unsigned rank, uint4 v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(p, rank)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
inline void remote_store(float4* p, unsigned rank, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(p, rank)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
inline void remote_store(float2* p, unsigned rank, float2 v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(p, rank)), "f"(v.x),
               "f"(v.y)
               : "memory");
}

// A barrier in shared memory that `count` arrivals of a phase complete.
inline void barrier_init(unsigned long long* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// Makes barriers known to the cluster before it meets for the first time.
inline void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
inline void barrier_arrive(unsigned long long* barrier, unsigned rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   remote_address(barrier, rank))
               : "memory");
}
// Whether the phase of that parity is complete; may wait for a while.
inline bool barrier_try_wait(unsigned long long* barrier, unsigned parity) {
  unsigned done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

inline unsigned long long nanoseconds() {
  unsigned long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

inline void sync_block() { __syncthreads(); }
inline void sync_warp() { __syncwarp(); }
inline float shuffle_xor(float a, unsigned mask) { return __shfl_xor_sync(~0U, a, mask); }
inline float shuffle(float a, unsigned lane) { return __shfl_sync(~0U, a, lane); }
[[noreturn]] inline void trap() {
  __trap();
  __builtin_unreachable();
}

// c += a·b: a [16, 16] by rows, b [16, 8] by columns. Lane l holds of a the rows l/4 (words 0 and
// 2) and l/4 + 8 (1 and 3), of b the column l/4, and of both the k 2(l%4) + {0, 1} (words 0 and 1
// of a, 0 of b) and 8 more; of c the rows l/4 and l/4 + 8 and the columns 2(l%4) + {0, 1}.
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if LAYERNORM_FLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline float widen(Half a) {
#if LAYERNORM_FLOAT16
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(a));
  return wide;
#else
  return __uint_as_float(static_cast<unsigned>(a) << 16);
#endif
}
inline Half narrow(float a) {
  Half half;
#if LAYERNORM_FLOAT16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(a));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(a));
#endif
  return half;
}

// 1/a to one unit in the last place; 0 for infinity and where the result would be subnormal.
inline float reciprocal(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// 1/√a to two units in the last place.
inline float reciprocal_root(float a) {
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

}  // namespace layernorm
