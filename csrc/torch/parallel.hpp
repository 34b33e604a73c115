// Work shared among PyTorch's own threads.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace layernorm {

// Calls function(begin, end) for parts of [0, count), each of at least `grain`. Not
// at::parallel_for, which would be compiled here with a pool of its own.
template <typename Function>
void in_parallel_parts(int64_t count, int64_t grain, const Function& function) {
  if (count <= grain) {
    if (count > 0) function(int64_t{0}, count);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Function*>(context))(begin, end);
  };
  TORCH_CHECK(torch_parallel_for(0, count, grain, call, const_cast<Function*>(&function)) == 0,
              "layernorm: PyTorch could not run a parallel loop");
}

// How many elements are worth a second thread: 16,384 take about 2 us.
inline constexpr int64_t kGrain = 16384;

// Likewise; each of the count takes so many elements.
template <typename Function>
void in_parallel(int64_t count, int64_t elements, const Function& function) {
  in_parallel_parts(count, 1 + kGrain / (elements + 1), function);
}

}  // namespace layernorm
