// The arguments of the recurrent entries.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "recurrent/spec.hpp"
#include "tensor.hpp"

namespace layernorm {

// input, h, c, weights, resets, reset_h, reset_c, batch_sizes, spec, eps.
struct LayerArguments {
  static constexpr int kCount = 10;
  Tensor input, h, c, resets, reset_h, reset_c;
  std::array<Tensor, LAYERNORM_WEIGHTS> weights;
  Py_ssize_t count = 0;  // of weights
  std::optional<std::vector<int64_t>> batch_sizes;
  std::vector<int64_t> codes;
  double eps = 0;

  // False where a tensor is not plain.
  bool read(PyObject* const* arguments);
  [[nodiscard]] bool requires_grad() const;
  // Whether the kernels take the dtypes together.
  [[nodiscard]] bool fits() const;
};

// Whether a gain or bias may be beside rows of a dtype: it has that, or float32 beside half
// precision.
bool fits_vector(const Tensor& vector, Dtype rows);

// Tensors that had to be copied.
struct Held {
  Dtype dtype = Dtype::kFloat32;  // of all of them but gains and biases
  Dtype vectors = Dtype::kFloat32;
  std::vector<Tensor> copies;

  // Where the elements are; null where there is no tensor.
  const void* hold(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape);
  // Likewise of a gain or bias.
  const void* hold_vector(const Tensor& tensor, const char* name, int64_t size);
  // Decides the dtypes: if any of the vectors is float32, all of them are.
  template <typename Tensors>
  void decide(Dtype rows, const Tensors& given, layernorm_layer& layer) {
    dtype = vectors = rows;
    for (const Tensor& tensor : given)
      if (tensor.defined() && tensor.dims() == 1 && tensor.dtype() == Dtype::kFloat32 &&
          is_half(rows))
        vectors = Dtype::kFloat32;
    layer.dtype = c_dtype(dtype);
    layer.parameter_dtype = c_dtype(vectors);
  }

 private:
  const void* hold_as(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                      Dtype wanted);
};

}  // namespace layernorm
