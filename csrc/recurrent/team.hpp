// Threads that work on the same rows and meet at barriers.
//
// A parallel loop promises that all its parts are run, not that they run at the same time: so a
// team is made of those threads that have come within a short while. The results do not depend on
// how many that are.
#pragma once

#include <atomic>
#include <chrono>

namespace layernorm {

class Team {
 public:
  // Of at most so many threads, of which the first waits so long for the others.
  explicit Team(int most, std::chrono::microseconds patience = std::chrono::microseconds(100))
      : most_(most), patience_(patience) {}

  // The rank of the calling thread in the team, or -1 if the team has begun without it.
  int join();
  // Waits for all members; what they wrote before can be read after.
  void wait() {
    if (size_ > 1) meet();
  }
  [[nodiscard]] int size() const { return size_; }

 private:
  void meet();

  int most_;
  std::chrono::microseconds patience_;
  int size_ = 1;
  std::atomic<int> joined_{0};
  std::atomic<bool> closed_{false};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace layernorm
