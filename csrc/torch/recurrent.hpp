// The recurrent operators as PyTorch's dispatcher knows them, and a layer as the kernels see it.
#pragma once

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <vector>

#include "isa/capability.hpp"
#include "operators.hpp"

namespace layernorm {

using OptionalTensors = c10::List<std::optional<Tensor>>;

// A layer's parameters, in this order in every list of them.
enum Weight {
  kWeightIh,
  kWeightHh,
  kWeightHr,
  kBiasIh,
  kBiasHh,
  kGainIh,  // where inputs are summed, the one gain
  kGainHh,
  kBias,
  kBiasHn,
  kGainCell,
  kBiasCell,
  kWeights,
};

// Decodes what a layer computes; raises for codes that are not known.
void read_spec(at::IntArrayRef spec, double eps, Recurrent& r);
// Of the instruction set in use.
const RecurrentKernels& kernels_of(at::ScalarType type);

// The arguments of every recurrent operator but the gradients.
struct RecurrentInputs {
  Tensor input, h;
  OptionalTensor c;
  std::vector<OptionalTensor> weights;  // [kWeights]
  OptionalTensor resets;
  std::optional<std::vector<int64_t>> batch_sizes;
  std::vector<int64_t> spec;
  double eps = 0;
  bool reverse = false;
};

// What forward keeps for backward.
struct Saved {
  Tensor x, h, c, stats;
};

struct SavedShapes {
  std::vector<int64_t> x, h, c, stats;  // {0} where nothing is kept
};

// What kernels read: tensors checked, and where they had to be copied the copies.
struct Held {
  at::ScalarType type;  // of all of them
  std::vector<Tensor> tensors;

  // Where the elements are; null where there is no tensor.
  const void* hold(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape);
};

// A layer with its memory: whatever `r` points to is held by the tensors beside it.
class RecurrentLayer {
 public:
  explicit RecurrentLayer(const RecurrentInputs& inputs);

  Recurrent r{};
  const RecurrentKernels* kernels;
  at::TensorOptions options;  // of the elements
  at::ScalarType computed;    // the type computed in
  int64_t rows = 0;           // of all steps

  [[nodiscard]] bool packed() const { return r.batch_sizes != nullptr; }
  [[nodiscard]] std::vector<int64_t> output_shape() const;
  Tensor allocate(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  Tensor allocate_computed(at::IntArrayRef sizes) const;

  // What is kept for backward: c, and unless it is to be computed again all else.
  [[nodiscard]] SavedShapes saved_shapes(bool recompute) const;
  Saved keep(bool recompute);
  void use(const Saved& saved);
  // Runs forward into these tensors.
  void forward(const Tensor& output, const Tensor& hn, const Tensor& cn);

 private:
  // In this order: sizes, the input and its steps, parameters, the state and where it is reset.
  void read_sizes(const RecurrentInputs& inputs);
  void read_input(const RecurrentInputs& inputs);
  void hold_weights(const RecurrentInputs& inputs);
  void hold_state(const RecurrentInputs& inputs);

  Held held_;
  std::vector<int64_t> batch_sizes_, step_offsets_;
};

// Null where there is no element.
inline void* data_of(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
}
inline const void* data_of(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? tensor->const_data_ptr() : nullptr;
}

// Uninitialized working memory.
Tensor scratch(size_t bytes);
// The type that gradients of parameters are summed in.
inline at::ScalarType computed_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
// Prepares the parameters of a layer.
Tensor prepare(const RecurrentLayer& layer, bool backward);

#define LAYERNORM_RECURRENT_ARGUMENTS                                                            \
  const Tensor &input, const Tensor &h, const OptionalTensor &c, const OptionalTensors &weights, \
      const OptionalTensor &resets, at::OptionalIntArrayRef batch_sizes, at::IntArrayRef spec,   \
      double eps, bool reverse
#define LAYERNORM_RECURRENT_PASSED input, h, c, weights, resets, batch_sizes, spec, eps, reverse

using RecurrentOutputs = std::tuple<Tensor, Tensor, Tensor>;
using RecurrentForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using RecurrentGrads = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

using RecurrentOp = RecurrentOutputs(LAYERNORM_RECURRENT_ARGUMENTS, bool recompute);
using RecurrentForwardOp = RecurrentForwardOutputs(LAYERNORM_RECURRENT_ARGUMENTS, bool recompute);
using RecurrentBackwardOp = RecurrentGrads(LAYERNORM_RECURRENT_ARGUMENTS,
                                           const OptionalTensor& grad_output,
                                           const OptionalTensor& grad_h,
                                           const OptionalTensor& grad_c, const Tensor& output,
                                           const Tensor& saved_x, const Tensor& saved_h,
                                           const Tensor& saved_c, const Tensor& saved_stats,
                                           std::array<bool, 3 + kWeights> wanted);
using RecurrentCompositeBackwardOp = RecurrentGrads(LAYERNORM_RECURRENT_ARGUMENTS,
                                                    const OptionalTensor& grad_output,
                                                    const OptionalTensor& grad_h,
                                                    const OptionalTensor& grad_c,
                                                    std::array<bool, 3 + kWeights> wanted);

inline const auto& recurrent_op() {
  static const auto op = find<RecurrentOp>("layernorm::recurrent");
  return op;
}
inline const auto& recurrent_forward_op() {
  static const auto op = find<RecurrentForwardOp>("layernorm::recurrent_forward");
  return op;
}
inline const auto& recurrent_backward_op() {
  static const auto op = find<RecurrentBackwardOp>("layernorm::recurrent_backward");
  return op;
}
inline const auto& recurrent_composite_backward_op() {
  static const auto op =
      find<RecurrentCompositeBackwardOp>("layernorm::recurrent_composite_backward");
  return op;
}

}  // namespace layernorm
