// The arguments of the recurrent entries.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "recurrent/spec.hpp"
#include "tensor.hpp"

namespace layernorm {

// input, h, c, weights, resets, batch_sizes, spec, eps.
struct LayerArguments {
  Tensor input, h, c, resets;
  std::array<Tensor, LAYERNORM_WEIGHTS> weights;
  Py_ssize_t count = 0;  // of weights
  std::optional<std::vector<int64_t>> batch_sizes;
  std::vector<int64_t> codes;
  double eps = 0;

  // False where a tensor is not plain.
  bool read(PyObject* const* arguments);
  [[nodiscard]] bool requires_grad() const;
  [[nodiscard]] bool is_of_one_dtype() const;
};

// Tensors that had to be copied.
struct Held {
  Dtype dtype = Dtype::kFloat32;  // of all of them
  std::vector<Tensor> copies;

  // Where the elements are; null where there is no tensor.
  const void* hold(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape);
};

}  // namespace layernorm
