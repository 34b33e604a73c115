// The norms of layernorm.h: the rows are shared among threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa/capability.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "status.hpp"

namespace layernorm {
namespace {

static_assert(LAYERNORM_MAX_DIMS == RowLayout::kMaxDims);

void check_dtype(layernorm_dtype dtype, const char* name) {
  check(dtype >= LAYERNORM_FLOAT32 && dtype <= LAYERNORM_FLOAT16, name, " is no layernorm_dtype");
}

Types types(layernorm_dtype rows, layernorm_dtype parameters) {
  const bool wide = parameters == LAYERNORM_FLOAT32;
  check(parameters == rows || (wide && (rows == LAYERNORM_BFLOAT16 || rows == LAYERNORM_FLOAT16)),
        "gain and bias must be of the rows' dtype, or float32 with rows of half precision");
  switch (rows) {
    case LAYERNORM_FLOAT32:
      return kFloat32;
    case LAYERNORM_FLOAT64:
      return kFloat64;
    case LAYERNORM_BFLOAT16:
      return wide ? kBFloat16Float32 : kBFloat16;
    default:
      return wide ? kFloat16Float32 : kFloat16;
  }
}

RowLayout layout_of(const layernorm_rows& rows) {
  check(rows.dims >= 0 && rows.dims <= LAYERNORM_MAX_DIMS, "rows must have at most ",
        LAYERNORM_MAX_DIMS, " dimensions");
  RowLayout layout;
  layout.dims = rows.dims;
  std::copy_n(rows.sizes, rows.dims, layout.sizes);
  std::copy_n(rows.strides, rows.dims, layout.strides);
  return layout;
}

void check_norm(const layernorm_norm* norm) {
  check_struct(norm, "norm");
  check_dtype(norm->dtype, "dtype");
  check_dtype(norm->parameter_dtype, "parameter_dtype");
  check(norm->rows >= 0 && norm->width >= 0, "rows and width must not be negative");
  check(norm->centred || norm->bias == nullptr, "RMS norm has no bias");
}

void forward(const layernorm_norm& norm, const layernorm_norm_forward_call& call) {
  check(norm.bias == nullptr || norm.gain != nullptr, "gain must be given where there is a bias");
  check(call.input.data != nullptr && call.output != nullptr, "input and output must be given");
  check((call.residual.data != nullptr) == (call.sum != nullptr),
        "residual and sum must be given together");
  const Forward all{call.input.data,
                    layout_of(call.input),
                    call.residual.data,
                    layout_of(call.residual),
                    norm.gain,
                    norm.bias,
                    call.output,
                    call.sum,
                    norm.centred ? call.mean : nullptr,
                    call.rstd,
                    norm.rows,
                    norm.width,
                    norm.eps};
  const auto& kernels =
      (*capability().norms)[norm.centred != 0][types(norm.dtype, norm.parameter_dtype)];
  in_parallel(norm.rows, norm.width,
              [&](int64_t begin, int64_t end) { kernels.forward(all, begin, end); });
}

// A number that rows and width alone decide; at most 64 blocks of at least 32 rows, and no more
// than 16 MiB of sums.
int64_t rows_per_block(int64_t rows, int64_t width) {
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 22) / (width + 1), 1, 64);
  return std::max<int64_t>(32, (rows + most - 1) / most);
}

void backward(const layernorm_norm& norm, const layernorm_norm_backward_call& call) {
  const bool parameters = call.grad_gain != nullptr || call.grad_bias != nullptr;
  check(call.grad.data != nullptr && call.input.data != nullptr && call.rstd != nullptr &&
            (call.mean != nullptr || !norm.centred),
        "grad, input and the statistics must be given");
  check(norm.centred || call.grad_bias == nullptr, "RMS norm has no bias");
  check(!parameters || norm.gain != nullptr,
        "gain must be given where a gradient of it or of the "
        "bias is wanted");
  if (call.grad_gain != nullptr) check_dtype(call.grad_gain_dtype, "the dtype of a gradient");
  if (call.grad_bias != nullptr) check_dtype(call.grad_bias_dtype, "the dtype of a gradient");
  const int64_t per_block = rows_per_block(norm.rows, norm.width);
  const int64_t blocks = (norm.rows + per_block - 1) / per_block;
  const size_t element = norm.dtype == LAYERNORM_FLOAT64 ? 8 : 4;
  const int64_t sums = blocks * norm.width;  // over each block, of the gain and of the bias
  const Scratch partial(parameters ? (norm.centred ? 2 : 1) * static_cast<size_t>(sums) * element
                                   : 0);
  auto* const block_gain = static_cast<char*>(partial.data());
  auto* const block_bias =
      parameters && norm.centred ? block_gain + static_cast<size_t>(sums) * element : nullptr;
  const Backward all{call.grad.data,
                     layout_of(call.grad),
                     call.grad_sum.data,
                     layout_of(call.grad_sum),
                     call.input.data,
                     layout_of(call.input),
                     norm.centred ? call.mean : nullptr,
                     call.rstd,
                     norm.gain,
                     call.grad_input,
                     block_gain,
                     block_bias,
                     norm.rows,
                     norm.width,
                     per_block};
  const auto& table = (*capability().norms)[norm.centred != 0];
  const auto& kernels = table[types(norm.dtype, norm.parameter_dtype)];
  const auto reduce = [&](const char* block_sums, void* total, layernorm_dtype dtype) {
    if (total == nullptr) return;
    const Reduce columns{block_sums, total, blocks, norm.width};
    table[types(norm.dtype, dtype)].reduce(columns, 0, norm.width);
  };
  // One parallel region: on a busy machine another could wait for a whole time slice. Whoever
  // finishes last adds up the blocks.
  std::atomic<int64_t> left{blocks};
  in_parallel(blocks, per_block * norm.width, [&](int64_t begin, int64_t end) {
    kernels.backward(all, begin, end);
    if (left.fetch_sub(end - begin, std::memory_order_acq_rel) > end - begin) return;
    reduce(block_gain, call.grad_gain, call.grad_gain_dtype);
    reduce(block_bias, call.grad_bias, call.grad_bias_dtype);
  });
}

// Without rows or columns: sums of nothing.
void backward_of_nothing(const layernorm_norm& norm, const layernorm_norm_backward_call& call) {
  const auto clear = [&](void* grad, layernorm_dtype dtype) {
    const size_t element = dtype == LAYERNORM_FLOAT64 ? 8 : dtype == LAYERNORM_FLOAT32 ? 4 : 2;
    if (grad != nullptr) std::memset(grad, 0, static_cast<size_t>(norm.width) * element);
  };
  clear(call.grad_gain, call.grad_gain_dtype);
  clear(call.grad_bias, call.grad_bias_dtype);
}

}  // namespace
}  // namespace layernorm

layernorm_status layernorm_norm_forward(const layernorm_norm* norm,
                                        const layernorm_norm_forward_call* call) {
  return layernorm::status_of([&] {
    layernorm::check_norm(norm);
    layernorm::check_struct(call, "call");
    if (norm->rows > 0 && norm->width > 0) layernorm::forward(*norm, *call);
  });
}

layernorm_status layernorm_norm_backward(const layernorm_norm* norm,
                                         const layernorm_norm_backward_call* call) {
  return layernorm::status_of([&] {
    layernorm::check_norm(norm);
    layernorm::check_struct(call, "call");
    if (norm->rows > 0 && norm->width > 0)
      layernorm::backward(*norm, *call);
    else
      layernorm::backward_of_nothing(*norm, *call);
  });
}
