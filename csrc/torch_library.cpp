// Binds the kernels to PyTorch's operators through its stable ABI: the only file that includes
// torch. The schemas, the fake kernels and the derivatives are in src/layernorm/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "row_norm.hpp"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows [begin, end) of x[rows, width]. LAYERNORM_CLONES comes from CMakeLists.txt: versions of this
// loop for several instruction sets, where the compiler can make them.
LAYERNORM_CLONES void norm_rows(const float* x, const float* gain, const float* bias, float* y,
                                float* mean, float* rstd, int64_t begin, int64_t end, int64_t width,
                                float eps) {
  for (int64_t row = begin; row < end; ++row) {
    const auto stats = layernorm::row_statistics(x + row * width, width, eps);
    layernorm::row_forward(x + row * width, gain, bias, y + row * width, width, stats);
    mean[row] = stats.mean;
    rstd[row] = stats.rstd;
  }
}

Tensor checked(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "layernorm::layer_norm: ", name,
                  " must be float32 for the compiled kernel");
  STD_TORCH_CHECK(tensor.is_cpu(), "layernorm::layer_norm: ", name, " must be on the CPU");
  return torch::stable::contiguous(tensor);
}

std::optional<Tensor> checked(const std::optional<Tensor>& tensor, const char* name,
                              int64_t width) {
  if (!tensor) return std::nullopt;
  STD_TORCH_CHECK(tensor->numel() == width, "layernorm::layer_norm: ", name, " must have ", width,
                  " elements, got ", tensor->numel());
  return checked(*tensor, name);
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// Returns (output, mean, rstd); mean and rstd have the leading shape with the normalized
// dimensions kept as 1.
std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input,
                                              torch::headeronly::IntHeaderOnlyArrayRef shape,
                                              const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  const auto sizes = input.sizes();
  const auto tail = static_cast<int64_t>(shape.size());
  const auto leading = static_cast<int64_t>(sizes.size()) - tail;
  STD_TORCH_CHECK(tail >= 1 && leading >= 0,
                  "layernorm::layer_norm: normalized_shape must be the tail of the input's shape");
  std::vector<int64_t> stats_sizes(sizes.begin(), sizes.end());
  int64_t width = 1;
  for (int64_t i = 0; i < tail; ++i) {
    STD_TORCH_CHECK(
        sizes[leading + i] == shape[i],
        "layernorm::layer_norm: normalized_shape must be the tail of the input's shape");
    width *= shape[i];
    stats_sizes[leading + i] = 1;
  }
  int64_t rows = 1;
  for (int64_t i = 0; i < leading; ++i) rows *= sizes[i];

  const Tensor x = checked(input, "input");
  const auto gain = checked(weight, "weight", width);
  const auto offset = checked(bias, "bias", width);
  Tensor output = torch::stable::empty(sizes, ScalarType::Float);
  Tensor mean = torch::stable::empty(stats_sizes, ScalarType::Float);
  Tensor rstd = torch::stable::empty(stats_sizes, ScalarType::Float);
  if (rows == 0) return {output, mean, rstd};

  const float* const x_data = x.const_data_ptr<float>();
  const float* const gain_data = data_or_null(gain);
  const float* const bias_data = data_or_null(offset);
  float* const y_data = output.mutable_data_ptr<float>();
  float* const mean_data = mean.mutable_data_ptr<float>();
  float* const rstd_data = rstd.mutable_data_ptr<float>();
  // 16,384 elements take about 2 us: below that a second thread costs more than it brings.
  const int64_t grain = 1 + 16384 / (width + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    norm_rows(x_data, gain_data, bias_data, y_data, mean_data, rstd_data, begin, end, width,
              static_cast<float>(eps));
  });
  return {output, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layernorm, CPU, library) {
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
}
