// Threads that work on the same rows and meet at barriers.
//
// A parallel loop promises that all its parts are run, not that they run at the same time: so a
// team is made of those threads that have come within a short while. The results do not depend on
// how many that are.
#pragma once

#include <atomic>

namespace layernorm {

class Team {
 public:
  explicit Team(int most) : most_(most) {}

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
  int size_ = 1;
  std::atomic<int> joined_{0};
  std::atomic<bool> closed_{false};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace layernorm
