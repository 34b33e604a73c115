// The persistent kernel of a plan's direction for a CPU, as a shared library that
// tests/gpu/persistent/test_persistent.py and tests/gpu/persistent/test_persistent_backward.py
// call.
#include <cstdio>

#include "device.hpp"
// Behind it, in this order.
#include "layout.cuh"
//
#include "exchange.cuh"
//
#include "gates.cuh"
//
#if LAYERNORM_BACKWARD
#include "backward.cuh"
//
#include "backward_cells.cuh"
//
#include "backward.cu"
#else
#include "forward.cuh"
//
#include "cells.cuh"
//
#include "forward.cu"
#endif

extern "C" {

int argument_bytes() { return sizeof(layernorm::Arguments); }

// Runs so many clusters; the error, or null. `dropped` is the number of an arrival that gets lost.
const char* emulate(const layernorm::Arguments* args, int clusters, uint64_t seed, int races,
                    int dropped) {
  static std::string error;
  const size_t bytes =
      layernorm::kStatisticsAt + 8 * layernorm::kStatistics * layernorm::group_count(*args);
  for (int cluster = 0; cluster < clusters; ++cluster) {
    emulator::Machine machine(layernorm::kBlocks, layernorm::kThreads, bytes, seed + cluster, races,
                              dropped);
    error = machine.run([&] {
      block_index = {cluster * layernorm::kBlocks + layernorm::cluster_rank()};
      layernorm_persistent(*args);
    });
    if (!error.empty()) return error.c_str();
  }
  return nullptr;
}

// c += a·b by mma; a [16, 16], b [16, 8] and c [16, 8] by rows, in the type of the elements.
void multiply(const unsigned short* a, const unsigned short* b, float* c) {
  emulator::Machine machine(1, 32, 16, 1, false, -1);
  machine.run([&] {
    const unsigned lane = layernorm::lane_index(), group = lane / 4, at = 2 * (lane % 4);
    const auto two = [](unsigned low, unsigned high) { return low | high << 16; };
    unsigned words[4], others[2];
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned short* from = a + (group + 8 * (i % 2)) * 16 + at + 8 * (i / 2);
      words[i] = two(from[0], from[1]);
    }
    for (unsigned i = 0; i < 2; ++i)
      others[i] = two(b[(at + 8 * i) * 8 + group], b[(at + 8 * i + 1) * 8 + group]);
    float own[4];
    const auto of = [&](unsigned i) { return c + (group + 8 * (i / 2)) * 8 + at + i % 2; };
    for (unsigned i = 0; i < 4; ++i) own[i] = *of(i);
    layernorm::mma(own, words, others);
    for (unsigned i = 0; i < 4; ++i) *of(i) = own[i];
  });
}

float widened(unsigned short a) { return layernorm::widen(a); }
unsigned short narrowed(float a) { return layernorm::narrow(a); }
float tangent(float a) { return layernorm::hyperbolic_tangent(a); }
float logistic(float a) { return layernorm::sigmoid(a); }

}  // extern "C"
