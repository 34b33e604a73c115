// How long one all-to-all exchange of a thread block cluster takes, by protocol: what a step of the
// persistent recurrent kernels costs before anything else of them is tuned.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a exchange_bench.cu -o exchange_bench
//   && ./exchange_bench
// Prints a line of JSON for each protocol, number of blocks, and number of stores to global memory
// that are outstanding: ns an exchange, the clusters that the device holds, and whether the sums
// are right.
//
//   release: st.shared::cluster, bar.sync, mbarrier.arrive.release.cluster, as exchange.cuh does
//   it.
//
//   async: st.async with mbarrier::complete_tx; no fence, no bar.sync.
//
//   cluster: st.shared::cluster, barrier.cluster.arrive.release and wait.acquire.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostBlocks = 16;

__device__ unsigned sa(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
__device__ unsigned peer(unsigned address, unsigned rank) {
  unsigned r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
__device__ void wait(unsigned barrier, unsigned parity, bool cluster_scope) {
  unsigned done = 0;
  while (!done) {
    if (cluster_scope)
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0,1,0,p;}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    else
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p;}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
  }
}

// Every warp tells every block a pair of floats for each of 8 rows; then every lane adds up one
// row's pairs.
template <int kMode>
__global__ void __launch_bounds__(kThreads, 1)
    bench(float4* out, float* sums, int iterations, int stores, int blocks) {
  __shared__ alignas(16) float2 buffer[2][kMostBlocks * kWarps][8];
  __shared__ alignas(8) unsigned long long barrier[2];
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sa(&barrier[b])),
                   "r"(kMode == 1 ? 1 : blocks));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
  float value = 1.0F;
  for (int i = 0; i < iterations; ++i) {
    const int b = i & 1;
    const unsigned parity = (i >> 1) & 1;
    // What a step keeps for backward: stores to global memory that are still on their way.
    for (int s = 0; s < stores; ++s)
      out[(static_cast<long long>(i % 64) * stores + s) * gridDim.x * kThreads +
          blockIdx.x * kThreads + threadIdx.x] = float4{value, value, value, value};
    if (kMode == 1 && threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sa(&barrier[b])),
                   "r"(blocks * kWarps * 8 * 8)
                   : "memory");
    const unsigned row = lane % 8;
    const unsigned at = sa(&buffer[b][rank * kWarps + warp][row]);
    for (unsigned p = lane / 8; p < static_cast<unsigned>(blocks); p += 4) {
      const unsigned to = (p + rank) % blocks;
      if (kMode == 1)
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
            "[%3];" ::"r"(peer(at, to)),
            "f"(value), "f"(1.0F), "r"(peer(sa(&barrier[b]), to))
            : "memory");
      else
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(peer(at, to)), "f"(value),
                     "f"(1.0F)
                     : "memory");
    }
    if (kMode == 0) {
      __syncthreads();
      if (threadIdx.x < blocks)
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         peer(sa(&barrier[b]), threadIdx.x))
                     : "memory");
      wait(sa(&barrier[b]), parity, true);
    } else if (kMode == 1) {
      wait(sa(&barrier[b]), parity, false);
    } else {
      asm volatile(
          "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
              : "memory");
    }
    __syncwarp();
    float sum = 0, count = 0;
    for (int part = lane / 8; part < blocks * kWarps; part += 4)
      sum += buffer[b][part][row].x, count += buffer[b][part][row].y;
    for (int m = 8; m < 32; m *= 2)
      sum += __shfl_xor_sync(~0U, sum, m), count += __shfl_xor_sync(~0U, count, m);
    value = sum / count;  // stays 1, and every exchange waits for the one before
  }
  if (lane == 0) sums[blockIdx.x * kWarps + warp] = value;
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

#define CHECK(call)                                                   \
  do {                                                                \
    cudaError_t e = (call);                                           \
    if (e != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)); \
      return false;                                                   \
    }                                                                 \
  } while (0)

template <int kMode>
bool run(const char* name, int blocks, int stores, float4* out, float* sums) {
  const int iterations = 20000, clusters = 128 / blocks > 8 ? 8 : 128 / blocks;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  config.gridDim = {static_cast<unsigned>(clusters * blocks), 1, 1},
  config.blockDim = {kThreads, 1, 1};
  config.attrs = &attribute, config.numAttrs = 1;
  CHECK(cudaFuncSetAttribute(bench<kMode>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  int most = 0;
  CHECK(cudaOccupancyMaxActiveClusters(&most, bench<kMode>, &config));
  if (most == 0) {
    std::printf("{\"protocol\": \"%s\", \"blocks\": %d, \"clusters\": 0}\n", name, blocks);
    return true;
  }
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e30F;
  for (int round = 0; round < 5; ++round) {
    CHECK(cudaEventRecord(begin));
    CHECK(cudaLaunchKernelEx(&config, bench<kMode>, out, sums, iterations, stores, blocks));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (ms < best) best = ms;
  }
  float host[kWarps];
  CHECK(cudaMemcpy(host, sums, sizeof(host), cudaMemcpyDeviceToHost));
  bool right = true;
  for (float h : host) right = right && h == 1.0F;
  std::printf(
      "{\"protocol\": \"%s\", \"blocks\": %d, \"stores\": %d, \"ns\": %.1f, \"clusters\": %d, "
      "\"right\": %s}\n",
      name, blocks, stores, 1e6F * best / iterations, most, right ? "true" : "false");
  std::fflush(stdout);
  return true;
}

int main() {
  float4* out;
  float* sums;
  if (cudaMalloc(&out, size_t{64} * 4 * 128 * kThreads * sizeof(float4)) != cudaSuccess ||
      cudaMalloc(&sums, 128 * kWarps * sizeof(float)) != cudaSuccess)
    return 1;
  bool ok = true;
  for (int blocks : {2, 4, 8, 16})
    for (int stores : {0, 1, 4})
      ok = ok && run<0>("release", blocks, stores, out, sums) &&
           run<1>("async", blocks, stores, out, sums) &&
           run<2>("cluster", blocks, stores, out, sums);
  return ok ? 0 : 1;
}
