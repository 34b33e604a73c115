#include "team.hpp"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace layernorm {
namespace {

// Spins for a short while and then lets others run: there may be more threads than processors.
class Patience {
 public:
  void pause() {
    if (++spins_ > 2000) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  int spins_ = 0;
};

constexpr int kClosed = 1 << 20;  // more members than there can be

}  // namespace

int Team::join() {
  const int rank = joined_.fetch_add(1, std::memory_order_acq_rel);
  if (rank >= kClosed) return -1;
  if (rank == 0) {
    const auto begin = std::chrono::steady_clock::now();
    Patience patience;
    while (joined_.load(std::memory_order_acquire) < most_ &&
           std::chrono::steady_clock::now() - begin < patience_)
      patience.pause();
    size_ = joined_.fetch_add(kClosed, std::memory_order_acq_rel);
    closed_.store(true, std::memory_order_release);
    return 0;
  }
  Patience patience;
  while (!closed_.load(std::memory_order_acquire)) patience.pause();
  return rank;
}

void Team::meet() {
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (waiting_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    waiting_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  Patience patience;
  while (round_.load(std::memory_order_acquire) == round) patience.pause();
}

}  // namespace layernorm
