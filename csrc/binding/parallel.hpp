// Work shared among threads: PyTorch's own where it hands them out (PyTorch 2.10 and newer), else a
// few of this library's, which sleep between loops.
#pragma once

#include <cstdint>

namespace layernorm {

// Runs function(begin, end, context) for parts of [0, count), each of at least `grain`; 0 if all
// went well.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain,
                            void (*function)(int64_t, int64_t, void*), void* context);
// Writes how many threads share a loop; 0 if all went well.
using CountThreads = int (*)(uint32_t* count);

// PyTorch's threads from now on.
void use_threads_of(ParallelFor parallel_for, CountThreads count_threads);
// This library's, which share a loop that this thread begins by so many.
void use_own_threads(int count);

// By how many threads a loop begun here is shared: by one alone inside of a loop.
int thread_count();

void run_parallel(int64_t count, int64_t grain, void (*function)(int64_t, int64_t, void*),
                  void* context);

// Calls function(begin, end) for parts of [0, count), each of at least `grain`.
template <typename Function>
void in_parallel_parts(int64_t count, int64_t grain, const Function& function) {
  if (count <= grain) {
    if (count > 0) function(int64_t{0}, count);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Function*>(context))(begin, end);
  };
  run_parallel(count, grain, call, const_cast<Function*>(&function));
}

// How many elements are worth a second thread, as in PyTorch: 32,768 take about 4 us.
inline constexpr int64_t kGrain = 32768;

// Likewise; each of the count takes so many elements.
template <typename Function>
void in_parallel(int64_t count, int64_t elements, const Function& function) {
  in_parallel_parts(count, 1 + kGrain / (elements + 1), function);
}

}  // namespace layernorm
