// The derivative of the recurrent operator: a node of PyTorch's own kind.
#include <torch/library.h>

#include "node.hpp"
#include "recurrent.hpp"

namespace layernorm {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Edges: input, h, c, weights. Inputs of the node: the gradients of output, h and c.
struct RecurrentNode : Node<RecurrentNode> {
  static constexpr size_t kEdges = 3 + kWeights;

  SavedVariable input, h, c, output, resets;
  SavedVariable saved_x, saved_h, saved_c, saved_stats;
  std::array<SavedVariable, kWeights> weights;
  std::array<bool, kWeights> has_weight{};
  bool has_c = false;
  bool has_resets = false;
  std::optional<std::vector<int64_t>> batch_sizes;
  std::vector<int64_t> spec;
  double eps = 0;
  bool reverse = false;
  c10::VariableVersion output_version;
  uint32_t saved_version = 0;

  [[nodiscard]] std::string name() const override { return "LayerNormRecurrentBackward"; }

  void each_saved(const auto& visit) {
    forget_changed_output();
    visit(output, true);
    for (auto* saved : {&input, &h, &c, &resets, &saved_x, &saved_h, &saved_c, &saved_stats})
      visit(*saved, false);
    for (auto& weight : weights) visit(weight, false);
  }
  void each_constant(const auto& visit) {
    for (auto& one : has_weight) visit(one);
    visit(has_c), visit(has_resets), visit(batch_sizes);
    visit(spec), visit(eps), visit(reverse);
  }

  void save_output(const Tensor& tensor) {
    output = SavedVariable(tensor, true);
    output_version = torch::autograd::impl::version_counter(tensor);
    saved_version = output_version.current_version();
  }
  // An output that was changed in place since, as by nn.ReLU(inplace=True), is computed again.
  void forget_changed_output() {
    if (output_version.enabled() && output_version.current_version() != saved_version)
      output = SavedVariable();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(kEdges);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    OptionalTensors all;
    all.reserve(kWeights);
    std::array<bool, kEdges> wanted{};
    for (size_t i = 0; i < 3; ++i) wanted[i] = task_should_compute_output(i) && (i < 2 || has_c);
    for (size_t i = 0; i < kWeights; ++i) {
      wanted[3 + i] = has_weight[i] && task_should_compute_output(3 + i);
      all.push_back(has_weight[i] ? std::optional<Tensor>(weights[i].unpack()) : std::nullopt);
    }
    const auto optional = [](const Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    const OptionalTensor from_output = optional(grads[0]);
    const OptionalTensor from_h = optional(grads[1]);
    const OptionalTensor from_c = has_c ? optional(grads[2]) : std::nullopt;
    const Tensor x = input.unpack();
    const Tensor h0 = h.unpack();
    const OptionalTensor c0 = has_c ? OptionalTensor(c.unpack()) : std::nullopt;
    const OptionalTensor mask = has_resets ? OptionalTensor(resets.unpack()) : std::nullopt;
    const at::OptionalIntArrayRef sizes =
        batch_sizes ? at::OptionalIntArrayRef(*batch_sizes) : at::OptionalIntArrayRef();
    const auto given_output = [&] {
      forget_changed_output();
      Tensor given = output.unpack(getptr());
      if (given.defined()) return given;
      return std::get<0>(
          recurrent_op().call(x, h0, c0, all, mask, sizes, spec, eps, reverse, false));
    };
    const auto found =
        wants_composite(grads)
            ? recurrent_composite_backward_op().call(x, h0, c0, all, mask, sizes, spec, eps,
                                                     reverse, from_output, from_h, from_c, wanted)
            : recurrent_backward_op().call(x, h0, c0, all, mask, sizes, spec, eps, reverse,
                                           from_output, from_h, from_c, given_output(),
                                           saved_x.unpack(), saved_h.unpack(), saved_c.unpack(),
                                           saved_stats.unpack(), wanted);
    const auto& [grad_input, grad_h, grad_c, grad_weights] = found;
    if (wanted[0]) result[0] = grad_input;
    if (wanted[1]) result[1] = grad_h;
    if (wanted[2]) result[2] = grad_c;
    for (size_t i = 0; i < kWeights; ++i)
      if (wanted[3 + i]) result[3 + i] = grad_weights[i];
    return result;
  }
};

RecurrentOutputs recurrent_autograd(LAYERNORM_RECURRENT_ARGUMENTS, bool recompute) {
  variable_list edges{input, h, c.value_or(Tensor())};
  for (const std::optional<Tensor> weight : weights) edges.push_back(weight.value_or(Tensor()));
  refuse_forward_mode(edges);
  if (!torch::autograd::compute_requires_grad(edges)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return recurrent_op().call(LAYERNORM_RECURRENT_PASSED, recompute);
  }
  TORCH_CHECK(edges.size() == RecurrentNode::kEdges, "layernorm: weights must be a list of ",
              static_cast<int>(kWeights), ", got ", weights.size());
  const auto node = c10::make_intrusive<RecurrentNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(edges));
  RecurrentForwardOutputs found;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    found = recurrent_forward_op().call(LAYERNORM_RECURRENT_PASSED, recompute);
  }
  auto& [output, hn, cn, saved_x, saved_h, saved_c, saved_stats] = found;
  node->has_c = c.has_value() && cn.dim() == 2;  // an LSTM
  torch::autograd::set_history({output, hn, cn}, node);
  node->input = SavedVariable(input, false);
  node->h = SavedVariable(h, false);
  node->c = SavedVariable(edges[2], false);
  node->save_output(output);
  node->has_resets = resets.has_value();
  node->resets = SavedVariable(resets.value_or(Tensor()), false);
  node->saved_x = SavedVariable(saved_x, false);
  node->saved_h = SavedVariable(saved_h, false);
  node->saved_c = SavedVariable(saved_c, false);
  node->saved_stats = SavedVariable(saved_stats, false);
  for (size_t i = 0; i < kWeights; ++i) {
    node->has_weight[i] = edges[3 + i].defined();
    node->weights[i] = SavedVariable(edges[3 + i], false);
  }
  if (batch_sizes.has_value()) node->batch_sizes = batch_sizes->vec();
  node->spec = spec.vec();
  node->eps = eps;
  node->reverse = reverse;
  return {output, hn, cn};
}

TORCH_LIBRARY_IMPL(layernorm, AutogradCPU, library) {
  library.impl("recurrent", recurrent_autograd);
}
TORCH_LIBRARY_IMPL(layernorm, AutogradCUDA, library) {
  library.impl("recurrent", recurrent_autograd);
}

}  // namespace
}  // namespace layernorm
