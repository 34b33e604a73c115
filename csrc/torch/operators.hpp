// The operators as PyTorch's dispatcher knows them: signatures and handles. Schemas and fake
// kernels are in src/layernorm/ops.py. This folder alone includes PyTorch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>

namespace layernorm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;

// PyTorch hands None on as a tensor that is not defined, where the schema has a Tensor too.
inline bool is_given(const OptionalTensor& tensor) { return tensor && tensor->defined(); }
inline void require(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), "layernorm: ", name, " must be a Tensor, got None");
}

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || is_half(type);
}

// Whether gain and bias of this type may stand beside an input of that.
inline bool fits_beside(at::ScalarType parameter, at::ScalarType input) {
  return parameter == input || (parameter == at::kFloat && is_half(input));
}

// What mean, rstd and all sums are kept in.
inline at::ScalarType statistics_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using LayerNorm = Tensor(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&,
                         const OptionalTensor&, double);
using RmsNorm = Tensor(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&, double);
using AddLayerNorm = TensorPair(const Tensor&, const Tensor&, c10::SymIntArrayRef,
                                const OptionalTensor&, const OptionalTensor&, double);
using AddRmsNorm = TensorPair(const Tensor&, const Tensor&, c10::SymIntArrayRef,
                              const OptionalTensor&, double);
using NormForward = TensorTriple(const Tensor&, const OptionalTensor&, c10::SymIntArrayRef,
                                 const OptionalTensor&, const OptionalTensor&, double, bool);
using NormBackward = TensorTriple(const Tensor&, const OptionalTensor&, const Tensor&,
                                  const Tensor&, c10::SymIntArrayRef, const OptionalTensor&,
                                  const OptionalTensor&, bool, std::array<bool, 3>);

inline const auto& layer_norm_op() {
  static const auto op = find<LayerNorm>("layernorm::layer_norm");
  return op;
}
inline const auto& rms_norm_op() {
  static const auto op = find<RmsNorm>("layernorm::rms_norm");
  return op;
}
inline const auto& add_layer_norm_op() {
  static const auto op = find<AddLayerNorm>("layernorm::add_layer_norm");
  return op;
}
inline const auto& add_rms_norm_op() {
  static const auto op = find<AddRmsNorm>("layernorm::add_rms_norm");
  return op;
}

inline const auto& norm_forward_op() {
  static const auto op = find<NormForward>("layernorm::norm_forward");
  return op;
}
inline const auto& norm_backward_op() {
  static const auto op = find<NormBackward>("layernorm::norm_backward");
  return op;
}

}  // namespace layernorm
