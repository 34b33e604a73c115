// One cluster of thread blocks on a CPU: fibers that run in a random order, so that what is not
// synchronized shows; what they wait for; and whether their accesses to shared memory are ordered.
//
// Clusters never talk to each other, so one runs after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "fiber.hpp"

namespace emulator {

// How often each thread had synchronized when ... : what happened before what.
using Clock = std::vector<uint32_t>;
inline void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

struct Fiber {
  Context context;
  unsigned index, rank, thread;  // in the cluster; its block; in the block
  bool done;
  Clock clock;
};

// What all of some fibers reach before any goes on.
struct Meeting {
  unsigned expected = 0, arrived = 0, generation = 0;
  std::vector<Fiber*> waiting;
  Clock joined;
};

struct Warp {
  Meeting meeting;
  // What lanes show each other, by the parity of their meetings: a lane is at most one ahead.
  uint32_t words[2][32][10];
};

// The last accesses to two bytes of shared memory, by thread and its clock.
struct Access {
  uint32_t thread, clock;
};
struct Shadow {
  bool written = false;
  Access write{};
  std::vector<Access> reads;
};

struct Block {
  std::vector<std::byte> memory;
  std::vector<Shadow> shadow;
  std::vector<Warp> warps;
  Meeting meeting;
  unsigned running;  // threads
};

// An mbarrier of a block; the word in shared memory holds its number.
struct Barrier {
  unsigned rank, expected, pending, phase;
  Clock arriving, complete[2];
};
// An arrival on its way, which may take as long as it likes.
struct Arrival {
  uint64_t barrier;
  bool slow;
  Clock clock;
};

class Machine {
 public:
  Machine(unsigned blocks, unsigned threads, size_t shared_bytes, uint64_t seed, bool races,
          int dropped)
      : blocks_(blocks),
        fibers_(blocks * threads),
        random_(seed * 2 + 1),
        races_(races),
        dropped_(dropped) {
    for (auto& block : blocks_) {
      block.memory.assign(shared_bytes, std::byte{0xFF});  // NaN, whatever is read there
      if (races) block.shadow.resize(shared_bytes / 2);
      block.warps.resize(threads / 32);
      block.meeting.expected = block.running = threads;
      for (auto& warp : block.warps) warp.meeting.expected = 32;
    }
    all_.expected = blocks * threads;
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = i, fiber.rank = i / threads, fiber.thread = i % threads, fiber.done = false;
      if (races) fiber.clock.assign(fibers_.size(), 0), fiber.clock[i] = 1;
    }
  }

  // Runs `body` in every thread; the error, or nothing.
  std::string run(const std::function<void()>& body) {
    current_machine = this;
    body_ = body;
    for (Fiber& fiber : fibers_) {
      fiber.context.start([] { current_machine->enter(); });
      runnable_.push_back(&fiber);
    }
    size_t left = fibers_.size();
    while (left > 0 && error_.empty()) {
      if (!arrivals_.empty() && (runnable_.empty() || draw() % 16 == 0)) deliver();
      if (runnable_.empty()) {
        if (!arrivals_.empty()) continue;
        if (polling_.empty()) return "deadlock";
        time_ += 1'000'000'000;  // nobody but time can help them
        runnable_.swap(polling_);
      }
      running_ = pick();
      scheduler_.switch_to(running_->context);
      if (running_->done) --left, --blocks_[running_->rank].running;
    }
    if (error_.empty() && !arrivals_.empty()) return "a block has ended before all arrivals came";
    return error_;
  }

  Fiber& running() { return *running_; }
  Block& block() { return blocks_[running_->rank]; }
  Warp& warp() { return block().warps[running_->thread / 32]; }
  Meeting& everyone() { return all_; }
  uint64_t time() { return ++time_; }

  [[noreturn]] void fail(const std::string& error) {
    if (error_.empty())
      error_ = error + " (block " + std::to_string(running_->rank) + ", thread " +
               std::to_string(running_->thread) + ")";
    for (;;) running_->context.switch_to(scheduler_);
  }

  // `last` runs once, before anyone goes on. Only what orders memory accesses joins the clocks.
  void meet(Meeting& meeting, bool orders, const std::function<void()>& last = {}) {
    Fiber& fiber = *running_;
    if (races_ && orders) {
      if (meeting.joined.empty()) meeting.joined.assign(fibers_.size(), 0);
      join(meeting.joined, fiber.clock);
    }
    if (++meeting.arrived < meeting.expected) {
      meeting.waiting.push_back(&fiber);
      fiber.context.switch_to(scheduler_);
      return;
    }
    if (last) last();
    meeting.arrived = 0, ++meeting.generation;
    meeting.waiting.push_back(&fiber);
    for (Fiber* met : meeting.waiting) {
      if (races_ && orders) join(met->clock, meeting.joined), ++met->clock[met->index];
      runnable_.push_back(met);
    }
    meeting.waiting.clear(), meeting.joined.clear();
    fiber.context.switch_to(scheduler_);
  }

  uint64_t make_barrier(unsigned count) {
    barriers_.push_back(
        {running_->rank, count, count, 0, Clock(clocks()), {Clock(clocks()), Clock(clocks())}});
    return barriers_.size() - 1;
  }
  void arrive(uint64_t number) {
    if (dropped_-- == 0) return;
    at(number);
    arrivals_.push_back({number, draw() % 8 == 0, running_->clock});
    if (races_) ++running_->clock[running_->index];
  }
  bool try_wait(uint64_t number, unsigned parity) {
    if (at(number).phase % 2 == parity) {
      polling_.push_back(running_);
      running_->context.switch_to(scheduler_);
    }
    Barrier& barrier = at(number);
    if (barrier.phase % 2 == parity) return false;
    join(running_->clock, barrier.complete[parity]);
    return true;
  }

  // Where p, in the running block's shared memory, lies in that of another.
  std::byte* remote(const void* p, unsigned rank, size_t bytes) {
    if (rank >= blocks_.size()) fail("no such block in the cluster");
    if (blocks_[rank].running == 0) fail("the memory of a block that has ended");
    return blocks_[rank].memory.data() + offset(block(), p, bytes);
  }
  void access(unsigned rank, const void* p, size_t bytes, bool writes) {
    Block& of = blocks_[rank];
    const size_t begin = offset(of, p, bytes);
    if (!races_) return;
    const Fiber& fiber = *running_;
    for (size_t i = begin / 2; i < (begin + bytes) / 2; ++i) {
      Shadow& shadow = of.shadow[i];
      const auto check = [&](const Access& other, const char* what) {
        if (fiber.clock[other.thread] < other.clock)
          fail("race at byte " + std::to_string(2 * i) + ": a " + (writes ? "write" : "read") +
               " and a " + what + " of thread " + std::to_string(other.thread));
      };
      const Access own{fiber.index, fiber.clock[fiber.index]};
      if (shadow.written) check(shadow.write, "write");
      if (writes) {
        for (const Access& read : shadow.reads) check(read, "read");
        shadow.reads.clear(), shadow.written = true, shadow.write = own;
        continue;
      }
      if (!shadow.written) fail("byte " + std::to_string(2 * i) + " is read before it is written");
      const auto same = [&](const Access& read) { return read.thread == own.thread; };
      const auto found = std::find_if(shadow.reads.begin(), shadow.reads.end(), same);
      if (found == shadow.reads.end())
        shadow.reads.push_back(own);
      else
        *found = own;
    }
  }

  static inline Machine* current_machine = nullptr;

 private:
  size_t clocks() const { return races_ ? fibers_.size() : 0; }
  Barrier& at(uint64_t number) {
    if (number >= barriers_.size()) fail("not a barrier");
    return barriers_[number];
  }
  size_t offset(const Block& of, const void* p, size_t bytes) {
    const auto at = static_cast<size_t>(static_cast<const std::byte*>(p) - of.memory.data());
    if (at > of.memory.size() || bytes > of.memory.size() - at) fail("outside of shared memory");
    if (at % bytes != 0) fail("not aligned in shared memory");
    return at;
  }
  void enter() {
    body_();
    running_->done = true;
    running_->context.switch_to(scheduler_);
  }
  uint64_t draw() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ >> 11;
  }
  // One of the arrivals on their way; a slow one when nothing else can go on.
  void deliver() {
    size_t i = draw() % arrivals_.size();
    if (arrivals_[i].slow) {
      const auto quick = [](const Arrival& arrival) { return !arrival.slow; };
      const auto found = std::find_if(arrivals_.begin(), arrivals_.end(), quick);
      if (found != arrivals_.end())
        i = static_cast<size_t>(found - arrivals_.begin());
      else if (!runnable_.empty())
        return;
    }
    Barrier& barrier = barriers_[arrivals_[i].barrier];
    if (blocks_[barrier.rank].running == 0) error_ = "an arrival at a block that has ended";
    join(barrier.arriving, arrivals_[i].clock);
    std::swap(arrivals_[i], arrivals_.back());
    arrivals_.pop_back();
    if (--barrier.pending > 0) return;
    barrier.complete[barrier.phase % 2].swap(barrier.arriving);
    barrier.arriving.assign(clocks(), 0);
    barrier.pending = barrier.expected, ++barrier.phase;
    runnable_.insert(runnable_.end(), polling_.begin(), polling_.end());
    polling_.clear();
  }
  // Any, but for a while some hardly ever: a block, and every eighth thread.
  Fiber* pick() {
    if (++picks_ % 4096 == 0) slow_ = draw();
    size_t i = 0;
    for (int attempt = 0; attempt < 8; ++attempt) {
      i = draw() % runnable_.size();
      const Fiber& fiber = *runnable_[i];
      if (fiber.rank != slow_ % blocks_.size() && (fiber.index + slow_) % 8 != 0) break;
    }
    Fiber* fiber = runnable_[i];
    runnable_[i] = runnable_.back();
    runnable_.pop_back();
    return fiber;
  }

  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> barriers_;
  std::vector<Arrival> arrivals_;
  std::vector<Fiber*> runnable_, polling_;
  Meeting all_;
  Context scheduler_;
  Fiber* running_ = nullptr;
  std::function<void()> body_;
  std::string error_;
  uint64_t random_, picks_ = 0, slow_ = 0, time_ = 0;
  bool races_;
  int dropped_;
};

inline Machine& machine() { return *Machine::current_machine; }

}  // namespace emulator
