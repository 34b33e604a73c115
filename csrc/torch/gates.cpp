// The operator of an LSTM's step after its products, on CPU tensors, and its derivative.
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "node.hpp"
#include "parallel.hpp"
#include "recurrent.hpp"

namespace layernorm {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// In the order of the operator's arguments and results.
enum Tensors {
  kInputGates,
  kHiddenGates,
  kCell,
  kFirstParameter,
  kAll = kFirstParameter + 7,
};

#define LAYERNORM_GATES_ARGUMENTS                                                                  \
  const Tensor &input_gates, const Tensor &hidden_gates, const Tensor &c,                          \
      const OptionalTensor &bias_ih, const OptionalTensor &bias_hh, const OptionalTensor &gain_ih, \
      const OptionalTensor &gain_hh, const OptionalTensor &bias, const OptionalTensor &gain_cell,  \
      const OptionalTensor &bias_cell, at::IntArrayRef spec, double eps
#define LAYERNORM_GATES_PASSED                                                                  \
  input_gates, hidden_gates, c, bias_ih, bias_hh, gain_ih, gain_hh, bias, gain_cell, bias_cell, \
      spec, eps

using GatesOp = TensorPair(LAYERNORM_GATES_ARGUMENTS);
using GatesGrads =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GatesBackwardOp = GatesGrads(const Tensor& grad_hidden, const OptionalTensor& grad_c,
                                   LAYERNORM_GATES_ARGUMENTS, std::array<bool, kAll> wanted);

const auto& gates_op() {
  static const auto op = find<GatesOp>("layernorm::lstm_gates");
  return op;
}
const auto& gates_backward_op() {
  static const auto op = find<GatesBackwardOp>("layernorm::lstm_gates_backward");
  return op;
}
const auto& gates_composite_backward_op() {
  static const auto op = find<GatesBackwardOp>("layernorm::lstm_gates_composite_backward");
  return op;
}

// The arguments as the kernels see them, with the memory that they point to.
struct GatesLayer {
  Recurrent r{};
  const RecurrentKernels* kernels = nullptr;
  at::ScalarType type, computed;

  explicit GatesLayer(LAYERNORM_GATES_ARGUMENTS) {
    require(input_gates, "input_gates");
    require(hidden_gates, "hidden_gates");
    require(c, "c");
    held_.type = type = c.scalar_type();
    read_spec(spec, eps, r);
    TORCH_CHECK(r.cell == CellKind::kLstm, "layernorm: spec must be of an LSTM");
    TORCH_CHECK(
        is_supported(type) && c.dim() == 2 && c.size(1) > 0,
        "layernorm: c must have two dimensions, of float32, float64, bfloat16 or float16; got ",
        c.sizes(), " of ", type);
    computed = computed_type(type);
    kernels = &kernels_of(type);
    r.steps = 1;
    r.batch = c.size(0);
    r.hidden_size = c.size(1);
    const int64_t width = r.gates * r.hidden_size;
    r.c0 = held_.hold(c, "c", {r.batch, r.hidden_size});
    r.input = held_.hold(input_gates, "input_gates", {r.batch, width});
    r.h0 = held_.hold(hidden_gates, "hidden_gates", {r.batch, width});
    r.bias_ih = held_.hold(bias_ih, "bias_ih", width);
    r.bias_hh = held_.hold(bias_hh, "bias_hh", width);
    r.gain_ih = held_.hold(gain_ih, "gain_ih", width);
    r.gain_hh = held_.hold(gain_hh, "gain_hh", width);
    r.bias = held_.hold(bias, "bias", width);
    r.gain_cell = held_.hold(gain_cell, "gain_cell", r.hidden_size);
    r.bias_cell = held_.hold(bias_cell, "bias_cell", r.hidden_size);
    // A gradient is summed where the parameter is used, and nowhere else.
    TORCH_CHECK((r.projection_bias || (!r.bias_ih && !r.bias_hh)) &&
                    (r.norm != NormKind::kNone || (!r.gain_ih && !r.bias)) &&
                    (r.inputs == Inputs::kSeparate || !r.gain_hh) &&
                    (r.cell_norm != CellNorm::kNone || (!r.gain_cell && !r.bias_cell)),
                "layernorm: there is a gain or bias that this variant does not have");
    // The gains and biases are the last part; of matrices without columns there is nothing to pack.
    prepared_ = scratch(kernels->prepared_bytes(r, false));
    const int64_t parts = kernels->prepare_parts(r, false);
    kernels->prepare(r, false, prepared_.mutable_data_ptr(), parts - 1, parts);
  }

  [[nodiscard]] const void* prepared() const { return prepared_.const_data_ptr(); }

  // Calls run(begin, end, memory) for parts of `count` things of so many elements.
  template <typename Run>
  void each(int64_t count, int64_t elements, const Run& run) const {
    const size_t bytes = kernels->gates_bytes(r);
    in_parallel(count, elements, [&](int64_t begin, int64_t end) {
      const Tensor memory = scratch(bytes);
      run(begin, end, memory.mutable_data_ptr());
    });
  }

 private:
  Held held_;
  Tensor prepared_;
};

// Elements that take about as long as a row: norms, activations.
int64_t work_of_row(const Recurrent& r) { return 4 * r.gates * r.hidden_size; }

TensorPair lstm_gates(LAYERNORM_GATES_ARGUMENTS) {
  GatesLayer layer(LAYERNORM_GATES_PASSED);
  auto& r = layer.r;
  Tensor hidden = at::empty(c.sizes(), c.options());
  Tensor cn = at::empty(c.sizes(), c.options());
  r.hn = hidden.mutable_data_ptr();
  r.cn = cn.mutable_data_ptr();
  layer.each(r.batch, work_of_row(r), [&](int64_t begin, int64_t end, void* memory) {
    layer.kernels->gates(r, layer.prepared(), memory, begin, end);
  });
  return {hidden, cn};
}

GatesGrads lstm_gates_backward(const Tensor& grad_hidden, const OptionalTensor& grad_c,
                               LAYERNORM_GATES_ARGUMENTS, std::array<bool, kAll> wanted) {
  const GatesLayer layer(LAYERNORM_GATES_PASSED);
  const auto& r = layer.r;
  const auto options = c.options().dtype(layer.computed);
  const auto given = [&](const Tensor& grad, const char* name) {
    require(grad, name);
    TORCH_CHECK(
        grad.sizes() == c.sizes() && grad.scalar_type() == layer.type && grad.device().is_cpu(),
        "layernorm: ", name, " must be of shape ", c.sizes(), " and dtype ", layer.type, ", got ",
        grad.sizes(), " of ", grad.scalar_type());
    return grad.to(layer.computed).contiguous();
  };
  const Tensor of_hidden = given(grad_hidden, "grad_hidden");
  const Tensor of_c = is_given(grad_c) ? given(*grad_c, "grad_c") : at::zeros(c.sizes(), options);
  std::array<Tensor, kAll> found;
  RecurrentGradients g{};
  g.grad_hn = of_hidden.const_data_ptr();
  g.grad_cn = of_c.const_data_ptr();
  const bool two = r.inputs == Inputs::kSeparate;
  found[kInputGates] = at::empty(input_gates.sizes(), options);
  if (two) found[kHiddenGates] = at::empty(input_gates.sizes(), options);
  found[kCell] = at::empty(c.sizes(), options);
  g.grad_input = found[kInputGates].mutable_data_ptr();
  if (two) g.grad_h0 = found[kHiddenGates].mutable_data_ptr();
  g.grad_c0 = found[kCell].mutable_data_ptr();
  const OptionalTensor* const parameters[] = {&bias_ih, &bias_hh,   &gain_ih,  &gain_hh,
                                              &bias,    &gain_cell, &bias_cell};
  void** const to[] = {&g.bias_ih, &g.bias_hh,   &g.gain_ih,  &g.gain_hh,
                       &g.bias,    &g.gain_cell, &g.bias_cell};
  for (size_t i = kFirstParameter; i < kAll; ++i) {
    const auto& parameter = *parameters[i - kFirstParameter];
    if (!wanted[i] || !parameter || !parameter->defined()) continue;
    found[i] = r.batch > 0 ? at::empty(parameter->sizes(), options)
                           : at::zeros(parameter->sizes(), options);
    *to[i - kFirstParameter] = found[i].mutable_data_ptr();
  }
  if (r.batch > 0) {
    const auto size = static_cast<int64_t>(layer.kernels->gate_sums_bytes(r, g));
    const Tensor sums = at::zeros({size}, at::kByte);
    void* const to_sums = sums.mutable_data_ptr();
    const int64_t rows = rows_per_block(r.batch);
    layer.each((r.batch + rows - 1) / rows, 2 * rows * work_of_row(r),
               [&](int64_t begin, int64_t end, void* memory) {
                 layer.kernels->gates_backward(r, g, layer.prepared(), to_sums, memory, begin, end);
               });
    layer.kernels->finish_gates(r, g, to_sums);
  }
  // A gradient that is not wanted has no element.
  const auto result = [&](size_t i) {
    return wanted[i] && found[i].defined() ? found[i].to(layer.type) : at::empty({0}, c.options());
  };
  // Where the products are summed, theirs is one and the same.
  Tensor of_gates = result(kInputGates);
  Tensor of_hidden_gates = two || !wanted[kHiddenGates] ? result(kHiddenGates)
                           : wanted[kInputGates]        ? of_gates.clone()
                                                        : found[kInputGates].to(layer.type);
  return {of_gates,  of_hidden_gates, result(2), result(3), result(4),
          result(5), result(6),       result(7), result(8), result(9)};
}

// Inputs of the node: the gradients of h and c.
struct GatesNode : Node<GatesNode> {
  std::array<SavedVariable, kAll> saved;
  std::array<bool, kAll> given{};
  std::vector<int64_t> spec;
  double eps = 0;

  [[nodiscard]] std::string name() const override { return "LayerNormLSTMGatesBackward"; }

  void each_saved(const auto& visit) {
    for (auto& one : saved) visit(one, false);
  }
  void each_constant(const auto& visit) {
    for (auto& one : given) visit(one);
    visit(spec), visit(eps);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(kAll);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    std::array<bool, kAll> wanted{};
    std::array<OptionalTensor, kAll> a;
    for (size_t i = 0; i < kAll; ++i) {
      wanted[i] = given[i] && task_should_compute_output(i);
      if (given[i]) a[i] = saved[i].unpack();
    }
    const Tensor grad_hidden = grads[0].defined() ? grads[0] : at::zeros_like(*a[kCell]);
    const OptionalTensor grad_c = grads[1].defined() ? OptionalTensor(grads[1]) : std::nullopt;
    const auto& op = wants_composite(grads) ? gates_composite_backward_op() : gates_backward_op();
    const auto found = op.call(grad_hidden, grad_c, *a[0], *a[1], *a[2], a[3], a[4], a[5], a[6],
                               a[7], a[8], a[9], spec, eps, wanted);
    const std::array<Tensor, kAll> all =
        std::apply([](const auto&... each) { return std::array<Tensor, kAll>{each...}; }, found);
    for (size_t i = 0; i < kAll; ++i)
      if (wanted[i]) result[i] = all[i];
    return result;
  }
};

TensorPair lstm_gates_autograd(LAYERNORM_GATES_ARGUMENTS) {
  const variable_list edges{input_gates,
                            hidden_gates,
                            c,
                            bias_ih.value_or(Tensor()),
                            bias_hh.value_or(Tensor()),
                            gain_ih.value_or(Tensor()),
                            gain_hh.value_or(Tensor()),
                            bias.value_or(Tensor()),
                            gain_cell.value_or(Tensor()),
                            bias_cell.value_or(Tensor())};
  refuse_forward_mode(edges);
  if (!torch::autograd::compute_requires_grad(edges)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return gates_op().call(LAYERNORM_GATES_PASSED);
  }
  const auto node = c10::make_intrusive<GatesNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(edges));
  TensorPair found;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    found = gates_op().call(LAYERNORM_GATES_PASSED);
  }
  torch::autograd::set_history({std::get<0>(found), std::get<1>(found)}, node);
  for (size_t i = 0; i < kAll; ++i) {
    node->given[i] = edges[i].defined();
    node->saved[i] = SavedVariable(edges[i], false);
  }
  node->spec = spec.vec();
  node->eps = eps;
  return found;
}

TORCH_LIBRARY_IMPL(layernorm, CPU, library) {
  library.impl("lstm_gates", lstm_gates);
  library.impl("lstm_gates_backward", lstm_gates_backward);
}
TORCH_LIBRARY_IMPL(layernorm, AutogradCPU, library) {
  library.impl("lstm_gates", lstm_gates_autograd);
}

}  // namespace
}  // namespace layernorm
