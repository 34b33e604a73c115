// The part of a step after its products, of an LSTM or a GRU, on PyTorch's tensors.
#include <array>
#include <iterator>
#include <utility>

#include "entries.hpp"
#include "layer_arguments.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

// input_gates, hidden_gates, the state (c of an LSTM, h of a GRU), and all gains and biases of a
// layer in their order.
constexpr int kState = 2;
constexpr int kInputs = 3;
constexpr int kVectors = LAYERNORM_WEIGHTS - LAYERNORM_BIAS_IH;
constexpr int kTensors = kInputs + kVectors;
constexpr int kCount = kTensors + 2;  // spec and eps
constexpr const char* kNames[] = {"bias_ih", "bias_hh", "gain_ih",   "gain_hh",
                                  "bias",    "bias_hn", "gain_cell", "bias_cell"};
static_assert(std::size(kNames) == kVectors);

// The arguments as the kernels see them, with the memory that they point to.
struct Step {
  std::array<Tensor, kTensors> tensors;
  std::vector<int64_t> codes;
  layernorm_layer layer{};
  Dtype dtype = Dtype::kOther;
  bool is_lstm = false;
  bool is_summed = false;
  int64_t width = 0;  // G·H

  // The kCount arguments; false where a tensor is not plain.
  bool read(PyObject* const* arguments) {
    for (int i = 0; i < kTensors; ++i)
      if (i < kInputs ? !tensors[i].read(arguments[i]) : !tensors[i].read_optional(arguments[i]))
        return false;
    codes = as_integers(arguments[kTensors], "spec");
    layer.eps = as_double(arguments[kTensors + 1]);
    Recurrent r{};
    const std::string problem =
        decode_spec(codes.data(), static_cast<int64_t>(codes.size()), layer.eps, r);
    check(problem.empty(), problem);
    check(r.cell != CellKind::kRnn, "spec must be of an LSTM or a GRU");
    is_lstm = r.cell == CellKind::kLstm;
    is_summed = r.inputs == Inputs::kSummed;
    dtype = state().dtype();
    if (state().dims() != 2) return true;
    layer.batch = state().size(0);
    layer.hidden_size = state().size(1);
    width = r.gates * layer.hidden_size;
    return true;
  }
  [[nodiscard]] const Tensor& state() const { return tensors[kState]; }
  [[nodiscard]] const char* state_name() const { return is_lstm ? "c" : "h"; }
  [[nodiscard]] int64_t size_of_vector(int place) const {
    return place + LAYERNORM_BIAS_IH < LAYERNORM_BIAS_HN ? width : layer.hidden_size;
  }

  // Whether the kernels take these shapes and dtypes.
  [[nodiscard]] bool fits() const {
    if (!is_supported(dtype) || state().dims() != 2 || layer.hidden_size == 0) return false;
    const int64_t products[] = {layer.batch, width};
    for (int i = 0; i < kState; ++i)
      if (tensors[i].dtype() != dtype || !(tensors[i].sizes() == Sizes{products, 2})) return false;
    for (int i = 0; i < kVectors; ++i) {
      const Tensor& vector = tensors[kInputs + i];
      const int64_t size = size_of_vector(i);
      if (vector.defined() && (!fits_vector(vector, dtype) || !(vector.sizes() == Sizes{&size, 1})))
        return false;
    }
    return true;
  }
  [[nodiscard]] bool requires_grad() const {
    for (const Tensor& tensor : tensors)
      if (layernorm::requires_grad(tensor)) return true;
    return false;
  }
  [[nodiscard]] bool is_long() const { return layer.batch * layer.hidden_size > kGrain / 16; }

  void hold() {
    check(is_supported(dtype) && state().dims() == 2 && layer.hidden_size > 0, state_name(),
          " must have two dimensions, of float32, float64, bfloat16 or float16; got ",
          state().sizes(), " of ", name_of(dtype));
    layer.struct_size = sizeof(layer);
    layer.spec = codes.data();
    layer.spec_count = static_cast<int64_t>(codes.size());
    held_.decide(dtype, tensors, layer);
    layer.input = held_.hold(tensors[0], "input_gates", {layer.batch, width});
    hidden_gates = held_.hold(tensors[1], "hidden_gates", {layer.batch, width});
    (is_lstm ? layer.c0 : layer.h0) = hold_state(state(), state_name());
    for (int i = 0; i < kVectors; ++i)
      layer.weights[LAYERNORM_BIAS_IH + i] =
          held_.hold_vector(tensors[kInputs + i], kNames[i], size_of_vector(i));
  }
  // Null where there is none.
  const void* hold_state(const Tensor& tensor, const char* name) {
    return held_.hold(tensor, name, {layer.batch, layer.hidden_size});
  }

  const void* hidden_gates = nullptr;

 private:
  Held held_;
};

// The new state, a tuple: h, and an LSTM's c.
PyObject* run_forward(Step& step) {
  step.hold();
  const Tensor& state = step.state();
  Tensor h = state.empty(state.sizes(), step.dtype);
  Tensor c;
  if (step.is_lstm) c = state.empty(state.sizes(), step.dtype);
  ask_threads();
  layernorm_status status{};
  unlocked(step.is_long(), [&] {
    status = layernorm_gates_forward(&step.layer, step.hidden_gates, h.data(), c.data());
  });
  check_status(status);
  return step.is_lstm ? tuple_of(h, c) : tuple_of(h);
}

// The vectors among the weights, by the names that a variant has for them, which are None for those
// that it does not have. False where `weights` is no plain dict, or is not the variant's.
bool list_vectors(PyObject* weights, PyObject* names, std::array<Object, kVectors>& listed) {
  if (!PyTuple_Check(names) || PyTuple_Size(names) != kVectors)
    throw TypeProblem("layernorm: names must be a tuple of the names of all vectors");
  if (!PyDict_CheckExact(weights)) return false;
  Py_ssize_t found = 0;
  for (int i = 0; i < kVectors; ++i) {
    PyObject* const name = PyTuple_GetItem(names, i);
    PyObject* const given = name == Py_None ? nullptr : PyDict_GetItemWithError(weights, name);
    if (PyErr_Occurred()) throw PythonError();
    const int place = LAYERNORM_BIAS_IH + i;
    const bool is_gain = place == LAYERNORM_GAIN_IH || place == LAYERNORM_GAIN_HH ||
                         place == LAYERNORM_GAIN_CELL;  // for the caller to look at
    if (given == Py_None || (given == nullptr && name != Py_None && is_gain)) return false;
    listed[i] = Object::of_borrowed(given == nullptr ? Py_None : given);
    found += given != nullptr;
  }
  return found == PyDict_Size(weights);
}

// The same with its derivative recorded.
PyObject* recorded(const Step& step, PyObject* codes, PyObject* eps, Object state) {
  const Object all = checked(PyTuple_New(kCount + 1));
  for (int i = 0; i < kTensors; ++i) {
    PyObject* const tensor = step.tensors[i].defined() ? step.tensors[i].object() : Py_None;
    PyTuple_SetItem(all.get(), i, Py_NewRef(tensor));
  }
  PyTuple_SetItem(all.get(), kTensors, Py_NewRef(codes));
  PyTuple_SetItem(all.get(), kTensors + 1, Py_NewRef(eps));
  PyTuple_SetItem(all.get(), kCount, state.release());
  return checked(PyObject_Call(recorder("gates"), all.get(), nullptr)).release();
}

}  // namespace

// gates(input_gates, hidden_gates, state, weights, names, spec, eps): the new state. Weights are a
// dict of gains and biases, and names those that the spec's variant has for all vectors.
PyObject* gates(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kInputs + 4, "gates");
    PyObject *const codes = arguments[kInputs + 2], *const eps = arguments[kInputs + 3];
    std::array<Object, kVectors> vectors;
    if (!is_plain_here() || !list_vectors(arguments[kInputs], arguments[kInputs + 1], vectors))
      return not_implemented();
    PyObject* all[kCount] = {arguments[0], arguments[1], arguments[kState]};
    for (int i = 0; i < kVectors; ++i) all[kInputs + i] = vectors[i].get();
    all[kTensors] = codes;
    all[kTensors + 1] = eps;
    Step step;
    if (!step.read(all) || !step.fits()) return not_implemented();
    Object state(run_forward(step));
    if (!is_grad_enabled() || !step.requires_grad()) return state.release();
    return recorded(step, codes, eps, std::move(state));
  });
}

// gates_forward(input_gates, hidden_gates, state, all vectors, spec, eps): likewise, without a
// derivative.
PyObject* gates_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kCount, "gates_forward");
    Step step;
    return step.read(arguments) ? run_forward(step) : not_implemented();
  });
}

// gates_backward(grads of the new state, a list; ...as gates_forward, wanted): the gradients in the
// arguments' order; None for those not wanted. Where the products are summed, theirs is one and the
// same.
PyObject* gates_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, kCount + 2, "gates_backward");
    PyObject* const grads = arguments[0];
    Step step;
    if (!step.read(arguments + 1)) return not_implemented();
    const Py_ssize_t states = step.is_lstm ? 2 : 1;
    check(PyList_Check(grads) && PyList_Size(grads) == states, "grads must be a list of ", states);
    std::array<Tensor, 2> of_state;
    for (Py_ssize_t i = 0; i < states; ++i)
      if (!of_state[i].read_optional(PyList_GetItem(grads, i))) return not_implemented();
    const std::vector<int64_t> wanted = as_integers(arguments[kCount + 1], "wanted");
    check(wanted.size() == kTensors, "wanted must be a list of ", kTensors, ", got ",
          wanted.size());
    step.hold();
    const Tensor& state = step.state();
    std::array<Tensor, kTensors> found;
    layernorm_layer_gradients g{};
    g.struct_size = sizeof(g);
    g.grad_hn = step.hold_state(of_state[0], "the gradient of h");
    g.grad_cn = step.hold_state(of_state[1], "the gradient of c");
    const auto result = [&](int i) {
      found[i] = state.empty(step.tensors[i].sizes(), step.dtype);
      return found[i].data();
    };
    if (wanted[0] || (wanted[1] && step.is_summed)) g.grad_input = result(0);
    void* const grad_hidden_gates = wanted[1] && !step.is_summed ? result(1) : nullptr;
    if (wanted[kState]) (step.is_lstm ? g.grad_c0 : g.grad_h0) = result(kState);
    for (int i = kInputs; i < kTensors; ++i) {
      if (!wanted[i] || !step.tensors[i].defined()) continue;
      found[i] = state.empty(step.tensors[i].sizes(), computed_dtype(step.dtype));
      if (step.layer.batch == 0) found[i].clear();
      g.grad_weights[LAYERNORM_BIAS_IH + i - kInputs] = found[i].data();
    }
    ask_threads();
    layernorm_status status{};
    unlocked(step.is_long(), [&] {
      status = layernorm_gates_backward(&step.layer, step.hidden_gates, &g, grad_hidden_gates);
    });
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
