// What the derivatives of the compiled operators share.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <mutex>

namespace layernorm {

// A node that compiled autograd can trace. Derived has
//   each_saved(visit), which calls visit(SavedVariable&, bool is_output), and
//   each_constant(visit), which calls visit(member) for everything else that apply() reads.
template <typename Derived>
struct Node : torch::autograd::Node {
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    derived().each_saved([](auto& saved, bool) { saved.reset_data(); });
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    auto& mine = const_cast<Node*>(this)->derived();  // visited, not changed
    args.collect(name());
    for (uint32_t i = 0; i < num_outputs(); ++i) args.collect(task_should_compute_output(i));
    mine.each_saved([&](const auto& saved, bool is_output) { args.collect(saved, is_output); });
    mine.each_constant([&](const auto& constant) { args.collect(constant); });
  }

  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& grads,
      torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    derived().each_saved([&](auto& saved, bool) { swapped.before(saved); });
    derived().each_constant([&](auto& constant) { swapped.before(constant); });
    auto result = apply(torch::autograd::variable_list(grads));
    derived().each_saved([&](auto& saved, bool) { swapped.after(saved); });
    derived().each_constant([&](auto& constant) { swapped.after(constant); });
    return result;
  }

 private:
  Derived& derived() { return static_cast<Derived&>(*this); }
};

// Whether gradients are to be taken as PyTorch's operators take them: those of higher order, and
// batches of gradients (is_grads_batched, jacobian(vectorize=True)), which only those know.
inline bool wants_composite(const torch::autograd::variable_list& grads) {
  return at::GradMode::is_enabled() ||
         std::any_of(grads.begin(), grads.end(), [](const at::Tensor& grad) {
           return grad.defined() && grad.key_set().has(c10::DispatchKey::Batched);
         });
}

inline void refuse_forward_mode(const torch::autograd::variable_list& arguments) {
  for (const auto& argument : arguments)
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(argument),
                                "layernorm: the compiled recurrent kernels have no forward-mode "
                                "derivative; use layernorm.backends.use(\"reference\")");
}

}  // namespace layernorm
