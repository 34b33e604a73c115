// The recurrent kernels by several threads, without Python and OpenMP, for ThreadSanitizer
// (`make sanitize`): the members of a team, threads with rows of their own, and the sums of
// backward by parts. Every result must have the bits of one thread's.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <latch>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "binding/parallel.hpp"
#include "recurrent/recurrent.hpp"

namespace layernorm::threads {
extern const RecurrentTable recurrences;
}

using namespace layernorm;

namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<char>;

char* aligned(Bytes& bytes, size_t count) {
  bytes.assign(count + 64, 0);
  return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
}

void run_threads(int count, const std::function<void(int)>& run) {
  std::vector<std::thread> all;
  for (int i = 0; i < count; ++i) all.emplace_back(run, i);
  for (auto& one : all) one.join();
}

struct Layer {
  Recurrent r{};
  RecurrentGradients g{};
  std::vector<Floats> memory;

  float* floats(int64_t count, bool random) {
    std::mt19937 engine(static_cast<unsigned>(memory.size()));
    std::normal_distribution<float> normal;
    memory.emplace_back(static_cast<size_t>(count));
    if (random)
      for (auto& one : memory.back()) one = 0.5F * normal(engine);
    return memory.back().data();
  }
};

// Loops of this library's own threads, begun by several threads at once, some from inside of
// others: every part is run, once, and what a part throws comes out.
void check_pool() {
  run_threads(3, [](int) {
    use_own_threads(4);
    for (int i = 0; i < 200; ++i) {
      std::vector<int> seen(1000);
      in_parallel_parts(1000, 10, [&](int64_t begin, int64_t end) {
        in_parallel_parts(end - begin, 1, [&](int64_t from, int64_t to) {
          for (int64_t n = from; n < to; ++n) ++seen[begin + n];
        });
      });
      if (std::any_of(seen.begin(), seen.end(), [](int n) { return n != 1; })) std::abort();
      try {
        in_parallel_parts(8, 1, [&](int64_t begin, int64_t) {
          if (begin >= 4) throw std::runtime_error(std::to_string(i));
        });
        std::abort();
      } catch (const std::runtime_error& thrown) {
        if (std::to_string(i) != thrown.what()) std::abort();
      }
    }
  });
}

Layer layer(CellKind cell, Inputs inputs, Scope scope) {
  Layer l;
  auto& r = l.r;
  r.cell = cell;
  r.inputs = inputs;
  r.scope = scope;
  r.centred = true;
  r.eps = r.cell_eps = 1e-5;
  r.steps = 6, r.batch = 9, r.input_size = 11, r.hidden_size = r.output_size = 37;
  r.gates = cell == CellKind::kLstm ? 4 : cell == CellKind::kGru ? 3 : 1;
  const int64_t width = r.gates * r.hidden_size;
  const int64_t rows = r.steps * r.batch;
  l.memory.reserve(64);
  const auto given = [&](int64_t count) { return l.floats(count, true); };
  const auto found = [&](int64_t count) { return l.floats(count, false); };
  r.input = given(rows * r.input_size);
  r.input_row_stride = r.input_size;
  r.input_step_stride = r.batch * r.input_size;
  r.h0 = given(r.batch * r.hidden_size);
  r.c0 = given(r.batch * r.hidden_size);
  r.weight_ih = given(width * r.input_size);
  r.weight_hh = given(width * r.hidden_size);
  r.gain_ih = given(width);
  r.gain_hh = inputs == Inputs::kSeparate ? given(width) : nullptr;
  r.bias = given(width);
  r.gain_cell = cell == CellKind::kLstm ? given(r.hidden_size) : nullptr;
  l.g.grad_output = given(rows * r.hidden_size);
  r.output = found(rows * r.hidden_size);
  r.hn = found(r.batch * r.hidden_size);
  r.cn = found(r.batch * r.hidden_size);
  r.saved_x = found(rows * width);
  r.saved_h = saved_h_width(r) > 0 ? found(rows * saved_h_width(r)) : nullptr;
  r.saved_c = cell == CellKind::kLstm ? found(rows * r.hidden_size) : nullptr;
  r.saved_stats = found(rows * 2 * r.gates);
  auto& g = l.g;
  g.grad_input = found(rows * r.input_size);
  g.grad_h0 = found(r.batch * r.hidden_size);
  g.grad_c0 = cell == CellKind::kLstm ? found(r.batch * r.hidden_size) : nullptr;
  g.weight_ih = found(width * r.input_size);
  g.weight_hh = found(width * r.hidden_size);
  g.gain_ih = found(width);
  g.gain_hh = inputs == Inputs::kSeparate ? found(width) : nullptr;
  g.bias = found(width);
  g.gain_cell = cell == CellKind::kLstm ? found(r.hidden_size) : nullptr;
  return l;
}

enum class Sharing { kTeam, kRows };

int full_teams = 0;  // that all threads were in

// The rows of the batch by `threads` threads, in one of two ways. Units of rows stay together.
template <typename Needed, typename Run>
void share(const Recurrent& r, Sharing sharing, int threads, int64_t unit, const Needed& needed,
           const Run& run) {
  if (sharing == Sharing::kTeam) {
    Bytes bytes;
    char* const scratch = aligned(bytes, needed(r.batch, threads));
    Team team(threads, std::chrono::seconds(10));  // all of them, however busy the machine is
    std::latch ready(threads);
    return run_threads(threads, [&](int) {
      ready.arrive_and_wait();  // a team does not wait for threads that have yet to start
      const int rank = team.join();
      if (rank == 0 && team.size() == threads) ++full_teams;
      if (rank >= 0) run(0, r.batch, scratch, team, rank);
    });
  }
  const int64_t units = (r.batch + unit - 1) / unit;
  run_threads(threads, [&](int i) {
    const int64_t begin = std::min(r.batch, units * i / threads * unit);
    const int64_t end = std::min(r.batch, units * (i + 1) / threads * unit);
    if (begin == end) return;
    Bytes bytes;
    char* const scratch = aligned(bytes, needed(end - begin, 1));
    Team alone(1);
    run(begin, end, scratch, alone, 0);
  });
}

// All that forward and backward find, as bits.
Floats results(CellKind cell, Inputs inputs, Scope scope, Sharing sharing, int threads) {
  Layer l = layer(cell, inputs, scope);
  const auto& r = l.r;
  const auto& g = l.g;
  const auto& kernels = threads::recurrences[kElementFloat32];
  const auto prepare = [&](bool backward, Bytes& bytes) {
    char* const prepared = aligned(bytes, kernels.prepared_bytes(r, backward));
    const int64_t parts = kernels.prepare_parts(r, backward);
    run_threads(threads, [&](int i) {
      kernels.prepare(r, backward, prepared, parts * i / threads, parts * (i + 1) / threads);
    });
    return prepared;
  };
  Bytes forward_bytes;
  const char* const forward = prepare(false, forward_bytes);
  share(
      r, sharing, threads, 1,
      [&](int64_t rows, int members) { return kernels.forward_bytes(r, rows, members); },
      [&](int64_t begin, int64_t end, char* scratch, Team& team, int rank) {
        kernels.forward(r, forward, scratch, begin, end, team, rank);
      });
  Bytes backward_bytes;
  const char* const backward = prepare(true, backward_bytes);
  Bytes shared_bytes;
  char* const shared = aligned(shared_bytes, kernels.shared_bytes(r, g));
  share(
      r, sharing, threads, rows_per_block(r.batch),
      [&](int64_t rows, int members) { return kernels.backward_bytes(r, rows, members); },
      [&](int64_t begin, int64_t end, char* scratch, Team& team, int rank) {
        kernels.backward_steps(r, g, backward, shared, scratch, 0, begin, end, team, rank);
      });
  for (int kind = 0; kind < kSumKinds; ++kind) {
    const int64_t parts = kernels.sum_parts(r, g, shared, 0, kind);
    run_threads(threads, [&](int i) {
      const int64_t begin = parts * i / threads;
      const int64_t end = parts * (i + 1) / threads;
      if (begin == end) return;
      Bytes bytes;
      char* const scratch = aligned(bytes, kernels.sum_bytes(r));
      kernels.sum(r, g, backward, shared, scratch, 0, kind, begin, end);
    });
  }
  kernels.finish(r, g, shared);
  Floats all;
  for (const auto& one : l.memory) all.insert(all.end(), one.begin(), one.end());
  return all;
}

}  // namespace

int main() {
  check_pool();
  struct Case {
    CellKind cell;
    Inputs inputs;
    Scope scope;
  };
  const Case cases[] = {{CellKind::kLstm, Inputs::kSeparate, Scope::kMatrix},
                        {CellKind::kGru, Inputs::kSeparate, Scope::kMatrix},
                        {CellKind::kGru, Inputs::kLate, Scope::kMatrix},
                        {CellKind::kRnn, Inputs::kSummed, Scope::kGate}};
  int failed = 0;
  for (const auto& [cell, inputs, scope] : cases) {
    const auto alone = results(cell, inputs, scope, Sharing::kRows, 1);
    for (const auto sharing : {Sharing::kTeam, Sharing::kRows}) {
      for (const int threads : {2, 3, 4}) {
        const auto together = results(cell, inputs, scope, sharing, threads);
        const bool same = together.size() == alone.size() &&
                          std::memcmp(together.data(), alone.data(), 4 * alone.size()) == 0;
        failed += same ? 0 : 1;
        if (!same) std::printf("cell %d by %d threads: other bits\n", int(cell), threads);
      }
    }
  }
  if (full_teams != 24) ++failed, std::printf("%d of 24 teams were complete\n", full_teams);
  std::printf("%d passed, %d failed\n", 24 - std::min(failed, 24), failed);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
