// The recurrent operators on CPU tensors: checks, allocates, and lets PyTorch's threads run the
// kernels.
#include "recurrent.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "isa/huge_pages.hpp"
#include "parallel.hpp"

namespace layernorm {

Tensor prepare(const RecurrentLayer& layer, bool backward) {
  const auto& r = layer.r;
  const auto& kernels = *layer.kernels;
  Tensor prepared = scratch(kernels.prepared_bytes(r, backward));
  void* const memory = prepared.mutable_data_ptr();
  const int64_t parts = kernels.prepare_parts(r, backward);
  in_parallel(
      parts, r.gates * r.hidden_size * (r.input_size + r.output_size) / parts,
      [&](int64_t begin, int64_t end) { kernels.prepare(r, backward, memory, begin, end); });
  return prepared;
}

namespace {

// How the rows of the batch are shared: in ranges of whole units that never meet, or all of them by
// all members of one team, who share the columns of the products.
struct Plan {
  int64_t ranges = 1;  // of rows
  int64_t unit = 1;    // rows that stay together
  int members = 1;     // of a team
  int64_t units = 1;

  [[nodiscard]] int64_t begin(const Recurrent& r, int64_t range) const {
    return std::min(r.batch, units * range / ranges * unit);
  }
};

Plan plan(const RecurrentLayer& layer, int64_t unit) {
  const auto& r = layer.r;
  Plan plan;
  plan.unit = unit;
  plan.units = (r.batch + unit - 1) / unit;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t width = r.gates * r.hidden_size;
  const int64_t products = layer.rows * width * (r.input_size + r.output_size);
  constexpr int64_t kWorthAThread = int64_t{1} << 21;   // about 40 us
  constexpr int64_t kWorthABarrier = int64_t{1} << 16;  // 2 us a step of one row
  if (threads == 1 || products < kWorthAThread) return plan;
  // A few rows by themselves cost a reading of the weights, as all of them do.
  constexpr int64_t kFewRows = 4;
  if (r.batch < kFewRows * threads && width * r.output_size >= kWorthABarrier)
    plan.members = threads;
  else
    plan.ranges = std::min<int64_t>(threads, plan.units);
  return plan;
}

// Calls run(row_begin, row_end, scratch, team, rank) as planned; bytes(rows, members) of scratch
// memory are handed to each team.
template <typename Bytes, typename Run>
void run_planned(const Recurrent& r, const Plan& plan, const Bytes& bytes, const Run& run) {
  if (plan.members > 1) {
    const Tensor memory = scratch(bytes(r.batch, plan.members));
    void* const data = memory.mutable_data_ptr();
    Team team(plan.members);
    in_parallel_parts(plan.members, 1, [&](int64_t, int64_t) {
      const int rank = team.join();
      if (rank >= 0) run(0, r.batch, data, team, rank);
    });
    return;
  }
  size_t each = 0;
  for (int64_t i = 0; i < plan.ranges; ++i) {
    const int64_t count = plan.begin(r, i + 1) - plan.begin(r, i);
    if (count > 0) each = std::max(each, (bytes(count, 1) + 63) / 64 * 64);
  }
  const Tensor memory = scratch(each * static_cast<size_t>(plan.ranges));
  auto* const data = static_cast<char*>(memory.mutable_data_ptr());
  in_parallel_parts(plan.ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Team alone(1);
      if (plan.begin(r, i) < plan.begin(r, i + 1))
        run(plan.begin(r, i), plan.begin(r, i + 1), data + each * static_cast<size_t>(i), alone, 0);
    }
  });
}

RecurrentInputs inputs_of(LAYERNORM_RECURRENT_ARGUMENTS) {
  RecurrentInputs all;
  all.input = input;
  all.h = h;
  all.c = c;
  all.weights.reserve(weights.size());
  for (const std::optional<Tensor> one : weights) all.weights.push_back(one);
  all.resets = resets;
  if (batch_sizes.has_value()) all.batch_sizes = batch_sizes->vec();
  all.spec = spec.vec();
  all.eps = eps;
  all.reverse = reverse;
  return all;
}

RecurrentOutputs run_forward(RecurrentLayer& layer) {
  const auto& r = layer.r;
  Tensor output = layer.allocate(layer.output_shape());
  want_huge_pages(output.mutable_data_ptr(), output.nbytes());
  Tensor hn = layer.allocate({r.batch, r.output_size});
  Tensor cn =
      r.cell == CellKind::kLstm ? layer.allocate({r.batch, r.hidden_size}) : layer.allocate({0});
  if (r.batch > 0) layer.forward(output, hn, cn);
  return {output, hn, cn};
}

}  // namespace

void RecurrentLayer::forward(const Tensor& output, const Tensor& hn, const Tensor& cn) {
  r.output = output.mutable_data_ptr();
  r.hn = hn.mutable_data_ptr();
  r.cn = cn.mutable_data_ptr();
  const Tensor prepared = prepare(*this, false);
  const void* const weights = prepared.const_data_ptr();
  run_planned(
      r, plan(*this, 1),
      [&](int64_t count, int members) { return kernels->forward_bytes(r, count, members); },
      [&](int64_t begin, int64_t end, void* memory, Team& team, int rank) {
        kernels->forward(r, weights, memory, begin, end, team, rank);
      });
}

namespace {

RecurrentOutputs recurrent(LAYERNORM_RECURRENT_ARGUMENTS, bool /*recompute*/) {
  RecurrentLayer layer(inputs_of(LAYERNORM_RECURRENT_PASSED));
  return run_forward(layer);
}

RecurrentForwardOutputs recurrent_forward(LAYERNORM_RECURRENT_ARGUMENTS, bool recompute) {
  RecurrentLayer layer(inputs_of(LAYERNORM_RECURRENT_PASSED));
  const Saved saved = layer.keep(recompute);
  const auto [output, hn, cn] = run_forward(layer);
  return {output, hn, cn, saved.x, saved.h, saved.c, saved.stats};
}

// Gradients in the type computed in, and what takes them to the type of the parameter.
struct Found {
  Tensor grad_input, grad_h, grad_c;
  std::array<Tensor, kWeights> weights;
};

Found allocate_gradients(const RecurrentLayer& layer, const RecurrentInputs& inputs,
                         const std::array<bool, 3 + kWeights>& wanted, RecurrentGradients& g) {
  const auto& r = layer.r;
  Found found;
  if (wanted[0]) found.grad_input = layer.allocate(inputs.input.sizes());
  if (wanted[1]) found.grad_h = layer.allocate({r.batch, r.output_size});
  if (wanted[2] && r.cell == CellKind::kLstm)
    found.grad_c = layer.allocate({r.batch, r.hidden_size});
  g.grad_input = data_of(found.grad_input);
  g.grad_h0 = data_of(found.grad_h);
  g.grad_c0 = data_of(found.grad_c);
  void** const to[kWeights] = {&g.weight_ih, &g.weight_hh, &g.weight_hr, &g.bias_ih,
                               &g.bias_hh,   &g.gain_ih,   &g.gain_hh,   &g.bias,
                               &g.bias_hn,   &g.gain_cell, &g.bias_cell};
  for (int i = 0; i < kWeights; ++i) {
    if (!wanted[3 + i] || !inputs.weights[i]) continue;
    const auto sizes = inputs.weights[i]->sizes();
    const auto type = layer.options.dtype(layer.computed);
    found.weights[i] =
        sizes.size() == 2 || layer.rows == 0 ? at::zeros(sizes, type) : at::empty(sizes, type);
    *to[i] = found.weights[i].mutable_data_ptr();
  }
  return found;
}

void run_backward(const RecurrentLayer& layer, const RecurrentGradients& g) {
  const auto& r = layer.r;
  const auto& kernels = *layer.kernels;
  const Tensor prepared = prepare(layer, true);
  const void* const weights = prepared.const_data_ptr();
  const Tensor shared_memory = scratch(kernels.shared_bytes(r, g));
  void* const shared = shared_memory.mutable_data_ptr();
  const Plan rows = plan(layer, rows_per_block(r.batch));
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const size_t sum_bytes = (kernels.sum_bytes(r) + 63) / 64 * 64;
  const Tensor sum_memory = scratch(sum_bytes * static_cast<size_t>(threads));
  const int64_t steps = kernels.chunk_steps(r);
  for (int64_t chunk = (r.steps + steps - 1) / steps - 1; chunk >= 0; --chunk) {
    run_planned(
        r, rows,
        [&](int64_t count, int members) { return kernels.backward_bytes(r, count, members); },
        [&](int64_t begin, int64_t end, void* memory, Team& team, int rank) {
          kernels.backward_steps(r, g, weights, shared, memory, chunk, begin, end, team, rank);
        });
    for (int kind = 0; kind < kSumKinds; ++kind) {
      const int64_t parts = kernels.sum_parts(r, g, shared, chunk, kind);
      if (parts == 0) continue;
      std::atomic<int> callers{0};
      const int64_t elements = steps * r.batch * (r.input_size + r.output_size);
      in_parallel(parts, elements, [&](int64_t begin, int64_t end) {
        const int caller = callers.fetch_add(1);
        Tensor more;  // should there be more callers than threads
        if (caller >= threads) more = scratch(sum_bytes);
        auto* const memory = caller < threads ? static_cast<char*>(sum_memory.mutable_data_ptr()) +
                                                    sum_bytes * static_cast<size_t>(caller)
                                              : static_cast<char*>(more.mutable_data_ptr());
        kernels.sum(r, g, weights, shared, memory, chunk, kind, begin, end);
      });
    }
  }
  kernels.finish(r, g, shared);
}

RecurrentGrads recurrent_backward(LAYERNORM_RECURRENT_ARGUMENTS, const OptionalTensor& grad_output,
                                  const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                  const Tensor& output, const Tensor& saved_x,
                                  const Tensor& saved_h, const Tensor& saved_c,
                                  const Tensor& saved_stats,
                                  std::array<bool, 3 + kWeights> wanted) {
  const auto all = inputs_of(LAYERNORM_RECURRENT_PASSED);
  RecurrentLayer layer(all);
  auto& r = layer.r;
  const auto type = input.scalar_type();
  const auto contiguous = [&](const OptionalTensor& tensor, at::IntArrayRef shape,
                              at::ScalarType expected, const char* name) {
    if (!is_given(tensor)) return Tensor();
    TORCH_CHECK(
        tensor->sizes() == shape && tensor->scalar_type() == expected && tensor->device().is_cpu(),
        "layernorm: ", name, " must be of shape ", shape, " and dtype ", expected, ", got ",
        tensor->sizes(), " of ", tensor->scalar_type());
    return tensor->contiguous();
  };
  const Tensor from_output = contiguous(grad_output, layer.output_shape(), type, "grad_output");
  const Tensor from_h = contiguous(grad_h, {r.batch, r.output_size}, type, "grad_h");
  Tensor from_c;
  if (r.cell == CellKind::kLstm)
    from_c = contiguous(grad_c, {r.batch, r.hidden_size}, type, "grad_c");
  // What forward returned, in whatever layout it comes back, or nothing.
  require(output, "output");
  require(saved_x, "saved_x");
  require(saved_h, "saved_h");
  require(saved_c, "saved_c");
  require(saved_stats, "saved_stats");
  const Tensor given = contiguous(output, layer.output_shape(), type, "output");
  const SavedShapes shapes = layer.saved_shapes(saved_x.dim() == 1);
  layer.use({contiguous(saved_x, shapes.x, type, "saved_x"),
             contiguous(saved_h, shapes.h, type, "saved_h"),
             contiguous(saved_c, shapes.c, type, "saved_c"),
             contiguous(saved_stats, shapes.stats, layer.computed, "saved_stats")});
  r.output = given.data_ptr();
  RecurrentGradients g{};
  g.grad_output = data_of(OptionalTensor(from_output));
  g.grad_hn = data_of(OptionalTensor(from_h));
  g.grad_cn = data_of(OptionalTensor(from_c));
  const Found found = allocate_gradients(layer, all, wanted, g);
  if (layer.rows > 0) run_backward(layer, g);
  const auto result = [&](const Tensor& grad) {
    return grad.defined() ? grad.to(type) : at::empty({0}, input.options());
  };
  std::vector<Tensor> grads;
  grads.reserve(kWeights);
  for (const auto& grad : found.weights) grads.push_back(result(grad));
  return {result(found.grad_input), result(found.grad_h), result(found.grad_c), grads};
}

TORCH_LIBRARY_IMPL(layernorm, CPU, library) {
  library.impl("recurrent", recurrent);
  library.impl("recurrent_forward", recurrent_forward);
  library.impl("recurrent_backward", recurrent_backward);
}

}  // namespace
}  // namespace layernorm
