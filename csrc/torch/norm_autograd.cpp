// The derivative of the norm operators: PyTorch's own kind of node, so that recording and running
// it costs what it costs for PyTorch's norm.
#include <ATen/TensorOperators.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ldexp.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "node.hpp"
#include "operators.hpp"

namespace layernorm {
namespace {

// The rows, of which the mean is taken where they are centred, times a power of two each, so that
// their squares and eps beside them stay in the range of the type; that power as two factors, since
// it may be beyond what the type holds; and the √eps that belongs to such rows.
struct Scaled {
  Tensor rows, factor, rest, root_eps;
};

Scaled scaled(const Tensor& rows, at::IntArrayRef dims, double eps, bool centred) {
  // Exponents whose power of two and its inverse the type holds; that of 0 is below all others.
  const int64_t most = rows.scalar_type() == at::kDouble ? 1022 : 126;
  constexpr int64_t kOfZero = -4096;
  const auto exponents = [&](const Tensor& a) {
    if (a.sym_numel() == 0) return at::zeros({}, a.options().dtype(at::kLong));
    const Tensor size = a.detach().abs().amax(dims, true);
    const Tensor exponent = std::get<1>(at::frexp(size)).to(at::kLong);
    return at::where(size == 0, kOfZero, at::where(size.isfinite(), exponent, 0));
  };
  const auto power = [&](const Tensor& exponent) {
    return at::ldexp(at::ones_like(exponent, rows.options()), exponent);
  };
  int of_eps = kOfZero;
  const double mantissa = eps == 0 ? 0 : std::frexp(std::sqrt(std::fabs(eps)), &of_eps);
  // First the greater of a row and √eps near 1, then of the centred row, which may be much smaller.
  const Tensor once = -exponents(rows).clamp_min(of_eps).clamp(-most, most);
  Tensor a = rows * power(once);
  if (centred) a = a - a.mean(dims, true);
  const Tensor again = -at::maximum(exponents(a), once + of_eps).clamp(-most, most);
  const Tensor total = once + again;
  const Tensor factor = total.clamp(-most, most);
  const Tensor root_eps = mantissa * power((total + of_eps).clamp(-2 * most, most));
  return {a * power(again), power(factor), power(total - factor), root_eps};
}

// The gradients as PyTorch operators, which can be differentiated again, to any order: mean and
// rstd are functions of the input here.
TensorTriple composite_backward(const Tensor& grad, const Tensor& input, size_t tail,
                                const Tensor& weight, const Tensor& bias, double eps,
                                bool centred) {
  const auto type = statistics_type(input);
  std::vector<int64_t> last;
  std::vector<int64_t> leading;
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    (dim < input.dim() - static_cast<int64_t>(tail) ? leading : last).push_back(dim);
  const auto mean = [&](const Tensor& a) { return a.mean(last, true); };
  const auto over_rows = [&](const Tensor& a) { return leading.empty() ? a : a.sum(leading); };
  c10::SymInt width = 1;
  for (const int64_t dim : last) width = width * input.sym_size(dim);
  const Tensor rows = input.to(type);
  const Tensor one = at::ones({}, rows.options());
  // The one element of a row is its mean: there is nothing to scale, and no gradient.
  const auto [a, factor, rest, root_eps] =
      centred && width == 1
          ? Scaled{rows - rows, one / std::sqrt(std::fabs(eps)), one, eps == 0 ? one - one : one}
          : scaled(rows, last, eps, centred);
  const Tensor added = root_eps.square();
  const Tensor rstd = (mean(a * a) + (eps < 0 ? -added : added)).rsqrt();
  const Tensor normalized = a * rstd;
  const Tensor g = grad.to(type);
  const Tensor t = weight.defined() ? g * weight.to(type) : g;
  Tensor along = normalized * mean(t * normalized);
  if (centred) along = along + mean(t);
  Tensor grad_weight;
  Tensor grad_bias;
  if (weight.defined()) grad_weight = over_rows(g * normalized).to(weight.scalar_type());
  if (bias.defined()) grad_bias = over_rows(g).to(bias.scalar_type());
  const Tensor grad_input = rstd * (t - along) * factor * rest;
  return {grad_input.to(input.scalar_type()), grad_weight, grad_bias};
}

// Keeps of forward what was normalized, mean and rstd, and the parameters. Inputs of the node are
// the gradients of the output and, where there was a residual, of the sum.
struct NormNode : Node<NormNode> {
  torch::autograd::SavedVariable input, stats, weight, bias;
  std::vector<c10::SymInt> shape;
  double eps = 0;
  bool centred = true;
  bool has_residual = false;
  std::string kind;

  [[nodiscard]] std::string name() const override { return kind; }

  void each_saved(const auto& visit) {
    visit(input, has_residual);
    for (auto* saved : {&stats, &weight, &bias}) visit(*saved, false);
  }
  void each_constant(const auto& visit) {
    visit(shape), visit(eps), visit(centred), visit(has_residual), visit(kind);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t first = has_residual ? 2 : 1;  // edges: input, residual, weight, bias
    torch::autograd::variable_list result(first + 2);
    const Tensor grad_sum = has_residual ? grads[1] : Tensor();
    Tensor grad_input = grad_sum;
    if (grads[0].defined()) {
      const auto node = getptr();
      const Tensor a = input.unpack(has_residual ? node : nullptr);
      const Tensor gain = weight.unpack();
      const Tensor offset = bias.unpack();
      const bool wanted_input =
          task_should_compute_output(0) || (has_residual && task_should_compute_output(1));
      if (at::GradMode::is_enabled()) {
        std::tie(grad_input, result[first], result[first + 1]) =
            composite_backward(grads[0], a, shape.size(), gain, offset, eps, centred);
        if (grad_sum.defined()) grad_input = grad_input + grad_sum;
      } else {
        const std::array<bool, 3> wanted{wanted_input,
                                         gain.defined() && task_should_compute_output(first),
                                         offset.defined() && task_should_compute_output(first + 1)};
        auto [found_input, found_weight, found_bias] = norm_backward_op().call(
            grads[0], grad_sum.defined() ? OptionalTensor(grad_sum) : std::nullopt, a,
            stats.unpack(), shape, gain, offset, centred, wanted);
        if (wanted[0]) grad_input = found_input;
        if (wanted[1]) result[first] = found_weight;
        if (wanted[2]) result[first + 1] = found_bias;
      }
    }
    for (size_t i = 0; i < first; ++i)
      if (task_should_compute_output(i)) result[i] = grad_input;
    return result;
  }
};

// (output, sum) with their derivative recorded.
TensorPair recorded(const char* kind, const Tensor& input, const OptionalTensor& residual,
                    c10::SymIntArrayRef shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, bool centred) {
  const auto node = c10::make_intrusive<NormNode>();
  const bool has_residual = residual.has_value();
  const Tensor gain = weight.value_or(Tensor());
  const Tensor offset = bias.value_or(Tensor());
  node->set_next_edges(has_residual
                           ? torch::autograd::collect_next_edges(input, *residual, gain, offset)
                           : torch::autograd::collect_next_edges(input, gain, offset));
  node->kind = kind;
  node->shape.assign(shape.begin(), shape.end());
  node->eps = eps;
  node->centred = centred;
  node->has_residual = has_residual;
  TensorTriple found;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    found = norm_forward_op().call(input, residual, shape, weight, bias, eps, centred);
  }
  auto& [output, sum, stats] = found;
  torch::autograd::set_history(output, node);
  if (has_residual) torch::autograd::set_history(sum, node);
  node->input = torch::autograd::SavedVariable(has_residual ? sum : input, has_residual);
  node->stats = torch::autograd::SavedVariable(stats, false);
  node->weight = torch::autograd::SavedVariable(gain, false);
  node->bias = torch::autograd::SavedVariable(offset, false);
  return {output, sum};
}

template <typename... Tensors>
bool needs_derivative(const Tensors&... tensors) {
  return torch::autograd::compute_requires_grad(tensors...);
}
template <typename... Tensors>
bool is_dual(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

Tensor layer_norm_autograd(const Tensor& input, c10::SymIntArrayRef shape,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  // PyTorch's operator has the derivative that forward mode asks for.
  if (is_dual(input, weight, bias)) return at::layer_norm_symint(input, shape, weight, bias, eps);
  if (needs_derivative(input, weight, bias))
    return std::get<0>(recorded("LayerNormBackward", input, {}, shape, weight, bias, eps, true));
  const at::AutoDispatchBelowADInplaceOrView below;
  return layer_norm_op().call(input, shape, weight, bias, eps);
}

Tensor rms_norm_autograd(const Tensor& input, c10::SymIntArrayRef shape,
                         const OptionalTensor& weight, double eps) {
  if (is_dual(input, weight)) return at::rms_norm_symint(input, shape, weight, eps);
  if (needs_derivative(input, weight))
    return std::get<0>(recorded("RMSNormBackward", input, {}, shape, weight, {}, eps, false));
  const at::AutoDispatchBelowADInplaceOrView below;
  return rms_norm_op().call(input, shape, weight, eps);
}

TensorPair add_layer_norm_autograd(const Tensor& input, const Tensor& residual,
                                   c10::SymIntArrayRef shape, const OptionalTensor& weight,
                                   const OptionalTensor& bias, double eps) {
  if (is_dual(input, residual, weight, bias)) {
    const Tensor sum = input + residual;
    return {at::layer_norm_symint(sum, shape, weight, bias, eps), sum};
  }
  if (needs_derivative(input, residual, weight, bias))
    return recorded("AddLayerNormBackward", input, residual, shape, weight, bias, eps, true);
  const at::AutoDispatchBelowADInplaceOrView below;
  return add_layer_norm_op().call(input, residual, shape, weight, bias, eps);
}

TensorPair add_rms_norm_autograd(const Tensor& input, const Tensor& residual,
                                 c10::SymIntArrayRef shape, const OptionalTensor& weight,
                                 double eps) {
  if (is_dual(input, residual, weight)) {
    const Tensor sum = input + residual;
    return {at::rms_norm_symint(sum, shape, weight, eps), sum};
  }
  if (needs_derivative(input, residual, weight))
    return recorded("AddRMSNormBackward", input, residual, shape, weight, {}, eps, false);
  const at::AutoDispatchBelowADInplaceOrView below;
  return add_rms_norm_op().call(input, residual, shape, weight, eps);
}

// On GPUs the kernels beneath are src/layernorm/gpu/norm/operators.py's.
void register_derivatives(torch::Library& library) {
  library.impl("layer_norm", layer_norm_autograd);
  library.impl("rms_norm", rms_norm_autograd);
  library.impl("add_layer_norm", add_layer_norm_autograd);
  library.impl("add_rms_norm", add_rms_norm_autograd);
}
TORCH_LIBRARY_IMPL(layernorm, AutogradCPU, library) { register_derivatives(library); }
TORCH_LIBRARY_IMPL(layernorm, AutogradCUDA, library) { register_derivatives(library); }

}  // namespace
}  // namespace layernorm
