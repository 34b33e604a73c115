// The recurrent layers of layernorm.h over whole sequences, and the part of a step after its
// products: the work is shared among threads.
#include <algorithm>
#include <atomic>

#include "layer.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

// How the rows of the batch are shared: in ranges of whole units that never meet, or all of them by
// all members of one team, who share the columns of the products.
struct Plan {
  int64_t ranges = 1;  // of rows
  int64_t unit = 1;    // rows that stay together
  int members = 1;     // of a team
  int64_t units = 1;

  Plan(const Layer& layer, int64_t unit) : unit(unit) {
    const auto& r = layer.r;
    units = (r.batch + unit - 1) / unit;
    const int threads = thread_count();
    const int64_t width = r.gates * r.hidden_size;
    const int64_t products = layer.rows * width * (r.input_size + r.output_size);
    constexpr int64_t kWorthAThread = int64_t{1} << 21;   // about 40 us
    constexpr int64_t kWorthABarrier = int64_t{1} << 16;  // 2 us a step of one row
    if (threads == 1 || products < kWorthAThread) return;
    // A few rows by themselves cost a reading of the weights, as all of them do.
    constexpr int64_t kFewRows = 4;
    if (r.batch < kFewRows * threads && width * r.output_size >= kWorthABarrier)
      members = threads;
    else
      ranges = std::min<int64_t>(threads, units);
  }

  [[nodiscard]] int64_t begin(const Recurrent& r, int64_t range) const {
    return std::min(r.batch, units * range / ranges * unit);
  }
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls run(row_begin, row_end, scratch, team, rank) as planned; bytes(rows, members) of scratch
// memory are handed to each team.
template <typename Bytes, typename Run>
void run_planned(const Recurrent& r, const Plan& plan, const Bytes& bytes, const Run& run) {
  if (plan.members > 1) {
    const Scratch memory(bytes(r.batch, plan.members));
    Team team(plan.members);
    in_parallel_parts(plan.members, 1, [&](int64_t, int64_t) {
      const int rank = team.join();
      if (rank >= 0) run(0, r.batch, memory.data(), team, rank);
    });
    return;
  }
  size_t each = 0;
  for (int64_t i = 0; i < plan.ranges; ++i) {
    const int64_t count = plan.begin(r, i + 1) - plan.begin(r, i);
    if (count > 0) each = std::max(each, aligned(bytes(count, 1)));
  }
  const Scratch memory(each * static_cast<size_t>(plan.ranges));
  auto* const data = static_cast<char*>(memory.data());
  in_parallel_parts(plan.ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Team alone(1);
      if (plan.begin(r, i) < plan.begin(r, i + 1))
        run(plan.begin(r, i), plan.begin(r, i + 1), data + each * static_cast<size_t>(i), alone, 0);
    }
  });
}

void forward(Layer& layer, const layernorm_layer_outputs& outputs) {
  auto& r = layer.r;
  check(outputs.output != nullptr && outputs.hn != nullptr &&
            (outputs.cn != nullptr || r.cell != CellKind::kLstm),
        "output and the final state must be given");
  r.output = outputs.output;
  r.hn = outputs.hn;
  r.cn = outputs.cn;
  layer.keep(outputs.saved);
  const Scratch prepared = prepare(layer, false);
  const auto& kernels = *layer.kernels;
  run_planned(
      r, Plan(layer, 1),
      [&](int64_t count, int members) { return kernels.forward_bytes(r, count, members); },
      [&](int64_t begin, int64_t end, void* memory, Team& team, int rank) {
        kernels.forward(r, prepared.data(), memory, begin, end, team, rank);
      });
}

RecurrentGradients gradients_of(const layernorm_layer_gradients& given) {
  RecurrentGradients g{};
  g.grad_output = given.grad_output;
  g.grad_hn = given.grad_hn;
  g.grad_cn = given.grad_cn;
  g.grad_input = given.grad_input;
  g.grad_h0 = given.grad_h0;
  g.grad_c0 = given.grad_c0;
  g.grad_reset_h = given.grad_reset_h;
  g.grad_reset_c = given.grad_reset_c;
  void** const to[LAYERNORM_WEIGHTS] = {&g.weight_ih, &g.weight_hh, &g.weight_hr, &g.bias_ih,
                                        &g.bias_hh,   &g.gain_ih,   &g.gain_hh,   &g.bias,
                                        &g.bias_hn,   &g.gain_cell, &g.bias_cell};
  for (int i = 0; i < LAYERNORM_WEIGHTS; ++i) *to[i] = given.grad_weights[i];
  return g;
}

void backward(Layer& layer, const layernorm_layer_gradients& given) {
  auto& r = layer.r;
  check(given.output != nullptr && (given.saved.c != nullptr || r.cell != CellKind::kLstm),
        "output and what forward kept must be given");
  r.output = const_cast<void*>(given.output);
  layer.keep(given.saved);
  const RecurrentGradients g = gradients_of(given);
  const auto& kernels = *layer.kernels;
  const Scratch prepared = prepare(layer, true);
  const Scratch shared(kernels.shared_bytes(r, g));
  const Plan rows(layer, rows_per_block(r.batch));
  const int threads = thread_count();
  const size_t sum_bytes = aligned(kernels.sum_bytes(r));
  const Scratch sum_memory(sum_bytes * static_cast<size_t>(threads));
  const int64_t steps = kernels.chunk_steps(r);
  for (int64_t chunk = (r.steps + steps - 1) / steps - 1; chunk >= 0; --chunk) {
    run_planned(
        r, rows,
        [&](int64_t count, int members) { return kernels.backward_bytes(r, count, members); },
        [&](int64_t begin, int64_t end, void* memory, Team& team, int rank) {
          kernels.backward_steps(r, g, prepared.data(), shared.data(), memory, chunk, begin, end,
                                 team, rank);
        });
    for (int kind = 0; kind < kSumKinds; ++kind) {
      const int64_t parts = kernels.sum_parts(r, g, shared.data(), chunk, kind);
      if (parts == 0) continue;
      std::atomic<int> callers{0};
      const int64_t elements = steps * r.batch * (r.input_size + r.output_size);
      in_parallel(parts, elements, [&](int64_t begin, int64_t end) {
        const int caller = callers.fetch_add(1);
        Scratch more;  // should there be more callers than threads
        if (caller >= threads) more = Scratch(sum_bytes);
        void* const memory = caller < threads ? static_cast<char*>(sum_memory.data()) +
                                                    sum_bytes * static_cast<size_t>(caller)
                                              : more.data();
        kernels.sum(r, g, prepared.data(), shared.data(), memory, chunk, kind, begin, end);
      });
    }
  }
  kernels.finish(r, g, shared.data());
}

// ---- the part of a step after its products ----

// Elements that take about as long as a row: norms, activations.
int64_t work_of_row(const Recurrent& r) { return 4 * r.gates * r.hidden_size; }

// The gains and biases are the last part; of matrices without columns there is nothing to pack.
Scratch prepare_gates(const Layer& layer) {
  Scratch prepared(layer.kernels->prepared_bytes(layer.r, false));
  const int64_t parts = layer.kernels->prepare_parts(layer.r, false);
  layer.kernels->prepare(layer.r, false, prepared.data(), parts - 1, parts);
  return prepared;
}

// Calls run(begin, end, memory) for parts of `count` things of so many elements.
template <typename Run>
void each(const Layer& layer, int64_t count, int64_t elements, const Run& run) {
  const size_t bytes = layer.kernels->gates_bytes(layer.r);
  in_parallel(count, elements, [&](int64_t begin, int64_t end) {
    const Scratch memory(bytes);
    run(begin, end, memory.data());
  });
}

// Checks that all that is read is there.
void read_gates(Layer& layer, const void* hidden_gates) {
  auto& r = layer.r;
  r.hidden_gates = hidden_gates;
  check(r.input != nullptr && hidden_gates != nullptr &&
            (r.cell == CellKind::kLstm ? r.c0 : r.h0) != nullptr,
        "input, hidden_gates and the state must be given");
}

void gates_forward(Layer& layer, const void* hidden_gates, void* h, void* c) {
  auto& r = layer.r;
  read_gates(layer, hidden_gates);
  check(h != nullptr && (c != nullptr || r.cell != CellKind::kLstm), "h and c must be given");
  r.hn = h;
  r.cn = c;
  const Scratch prepared = prepare_gates(layer);
  each(layer, r.batch, work_of_row(r), [&](int64_t begin, int64_t end, void* memory) {
    layer.kernels->gates(r, prepared.data(), memory, begin, end);
  });
}

void gates_backward(Layer& layer, const void* hidden_gates, const layernorm_layer_gradients& given,
                    void* grad_hidden_gates) {
  const auto& r = layer.r;
  read_gates(layer, hidden_gates);
  check(r.inputs != Inputs::kSummed || grad_hidden_gates == nullptr,
        "grad_hidden_gates must not be given where the inputs are summed");
  RecurrentGradients g = gradients_of(given);
  g.grad_hidden_gates = grad_hidden_gates;
  const Scratch prepared = prepare_gates(layer);
  const size_t bytes = layer.kernels->gate_sums_bytes(r, g);
  const Scratch sums(bytes);
  std::fill_n(static_cast<char*>(sums.data()), bytes, 0);
  const int64_t rows = rows_per_block(r.batch);
  each(layer, (r.batch + rows - 1) / rows, 2 * rows * work_of_row(r),
       [&](int64_t begin, int64_t end, void* memory) {
         layer.kernels->gates_backward(r, g, prepared.data(), sums.data(), memory, begin, end);
       });
  layer.kernels->finish_gates(r, g, sums.data());
}

}  // namespace
}  // namespace layernorm

using layernorm::Layer;

layernorm_status layernorm_saved_widths(const layernorm_layer* layer, int32_t recompute,
                                        int64_t widths[4]) {
  return layernorm::status_of([&] {
    const Layer all(layer, Layer::kSequence);
    const auto& r = all.r;
    const int64_t products = r.inputs == layernorm::Inputs::kSeparate ? 2 : 1;
    widths[0] = recompute ? 0 : r.gates * r.hidden_size;
    widths[1] = recompute ? 0 : saved_h_width(r);
    widths[2] = r.cell == layernorm::CellKind::kLstm ? r.hidden_size : 0;
    widths[3] = recompute ? 0 : statistics_of(r) * products;
  });
}

layernorm_status layernorm_recurrent_forward(const layernorm_layer* layer,
                                             const layernorm_layer_outputs* outputs) {
  return layernorm::status_of([&] {
    Layer all(layer, Layer::kSequence);
    layernorm::check_struct(outputs, "outputs");
    if (all.r.batch > 0) layernorm::forward(all, *outputs);
  });
}

layernorm_status layernorm_recurrent_backward(const layernorm_layer* layer,
                                              const layernorm_layer_gradients* gradients) {
  return layernorm::status_of([&] {
    Layer all(layer, Layer::kSequence);
    layernorm::check_struct(gradients, "gradients");
    if (all.rows > 0) layernorm::backward(all, *gradients);
  });
}

layernorm_status layernorm_gates_forward(const layernorm_layer* step, const void* hidden_gates,
                                         void* h, void* c) {
  return layernorm::status_of([&] {
    Layer all(step, Layer::kGates);
    if (all.r.batch > 0) layernorm::gates_forward(all, hidden_gates, h, c);
  });
}

layernorm_status layernorm_gates_backward(const layernorm_layer* step, const void* hidden_gates,
                                          const layernorm_layer_gradients* gradients,
                                          void* grad_hidden_gates) {
  return layernorm::status_of([&] {
    Layer all(step, Layer::kGates);
    layernorm::check_struct(gradients, "gradients");
    if (all.r.batch > 0)
      layernorm::gates_backward(all, hidden_gates, *gradients, grad_hidden_gates);
  });
}
