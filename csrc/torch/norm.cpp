// The norm operators on CPU tensors: checks, allocates, and lets PyTorch's threads run the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include "isa/capability.hpp"
#include "isa/huge_pages.hpp"
#include "operators.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

Types types(at::ScalarType input, at::ScalarType parameter) {
  switch (input) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return parameter == at::kFloat ? kBFloat16Float32 : kBFloat16;
    default:
      return parameter == at::kFloat ? kFloat16Float32 : kFloat16;
  }
}

struct Sizes {
  int64_t rows = 1;
  int64_t width = 1;
  int64_t leading = 0;  // dimensions
};

Sizes checked_sizes(const Tensor& input, at::IntArrayRef shape) {
  require(input, "input");
  const auto tail = static_cast<int64_t>(shape.size());
  Sizes sizes;
  sizes.leading = input.dim() - tail;
  TORCH_CHECK(tail >= 1 && sizes.leading >= 0 && input.sizes().slice(sizes.leading) == shape,
              "layernorm: normalized_shape=", shape, " must be the tail of the input's shape ",
              input.sizes());
  TORCH_CHECK(input.device().is_cpu() && input.layout() == at::kStrided &&
                  is_supported(input.scalar_type()),
              "layernorm: the compiled kernels are for float32, float64, bfloat16 and float16 on "
              "the CPU, got ",
              input.scalar_type(), " on ", input.device());
  for (int64_t dim = 0; dim < sizes.leading; ++dim) sizes.rows *= input.size(dim);
  for (const int64_t size : shape) sizes.width *= size;
  return sizes;
}

Tensor checked_parameter(const OptionalTensor& tensor, const char* name, const Tensor& input,
                         at::IntArrayRef shape) {
  if (!is_given(tensor)) return {};
  TORCH_CHECK(tensor->sizes() == shape && tensor->device() == input.device() &&
                  fits_beside(tensor->scalar_type(), input.scalar_type()),
              "layernorm: ", name, " must be of shape ", shape, " and the input's dtype ",
              input.scalar_type(), " (float32 too beside a half input), on its device; got shape ",
              tensor->sizes(), " of ", tensor->scalar_type(), " on ", tensor->device());
  return tensor->contiguous();
}

// A tensor whose rows can be read in place, or a copy of it, and where its rows begin.
struct Rows {
  Tensor tensor;
  RowLayout layout;
};

Rows rows_of(const Tensor& tensor, const Sizes& sizes) {
  RowLayout layout;
  layout.dims = 1;
  layout.strides[0] = sizes.width;
  if (tensor.is_contiguous()) return {tensor, layout};
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= sizes.leading; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected)
      return {tensor.contiguous(), layout};
    expected *= tensor.size(dim);
  }
  // From the innermost out; a dimension that goes on where the one inside ends is one with it.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t dim = sizes.leading - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (!dims.empty() && tensor.stride(dim) == dims.back().second * dims.back().first)
      dims.back().first *= tensor.size(dim);
    else
      dims.emplace_back(tensor.size(dim), tensor.stride(dim));
  }
  if (dims.size() > RowLayout::kMaxDims) return {tensor.contiguous(), layout};
  layout.dims = static_cast<int>(dims.size());
  layout.strides[0] = 0;
  for (size_t i = 0; i < dims.size(); ++i)
    std::tie(layout.sizes[dims.size() - 1 - i], layout.strides[dims.size() - 1 - i]) = dims[i];
  return {tensor, layout};
}

Tensor fresh(at::IntArrayRef sizes, const Tensor& like) {
  Tensor tensor = at::empty(sizes, like.options());
  want_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  return tensor;
}

const void* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* mutable_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// (output, sum, stats): stats holds mean and rstd, [2, rows], without the mean where not centred,
// [1, rows], and is undefined where not wanted; sum is undefined without a residual.
TensorTriple run_forward(const Tensor& input, const OptionalTensor& residual, at::IntArrayRef shape,
                         const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         bool centred, bool with_stats) {
  const Sizes sizes = checked_sizes(input, shape);
  Tensor gain = checked_parameter(weight, "weight", input, shape);
  Tensor offset = checked_parameter(bias, "bias", input, shape);
  if (offset.defined()) {
    TORCH_CHECK(centred, "layernorm: RMS norm has no bias");
    if (!gain.defined()) gain = at::ones_like(offset);
    if (gain.scalar_type() != offset.scalar_type())
      std::tie(gain, offset) = std::pair(gain.to(at::kFloat), offset.to(at::kFloat));
  }
  const Tensor output = fresh(input.sizes(), input);
  Tensor sum;
  Tensor stats;
  Rows other;
  if (is_given(residual)) {
    TORCH_CHECK(residual->sizes() == input.sizes() &&
                    residual->scalar_type() == input.scalar_type() &&
                    residual->device() == input.device(),
                "layernorm: residual must be of the input's shape ", input.sizes(), " and dtype ",
                input.scalar_type(), ", got ", residual->sizes(), " and ", residual->scalar_type());
    other = rows_of(*residual, sizes);
    sum = fresh(input.sizes(), input);
  }
  const int64_t kinds = centred ? 2 : 1;
  if (with_stats)
    stats = at::empty({kinds, sizes.rows}, input.options().dtype(statistics_type(input)));
  if (sizes.rows == 0 || sizes.width == 0) {
    if (with_stats) stats.zero_();
    return {output, sum, stats};
  }
  const Rows rows = rows_of(input, sizes);
  auto* const mean = static_cast<char*>(mutable_or_null(stats));
  auto* const rstd = with_stats ? mean + (kinds - 1) * sizes.rows * stats.element_size() : nullptr;
  const Forward call{rows.tensor.const_data_ptr(),
                     rows.layout,
                     data_or_null(other.tensor),
                     other.layout,
                     data_or_null(gain),
                     data_or_null(offset),
                     output.mutable_data_ptr(),
                     mutable_or_null(sum),
                     centred ? mean : nullptr,
                     rstd,
                     sizes.rows,
                     sizes.width,
                     eps};
  const auto type = input.scalar_type();
  const auto kind = types(type, gain.defined() ? gain.scalar_type() : type);
  const auto& kernels = (*capability().norms)[centred][kind];
  in_parallel(sizes.rows, sizes.width,
              [&](int64_t begin, int64_t end) { kernels.forward(call, begin, end); });
  return {output, sum, stats};
}

Tensor layer_norm(const Tensor& input, at::IntArrayRef shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  return std::get<0>(run_forward(input, {}, shape, weight, bias, eps, true, false));
}

Tensor rms_norm(const Tensor& input, at::IntArrayRef shape, const OptionalTensor& weight,
                double eps) {
  return std::get<0>(run_forward(input, {}, shape, weight, {}, eps, false, false));
}

TensorPair add_layer_norm(const Tensor& input, const Tensor& residual, at::IntArrayRef shape,
                          const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  require(residual, "residual");
  auto [output, sum, _] = run_forward(input, residual, shape, weight, bias, eps, true, false);
  return {output, sum};
}

TensorPair add_rms_norm(const Tensor& input, const Tensor& residual, at::IntArrayRef shape,
                        const OptionalTensor& weight, double eps) {
  require(residual, "residual");
  auto [output, sum, _] = run_forward(input, residual, shape, weight, {}, eps, false, false);
  return {output, sum};
}

TensorTriple norm_forward(const Tensor& input, const OptionalTensor& residual,
                          at::IntArrayRef shape, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, bool centred) {
  auto [output, sum, stats] = run_forward(input, residual, shape, weight, bias, eps, centred, true);
  return {output, sum.defined() ? sum : at::empty({0}, input.options()), stats};
}

// A number that rows and width alone decide; at most 64 blocks of at least 32 rows, and no more
// than 16 MiB of sums.
int64_t rows_per_block(const Sizes& sizes) {
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 22) / (sizes.width + 1), 1, 64);
  return std::max<int64_t>(32, (sizes.rows + most - 1) / most);
}

// Gradients of input (which is the residual's too), weight and bias; those not wanted have no
// element.
TensorTriple norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& input,
                           const Tensor& given_stats, at::IntArrayRef shape,
                           const OptionalTensor& weight, const OptionalTensor& bias, bool centred,
                           std::array<bool, 3> wanted) {
  const Sizes sizes = checked_sizes(input, shape);
  const auto type = input.scalar_type();
  require(grad, "grad");
  require(given_stats, "stats");
  TORCH_CHECK(grad.sizes() == input.sizes() && grad.scalar_type() == type &&
                  grad.device() == input.device(),
              "layernorm: grad must be of the input's shape ", input.sizes(), " and dtype ", type,
              ", got ", grad.sizes(), " of ", grad.scalar_type());
  const int64_t kinds = centred ? 2 : 1;
  TORCH_CHECK(centred || !wanted[2], "layernorm: RMS norm has no bias");
  TORCH_CHECK(given_stats.sizes() == at::IntArrayRef({kinds, sizes.rows}) &&
                  given_stats.scalar_type() == statistics_type(input) &&
                  given_stats.device() == input.device(),
              "layernorm: stats must be those that norm_forward returned");
  const Tensor stats = given_stats.contiguous();
  const Tensor gain = checked_parameter(weight, "weight", input, shape);
  const Tensor offset = checked_parameter(bias, "bias", input, shape);
  const Tensor none =
      wanted[0] && wanted[1] && wanted[2] ? Tensor() : at::empty({0}, input.options());
  const Tensor grad_input = wanted[0] ? fresh(input.sizes(), input) : none;
  const auto like = [&](bool is_wanted, const Tensor& parameter) {
    if (!is_wanted) return none;
    return at::empty(shape, parameter.defined() ? parameter.options() : input.options());
  };
  const Tensor grad_gain = like(wanted[1], gain);
  const Tensor grad_bias = like(wanted[2], offset);
  const bool parameters = wanted[1] || wanted[2];
  const Tensor factor = parameters && !gain.defined() ? at::ones(shape, input.options()) : gain;
  if (sizes.rows == 0 || sizes.width == 0) {
    if (wanted[1]) grad_gain.zero_();
    if (wanted[2]) grad_bias.zero_();
    return {grad_input, grad_gain, grad_bias};
  }
  const Rows grads = rows_of(grad, sizes);
  const Rows inputs = rows_of(input, sizes);
  Rows sums;
  if (is_given(grad_sum)) {
    TORCH_CHECK(grad_sum->sizes() == input.sizes() && grad_sum->scalar_type() == type &&
                    grad_sum->device() == input.device(),
                "layernorm: grad_sum must be of the input's shape, dtype and device");
    sums = rows_of(*grad_sum, sizes);
  }
  const int64_t per_block = rows_per_block(sizes);
  const int64_t blocks = (sizes.rows + per_block - 1) / per_block;
  Tensor partial;  // sums over each block, for gain and for bias
  if (parameters) partial = at::empty({kinds, blocks, sizes.width}, stats.options());
  auto* const block_gain = static_cast<char*>(mutable_or_null(partial));
  auto* const block_bias =
      parameters && centred ? block_gain + blocks * sizes.width * stats.element_size() : nullptr;
  const auto* const mean = static_cast<const char*>(stats.const_data_ptr());
  const Backward call{grads.tensor.const_data_ptr(),
                      grads.layout,
                      data_or_null(sums.tensor),
                      sums.layout,
                      inputs.tensor.const_data_ptr(),
                      inputs.layout,
                      centred ? mean : nullptr,
                      mean + (kinds - 1) * sizes.rows * stats.element_size(),
                      data_or_null(factor),
                      wanted[0] ? grad_input.mutable_data_ptr() : nullptr,
                      block_gain,
                      block_bias,
                      sizes.rows,
                      sizes.width,
                      per_block};
  const auto& table = (*capability().norms)[centred];
  const auto kernels_for = [&](const Tensor& parameter) {
    return table[types(type, parameter.defined() ? parameter.scalar_type() : type)];
  };
  const auto kernels = kernels_for(factor);
  in_parallel(blocks, per_block * sizes.width,
              [&](int64_t begin, int64_t end) { kernels.backward(call, begin, end); });
  // The kernels sum columns in parts of at most 64.
  constexpr int64_t kColumns = 64;
  const auto reduce = [&](const char* block_sums, const Tensor& total, const Tensor& parameter) {
    const Reduce call{block_sums, total.mutable_data_ptr(), blocks, sizes.width};
    const int64_t parts = (sizes.width + kColumns - 1) / kColumns;
    in_parallel(parts, blocks * kColumns, [&](int64_t begin, int64_t end) {
      kernels_for(parameter).reduce(call, begin * kColumns, std::min(end * kColumns, sizes.width));
    });
  };
  if (wanted[1]) reduce(block_gain, grad_gain, gain);
  if (wanted[2]) reduce(block_bias, grad_bias, offset);
  return {grad_input, grad_gain, grad_bias};
}

TORCH_LIBRARY_IMPL(layernorm, CPU, library) {
  library.impl("layer_norm", layer_norm);
  library.impl("rms_norm", rms_norm);
  library.impl("add_layer_norm", add_layer_norm);
  library.impl("add_rms_norm", add_rms_norm);
  library.impl("norm_forward", norm_forward);
  library.impl("norm_backward", norm_backward);
}

}  // namespace
}  // namespace layernorm
