// The part of an LSTM's step after its products, on PyTorch's tensors.
#include <array>

#include "entries.hpp"
#include "layer_arguments.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

constexpr int kTensors = 10;  // input_gates, hidden_gates, c, and seven parameters
// The places of the parameters among a layer's: all vectors but a GRU's.
constexpr int kPlaces[] = {LAYERNORM_BIAS_IH,  LAYERNORM_BIAS_HH, LAYERNORM_GAIN_IH,
                           LAYERNORM_GAIN_HH,  LAYERNORM_BIAS,    LAYERNORM_GAIN_CELL,
                           LAYERNORM_BIAS_CELL};
constexpr const char* kNames[] = {"input_gates", "hidden_gates", "c",    "bias_ih",   "bias_hh",
                                  "gain_ih",     "gain_hh",      "bias", "gain_cell", "bias_cell"};

// The arguments as the kernels see them, with the memory that they point to: kTensors tensors, spec
// and eps.
struct Step {
  std::array<Tensor, kTensors> tensors;
  std::vector<int64_t> codes;
  layernorm_layer layer{};
  Dtype dtype = Dtype::kOther;

  bool read(PyObject* const* arguments) {
    for (int i = 0; i < kTensors; ++i)
      if (i < 3 ? !tensors[i].read(arguments[i]) : !tensors[i].read_optional(arguments[i]))
        return false;
    codes = as_integers(arguments[kTensors], "spec");
    layer.eps = as_double(arguments[kTensors + 1]);
    return true;
  }
  [[nodiscard]] bool fits() const {
    const Dtype rows = tensors[2].dtype();
    for (int i = 0; i < kTensors; ++i)
      if (tensors[i].defined() &&
          (i < 3 ? tensors[i].dtype() != rows : !fits_vector(tensors[i], rows)))
        return false;
    return is_supported(rows);
  }
  [[nodiscard]] bool requires_grad() const {
    for (const Tensor& tensor : tensors)
      if (layernorm::requires_grad(tensor)) return true;
    return false;
  }
  [[nodiscard]] bool is_long() const { return layer.batch * layer.hidden_size > kGrain / 16; }

  void hold() {
    const Tensor& c = tensors[2];
    dtype = c.dtype();
    Recurrent r{};
    const std::string problem =
        decode_spec(codes.data(), static_cast<int64_t>(codes.size()), layer.eps, r);
    check(problem.empty(), problem);
    is_summed = r.inputs != Inputs::kSeparate;
    check(is_supported(dtype) && c.dims() == 2 && c.size(1) > 0,
          "c must have two dimensions, of float32, float64, bfloat16 or float16; got ", c.sizes(),
          " of ", name_of(dtype));
    layer.struct_size = sizeof(layer);
    held_.decide(dtype, tensors, layer);
    layer.spec = codes.data();
    layer.spec_count = static_cast<int64_t>(codes.size());
    layer.batch = c.size(0);
    layer.hidden_size = c.size(1);
    const int64_t N = layer.batch, H = layer.hidden_size;
    layer.c0 = held_.hold(c, kNames[2], {N, H});
    layer.input = held_.hold(tensors[0], kNames[0], {N, 4 * H});
    layer.h0 = held_.hold(tensors[1], kNames[1], {N, 4 * H});
    for (int i = 3; i < kTensors; ++i)
      layer.weights[kPlaces[i - 3]] =
          held_.hold_vector(tensors[i], kNames[i], i < kTensors - 2 ? 4 * H : H);
  }
  // A gradient of the state, in the type computed in; zeros for None.
  Tensor computed(const Tensor& grad, const char* name) const {
    const Tensor& c = tensors[2];
    if (!grad.defined()) {
      Tensor zeros = c.empty(c.sizes(), computed_dtype(dtype));
      zeros.clear();
      return zeros;
    }
    check(grad.sizes() == c.sizes() && grad.dtype() == dtype, name, " must be of shape ", c.sizes(),
          " and dtype ", name_of(dtype), ", got ", grad.sizes(), " of ", name_of(grad.dtype()));
    const Tensor cast = grad.to(computed_dtype(dtype));
    return cast.contiguous();
  }

  bool is_summed = false;

 private:
  Held held_;
};

PyObject* run_forward(Step& step) {
  step.hold();
  const Tensor& c = step.tensors[2];
  Tensor h = c.empty(c.sizes(), step.dtype);
  Tensor cn = c.empty(c.sizes(), step.dtype);
  ask_threads();
  layernorm_status status{};
  unlocked(step.is_long(),
           [&] { status = layernorm_lstm_gates_forward(&step.layer, h.data(), cn.data()); });
  check_status(status);
  return tuple_of(h, cn);
}

}  // namespace

// lstm_gates(input_gates, hidden_gates, c, bias_ih, bias_hh, gain_ih, gain_hh, bias, gain_cell,
// bias_cell, spec, eps): h and c.
PyObject* lstm_gates(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kTensors + 2, "lstm_gates");
    Step step;
    if (!is_plain_here() || !step.read(arguments) || !step.fits()) return not_implemented();
    Object found(run_forward(step));
    if (!is_grad_enabled() || !step.requires_grad()) return found.release();
    const Object all = checked(PyTuple_New(count + 1));
    for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SetItem(all.get(), i, Py_NewRef(arguments[i]));
    PyTuple_SetItem(all.get(), count, found.release());
    return checked(PyObject_Call(recorder("lstm_gates"), all.get(), nullptr)).release();
  });
}

// Likewise without a derivative.
PyObject* lstm_gates_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kTensors + 2, "lstm_gates_forward");
    Step step;
    if (!step.read(arguments)) return not_implemented();
    return run_forward(step);
  });
}

// lstm_gates_backward(grad_h, grad_c, ...as above, wanted): the gradients in the arguments' order;
// None for those not wanted. Where the products are summed, theirs is one and the same.
PyObject* lstm_gates_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kTensors + 5, "lstm_gates_backward");
    Step step;
    Tensor grad_h, grad_c;
    if (!grad_h.read_optional(arguments[0]) || !grad_c.read_optional(arguments[1]) ||
        !step.read(arguments + 2))
      return not_implemented();
    const std::vector<int64_t> wanted = as_integers(arguments[kTensors + 4], "wanted");
    check(wanted.size() == kTensors, "wanted must be a list of ", kTensors, ", got ",
          wanted.size());
    step.hold();
    const Tensor& c = step.tensors[2];
    const Dtype computed = computed_dtype(step.dtype);
    const Tensor of_h = step.computed(grad_h, "grad_hidden");
    const Tensor of_c = step.computed(grad_c, "grad_cn");
    std::array<Tensor, kTensors> found;
    layernorm_layer_gradients g{};
    g.struct_size = sizeof(g);
    g.grad_hn = of_h.data();
    g.grad_cn = of_c.data();
    found[0] = c.empty(step.tensors[0].sizes(), computed);
    if (!step.is_summed) found[1] = c.empty(step.tensors[1].sizes(), computed);
    found[2] = c.empty(c.sizes(), computed);
    g.grad_input = found[0].data();
    g.grad_h0 = found[1].data();
    g.grad_c0 = found[2].data();
    for (int i = 3; i < kTensors; ++i) {
      if (!wanted[i] || !step.tensors[i].defined()) continue;
      found[i] = c.empty(step.tensors[i].sizes(), computed);
      if (step.layer.batch == 0) found[i].clear();
      g.grad_weights[kPlaces[i - 3]] = found[i].data();
    }
    ask_threads();
    layernorm_status status{};
    unlocked(step.is_long(), [&] { status = layernorm_lstm_gates_backward(&step.layer, &g); });
    check_status(status);
    const Object all = checked(PyTuple_New(kTensors));
    for (int i = 0; i < kTensors; ++i) {
      const Tensor& grad = found[i == 1 && step.is_summed ? 0 : i];
      PyTuple_SetItem(all.get(), i,
                      wanted[i] && grad.defined() ? grad.to(step.tensors[i].dtype()).release()
                                                  : Py_NewRef(Py_None));
    }
    return Py_NewRef(all.get());
  });
}

}  // namespace layernorm
