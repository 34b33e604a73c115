// Norms of PyTorch's tensors.
#include <array>
#include <limits>
#include <vector>

#include "entries.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

struct Arguments {
  Tensor input, residual, weight, bias;
  int64_t tail = 0;  // dimensions that are normalized over
  int64_t rows = 1, width = 1;
  double eps = 0;
  bool centred = true;

  [[nodiscard]] Sizes shape() const {
    const Sizes all = input.sizes();
    return {all.data + all.count - tail, tail};
  }
  [[nodiscard]] int64_t leading() const { return input.dims() - tail; }
  [[nodiscard]] bool is_long() const { return rows * width > kGrain; }

  void read_sizes() {
    for (int64_t dim = 0; dim < leading(); ++dim) rows *= input.size(dim);
    for (int64_t dim = leading(); dim < input.dims(); ++dim) width *= input.size(dim);
  }
};

// Whether gain and bias of this type may stand beside an input of that.
bool fits_beside(Dtype parameter, Dtype input) {
  return parameter == input || (parameter == Dtype::kFloat32 && is_half(input));
}

// How many dimensions a shape has that is the tail of the input's; -1 if it is not.
int64_t tail_of(PyObject* shape, const Tensor& input) {
  const bool is_tuple = PyTuple_Check(shape);
  if (!is_tuple && !PyList_Check(shape)) return -1;
  const Py_ssize_t tail = is_tuple ? PyTuple_Size(shape) : PyList_Size(shape);
  if (tail < 1 || tail > input.dims()) return -1;
  for (Py_ssize_t i = 0; i < tail; ++i) {
    PyObject* const item = is_tuple ? PyTuple_GetItem(shape, i) : PyList_GetItem(shape, i);
    if (!PyLong_CheckExact(item)) return -1;
    const long long size = PyLong_AsLongLong(item);
    if (size == -1 && PyErr_Occurred()) PyErr_Clear();
    if (size != input.size(input.dims() - tail + i)) return -1;
  }
  return tail;
}

bool fits(const Tensor& parameter, const Arguments& call) {
  return !parameter.defined() ||
         (parameter.sizes() == call.shape() && fits_beside(parameter.dtype(), call.input.dtype()));
}

// A tensor whose rows can be read in place, or a copy of it, and where its rows begin.
struct Rows {
  Tensor copy;
  layernorm_rows rows{};

  Rows() = default;
  Rows(const Tensor& tensor, const Arguments& call) {
    rows.dims = 1;
    rows.strides[0] = call.width;
    rows.data = tensor.data();
    if (tensor.is_contiguous() || read_in_place(tensor, call.leading())) return;
    copy = tensor.contiguous();
    rows.data = copy.data();
  }

 private:
  bool read_in_place(const Tensor& tensor, int64_t leading) {
    int64_t expected = 1;
    for (int64_t dim = tensor.dims() - 1; dim >= leading; --dim) {
      if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
      expected *= tensor.size(dim);
    }
    // From the innermost out; a dimension that goes on where the one inside ends is one with it.
    std::vector<std::pair<int64_t, int64_t>> dims;
    for (int64_t dim = leading - 1; dim >= 0; --dim) {
      if (tensor.size(dim) == 1) continue;
      if (!dims.empty() && tensor.stride(dim) == dims.back().second * dims.back().first)
        dims.back().first *= tensor.size(dim);
      else
        dims.emplace_back(tensor.size(dim), tensor.stride(dim));
    }
    if (dims.size() > LAYERNORM_MAX_DIMS) return false;
    rows.dims = static_cast<int32_t>(dims.size());
    rows.strides[0] = 0;
    for (size_t i = 0; i < dims.size(); ++i)
      std::tie(rows.sizes[dims.size() - 1 - i], rows.strides[dims.size() - 1 - i]) = dims[i];
    return true;
  }
};

// Gain and bias as the kernels read them: contiguous, of one dtype, and a gain where there is a
// bias or `always`.
struct Parameters {
  Tensor gain, bias;

  Parameters(const Arguments& call, bool always) {
    if (call.weight.defined()) gain = call.weight.contiguous();
    if (call.bias.defined()) bias = call.bias.contiguous();
    if (!gain.defined() && (bias.defined() || always)) {
      const Tensor& like = bias.defined() ? bias : call.input;
      gain = like.empty(call.shape(), like.dtype());
      gain.fill_one();
    }
  }
  void unify() {
    if (!bias.defined() || gain.dtype() == bias.dtype()) return;
    gain = gain.to(Dtype::kFloat32);
    bias = bias.to(Dtype::kFloat32);
  }
};

layernorm_norm norm_of(const Arguments& call, const Parameters& parameters) {
  return {sizeof(layernorm_norm),
          c_dtype(call.input.dtype()),
          c_dtype(parameters.gain.defined() ? parameters.gain.dtype() : call.input.dtype()),
          call.centred,
          call.rows,
          call.width,
          call.eps,
          parameters.gain.data(),
          parameters.bias.data()};
}

// (output, sum, stats): stats holds mean and rstd, [2, rows], without the mean where not centred,
// [1, rows].
std::array<Tensor, 3> run_forward(const Arguments& call, bool with_stats) {
  const Tensor& input = call.input;
  Parameters parameters(call, false);
  parameters.unify();
  Tensor output = input.empty_like();
  Tensor sum, stats;
  Rows residual;
  if (call.residual.defined()) {
    sum = input.empty_like();
    residual = Rows(call.residual, call);
  }
  const int64_t kinds = call.centred ? 2 : 1;
  if (with_stats) stats = input.empty({kinds, call.rows}, computed_dtype(input.dtype()));
  if (call.rows == 0 || call.width == 0) {
    if (with_stats) stats.clear();
  } else {
    const Rows rows(input, call);
    auto* const mean = static_cast<char*>(stats.data());
    const int64_t offset = (kinds - 1) * call.rows * static_cast<int64_t>(stats.element_size());
    const layernorm_norm norm = norm_of(call, parameters);
    const layernorm_norm_forward_call all{sizeof(all),
                                          rows.rows,
                                          residual.rows,
                                          output.data(),
                                          sum.data(),
                                          call.centred ? mean : nullptr,
                                          with_stats ? mean + offset : nullptr};
    layernorm_status status{};
    unlocked(call.is_long(), [&] { status = layernorm_norm_forward(&norm, &all); });
    check_status(status);
  }
  return {std::move(output), std::move(sum), std::move(stats)};
}

// What a user's call gives, in this order: input[, residual], normalized_shape, weight[, bias],
// eps. False where it is not plain.
bool parse(PyObject* const* arguments, Py_ssize_t count, bool has_residual, bool has_bias,
           Arguments& call) {
  if (count != 4 + has_residual + has_bias || !is_plain_here()) return false;
  PyObject* const* next = arguments;
  if (!call.input.read(*next++) || !is_supported(call.input.dtype())) return false;
  if (has_residual &&
      (!call.residual.read(*next++) || !(call.residual.sizes() == call.input.sizes()) ||
       call.residual.dtype() != call.input.dtype()))
    return false;
  call.tail = tail_of(*next++, call.input);
  if (call.tail < 0 || !call.weight.read_optional(*next++) || !fits(call.weight, call))
    return false;
  if (has_bias && (!call.bias.read_optional(*next++) || !fits(call.bias, call))) return false;
  if (*next == Py_None && !has_bias)
    call.eps = call.input.dtype() == Dtype::kFloat64
                   ? std::numeric_limits<double>::epsilon()
                   : static_cast<double>(std::numeric_limits<float>::epsilon());
  else if (PyFloat_CheckExact(*next))
    call.eps = PyFloat_AsDouble(*next);
  else
    return false;
  call.centred = has_bias;
  call.read_sizes();
  return true;
}

PyObject* called(const char* name, PyObject* const* arguments, Py_ssize_t count, bool has_residual,
                 bool has_bias) {
  return guarded([&] {
    Arguments call;
    if (!parse(arguments, count, has_residual, has_bias, call)) return not_implemented();
    const bool is_recorded =
        is_grad_enabled() && (requires_grad(call.input) || requires_grad(call.residual) ||
                              requires_grad(call.weight) || requires_grad(call.bias));
    ask_threads();
    auto [output, sum, stats] = run_forward(call, is_recorded);
    if (is_recorded) {
      const Object found(tuple_of(output, sum, stats));
      const Object eps = checked(PyFloat_FromDouble(call.eps));
      PyObject* const none = Py_None;
      return checked(PyObject_CallFunctionObjArgs(
                         recorder(name), arguments[0], has_residual ? arguments[1] : none,
                         arguments[1 + has_residual], arguments[2 + has_residual],
                         has_bias ? arguments[3 + has_residual] : none, eps.get(),
                         has_bias ? Py_True : Py_False, found.get(), nullptr))
          .release();
    }
    return has_residual ? tuple_of(output, sum) : output.release();
  });
}

// The sizes of a shape, which need not fit; raises where it is no sequence of integers.
void read_shape(PyObject* shape, Arguments& call) {
  const std::vector<int64_t> sizes = as_integers(shape, "normalized_shape");
  const Sizes wanted{sizes.data(), static_cast<int64_t>(sizes.size())};
  call.tail = wanted.count;
  check(wanted.count >= 1 && wanted.count <= call.input.dims() && call.shape() == wanted,
        "normalized_shape=", wanted, " must be the tail of the input's shape ", call.input.sizes());
  check(is_supported(call.input.dtype()),
        "the compiled kernels are for float32, float64, bfloat16 and float16 on the CPU, got ",
        name_of(call.input.dtype()), " on cpu");
  call.read_sizes();
}

void check_parameter(const Tensor& tensor, const char* name, const Arguments& call) {
  check(fits(tensor, call), "layernorm: ", name, " must be of shape ", call.shape(),
        " and the input's dtype ", name_of(call.input.dtype()),
        " (float32 too beside a half input), on its device; got shape ", tensor.sizes(), " of ",
        name_of(tensor.dtype()), " on cpu");
}

void check_like_input(const Tensor& tensor, const char* name, const Arguments& call) {
  check(!tensor.defined() ||
            (tensor.sizes() == call.input.sizes() && tensor.dtype() == call.input.dtype()),
        name, " must be of the input's shape ", call.input.sizes(), " and dtype ",
        name_of(call.input.dtype()), ", got ", tensor.sizes(), " of ", name_of(tensor.dtype()));
}

}  // namespace

PyObject* layer_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return called("layer_norm", arguments, count, false, true);
}
PyObject* rms_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return called("rms_norm", arguments, count, false, false);
}
PyObject* add_layer_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return called("add_layer_norm", arguments, count, true, true);
}
PyObject* add_rms_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return called("add_rms_norm", arguments, count, true, false);
}

// norm_forward(input, residual, normalized_shape, weight, bias, eps, centred, with_stats): output,
// sum (None without a residual), stats (None where not wanted). NotImplemented where a tensor is
// not plain.
PyObject* norm_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, 8, "norm_forward");
    Arguments call;
    if (!call.input.read(arguments[0]) || !call.residual.read_optional(arguments[1]) ||
        !call.weight.read_optional(arguments[3]) || !call.bias.read_optional(arguments[4]))
      return not_implemented();
    read_shape(arguments[2], call);
    call.eps = as_double(arguments[5]);
    call.centred = as_flag(arguments[6]);
    check_parameter(call.weight, "weight", call);
    check_parameter(call.bias, "bias", call);
    check(call.centred || !call.bias.defined(), "RMS norm has no bias");
    check_like_input(call.residual, "residual", call);
    ask_threads();
    auto [output, sum, stats] = run_forward(call, as_flag(arguments[7]));
    return tuple_of(output, sum, stats);
  });
}

// norm_backward(grad, grad_sum, input, stats, normalized_shape, weight, bias, centred, wanted):
// gradients of the input (which is the residual's too), weight and bias; None for those not wanted.
// NotImplemented where a tensor is not plain.
PyObject* norm_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, 9, "norm_backward");
    Arguments call;
    Tensor grad, grad_sum, stats;
    if (!grad.read(arguments[0]) || !grad_sum.read_optional(arguments[1]) ||
        !call.input.read(arguments[2]) || !stats.read(arguments[3]) ||
        !call.weight.read_optional(arguments[5]) || !call.bias.read_optional(arguments[6]))
      return not_implemented();
    read_shape(arguments[4], call);
    call.centred = as_flag(arguments[7]);
    const std::vector<int64_t> wanted = as_integers(arguments[8], "wanted");
    check(wanted.size() == 3, "wanted must be a list of 3, got ", wanted.size());
    const Tensor& input = call.input;
    const Dtype dtype = input.dtype();
    check_like_input(grad, "grad", call);
    check_like_input(grad_sum, "grad_sum", call);
    check(call.centred || !wanted[2], "RMS norm has no bias");
    check_parameter(call.weight, "weight", call);
    check_parameter(call.bias, "bias", call);
    const int64_t kinds = call.centred ? 2 : 1;
    check(stats.dims() == 2 && stats.size(0) == kinds && stats.size(1) == call.rows &&
              stats.dtype() == computed_dtype(dtype),
          "stats must be those that norm_forward returned");
    if (!stats.is_contiguous()) stats = stats.contiguous();
    const Parameters parameters(call, wanted[1] || wanted[2]);
    const auto fresh = [&](bool is_wanted, const Tensor& parameter) {
      if (!is_wanted) return Tensor();
      return parameter.defined() ? parameter.empty_like() : input.empty(call.shape(), dtype);
    };
    Tensor grad_input = wanted[0] ? input.empty_like() : Tensor();
    Tensor grad_gain = fresh(wanted[1], call.weight);
    Tensor grad_bias = fresh(wanted[2], call.bias);
    const Rows grads(grad, call), inputs(input, call);
    const Rows sums = grad_sum.defined() ? Rows(grad_sum, call) : Rows();
    const auto* const mean = static_cast<const char*>(stats.data());
    const int64_t offset = (kinds - 1) * call.rows * static_cast<int64_t>(stats.element_size());
    layernorm_norm norm = norm_of(call, parameters);
    norm.bias = nullptr;  // not read
    const layernorm_norm_backward_call all{
        sizeof(all),
        grads.rows,
        sums.rows,
        inputs.rows,
        call.centred ? mean : nullptr,
        mean + offset,
        grad_input.data(),
        grad_gain.data(),
        grad_bias.data(),
        c_dtype(grad_gain.defined() ? grad_gain.dtype() : dtype),
        c_dtype(grad_bias.defined() ? grad_bias.dtype() : dtype)};
    ask_threads();
    layernorm_status status{};
    unlocked(call.is_long(), [&] { status = layernorm_norm_backward(&norm, &all); });
    check_status(status);
    return tuple_of(grad_input, grad_gain, grad_bias);
  });
}

}  // namespace layernorm
