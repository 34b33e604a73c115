#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "status.hpp"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace layernorm {
namespace {

std::atomic<ParallelFor> their_loop{nullptr};
std::atomic<CountThreads> their_count{nullptr};
thread_local int own_count = 1;
thread_local bool is_inside = false;

// A loop, its parts, and what went wrong in one of them.
struct Loop {
  void (*function)(int64_t, int64_t, void*);
  void* context;
  int64_t count, part;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  bool has_failed = false, lacks_memory = false;
  std::string problem;

  void run(int64_t begin, int64_t end) {
    const bool was_inside = is_inside;
    is_inside = true;
    try {
      function(begin, end, context);
    } catch (const std::bad_alloc&) {
      note("", true);
    } catch (const std::exception& error) {
      note(error.what(), false);
    }
    is_inside = was_inside;
  }
  // Takes parts until there are none.
  void take_parts() {
    for (int64_t begin = next.fetch_add(part); begin < count; begin = next.fetch_add(part))
      run(begin, std::min(count, begin + part));
  }
  // Throws what went wrong.
  void finish() const {
    if (lacks_memory) throw std::bad_alloc();
    if (has_failed) throw std::runtime_error(problem);
  }

 private:
  void note(const char* text, bool is_memory) {
    const std::lock_guard<std::mutex> lock(mutex);
    has_failed = true;
    lacks_memory = lacks_memory || is_memory;
    problem = text;
  }
};

// Threads that sleep until there is a loop. One loop at a time is shared: whoever comes meanwhile
// runs his by himself. Threads do not survive fork(), so a child has a pool of its own. Never
// destroyed: threads may outlive the interpreter.
class Pool {
 public:
  static Pool& mine() {
#if defined(_WIN32)
    static auto* const pool = new Pool;
    return *pool;
#else
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load();
    while (pool == nullptr || pool->process_ != getpid()) {
      auto* const fresh = new Pool;
      if (current.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
#endif
  }

  void run(Loop& loop, int threads) {
    const std::unique_lock<std::mutex> only(running_, std::try_to_lock);
    if (!only) return loop.take_parts();
    for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
    loop_ = &loop;
    state_.store(kVacancy * static_cast<uint64_t>(threads - 1), std::memory_order_release);
    state_.notify_all();
    loop.take_parts();
    // Who has not come yet is not needed; who is at work is waited for.
    uint64_t state = state_.fetch_and(~(kBusy - 1), std::memory_order_acq_rel);
    while ((state = state_.load(std::memory_order_acquire)) != 0) state_.wait(state);
  }

 private:
  // How many may still come, and how many are at work.
  static constexpr uint64_t kVacancy = 1, kBusy = uint64_t{1} << 32;

  [[noreturn]] void work() {
    while (true) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (state % kBusy == 0) {
        state_.wait(state);
        continue;
      }
      if (!state_.compare_exchange_weak(state, state - kVacancy + kBusy, std::memory_order_acq_rel))
        continue;
      loop_->take_parts();
      if (state_.fetch_sub(kBusy, std::memory_order_acq_rel) == kBusy) state_.notify_all();
    }
  }

  std::mutex running_;
  int workers_ = 0;
  Loop* loop_ = nullptr;
  std::atomic<uint64_t> state_{0};
#if !defined(_WIN32)
  pid_t process_ = getpid();
#endif
};

}  // namespace

void use_threads_of(ParallelFor parallel_for, CountThreads count_threads) {
  their_count = count_threads;
  their_loop = parallel_for;
}

void use_own_threads(int count) { own_count = count; }

int thread_count() {
  if (is_inside) return 1;
  uint32_t count = 1;
  if (const auto ask = their_count.load(std::memory_order_relaxed))
    return ask(&count) == 0 ? static_cast<int>(count) : 1;
  return own_count;
}

void run_parallel(int64_t count, int64_t grain, void (*function)(int64_t, int64_t, void*),
                  void* context) {
  Loop loop{function, context, count, count, {}, {}, false, false, {}};
  const int threads = thread_count();
  if (threads <= 1) {
    loop.run(0, count);
  } else if (const auto parallel_for = their_loop.load(std::memory_order_relaxed)) {
    const auto part = [](int64_t begin, int64_t end, void* mine) {
      static_cast<Loop*>(mine)->run(begin, end);
    };
    if (parallel_for(0, count, grain, part, &loop) != 0 && !loop.has_failed)
      fail("PyTorch could not run a parallel loop");
  } else {
    const int64_t parts = std::min<int64_t>(threads, (count + grain - 1) / grain);
    loop.part = (count + parts - 1) / parts;
    Pool::mine().run(loop, static_cast<int>(parts));
  }
  loop.finish();
}

}  // namespace layernorm
