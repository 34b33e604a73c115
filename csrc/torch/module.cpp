// The Python module `layernorm._native`: entries for plain calls of the operators, which cost what
// calls of PyTorch's own functions cost, and the choice of the instruction set.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "isa/capability.hpp"
#include "operators.hpp"
#include "stream.hpp"

namespace layernorm {
namespace {

// A call whose arguments are plain: tensors of PyTorch's own class on the CPU, of types and shapes
// that fit, outside of modes and transforms that see Python functions and of torch.jit.trace. For
// all others the entries return NotImplemented, and src/layernorm/functional.py checks, chooses and
// raises.
struct PlainCall {
  Tensor input, residual;
  OptionalTensor weight, bias;
  c10::SmallVector<c10::SymInt, 4> shape;
  double eps = 0;
};

bool parse_tensor(PyObject* object, Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided && !tensor.is_nested();
}

bool parse_shape(PyObject* object, PlainCall& call) {
  if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
  const Py_ssize_t tail = PySequence_Fast_GET_SIZE(object);
  const auto sizes = call.input.sizes();
  const auto leading = static_cast<int64_t>(sizes.size()) - tail;
  if (tail < 1 || leading < 0) return false;
  for (Py_ssize_t i = 0; i < tail; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(object, i);
    if (!PyLong_CheckExact(item)) return false;
    const long long size = PyLong_AsLongLong(item);
    if (size == -1 && PyErr_Occurred()) PyErr_Clear();
    if (size != sizes[leading + i]) return false;
    call.shape.emplace_back(size);
  }
  return true;
}

bool parse_parameter(PyObject* object, const PlainCall& call, OptionalTensor& parameter) {
  if (object == Py_None) return true;
  Tensor tensor;
  if (!parse_tensor(object, tensor) ||
      tensor.sizes() != call.input.sizes().slice(call.input.dim() - call.shape.size()) ||
      !fits_beside(tensor.scalar_type(), call.input.scalar_type()))
    return false;
  parameter = std::move(tensor);
  return true;
}

bool parse_eps(PyObject* object, bool may_be_none, PlainCall& call) {
  if (object == Py_None && may_be_none) {
    call.eps = call.input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                       : std::numeric_limits<float>::epsilon();
    return true;
  }
  if (!PyFloat_CheckExact(object)) return false;
  call.eps = PyFloat_AS_DOUBLE(object);
  return true;
}

// The arguments in this order: input[, residual], normalized_shape, weight[, bias], eps.
std::optional<PlainCall> parse(PyObject* const* arguments, Py_ssize_t count, bool has_residual,
                               bool has_bias) {
  PlainCall call;
  if (count != 4 + has_residual + has_bias || at::impl::torch_function_mode_enabled() ||
      at::tracer::impl::is_dispatch_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return std::nullopt;
  PyObject* const* next = arguments;
  if (!parse_tensor(*next++, call.input) || !is_supported(call.input.scalar_type()))
    return std::nullopt;
  if (has_residual &&
      (!parse_tensor(*next++, call.residual) || call.residual.sizes() != call.input.sizes() ||
       call.residual.scalar_type() != call.input.scalar_type()))
    return std::nullopt;
  if (!parse_shape(*next++, call) || !parse_parameter(*next++, call, call.weight))
    return std::nullopt;
  if (has_bias && !parse_parameter(*next++, call, call.bias)) return std::nullopt;
  if (!parse_eps(*next, !has_bias, call)) return std::nullopt;
  return call;
}

// Calls the operator without the interpreter's lock.
template <typename Function>
auto unlocked(const Function& function) {
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } guard;
  return function();
}

PyObject* wrap(const Tensor& tensor) { return THPVariable_Wrap(tensor); }

PyObject* wrap(const TensorPair& pair) {
  PyObject* const output = wrap(std::get<0>(pair));
  PyObject* const sum = output == nullptr ? nullptr : wrap(std::get<1>(pair));
  PyObject* const tuple = sum == nullptr ? nullptr : PyTuple_Pack(2, output, sum);
  Py_XDECREF(output);
  Py_XDECREF(sum);
  return tuple;
}

template <bool kResidual, bool kBias, typename Function>
PyObject* entry(PyObject* const* arguments, Py_ssize_t count, const Function& function) {
  HANDLE_TH_ERRORS
  const auto call = parse(arguments, count, kResidual, kBias);
  if (!call) Py_RETURN_NOTIMPLEMENTED;
  return wrap(unlocked([&] { return function(*call); }));
  END_HANDLE_TH_ERRORS
}

PyObject* py_layer_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return entry<false, true>(arguments, count, [](const PlainCall& c) {
    return layer_norm_op().call(c.input, c.shape, c.weight, c.bias, c.eps);
  });
}
PyObject* py_rms_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return entry<false, false>(arguments, count, [](const PlainCall& c) {
    return rms_norm_op().call(c.input, c.shape, c.weight, c.eps);
  });
}
PyObject* py_add_layer_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return entry<true, true>(arguments, count, [](const PlainCall& c) {
    return add_layer_norm_op().call(c.input, c.residual, c.shape, c.weight, c.bias, c.eps);
  });
}
PyObject* py_add_rms_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return entry<true, false>(arguments, count, [](const PlainCall& c) {
    return add_rms_norm_op().call(c.input, c.residual, c.shape, c.weight, c.eps);
  });
}

PyObject* py_capabilities(PyObject*, PyObject*) {
  const auto& all = layernorm::capabilities();
  PyObject* const names = PyTuple_New(static_cast<Py_ssize_t>(all.size()));
  if (names == nullptr) return nullptr;
  for (size_t i = 0; i < all.size(); ++i)
    PyTuple_SET_ITEM(names, static_cast<Py_ssize_t>(i), PyUnicode_FromString(all[i].name));
  return names;
}

PyObject* py_capability(PyObject*, PyObject*) {
  return PyUnicode_FromString(layernorm::capability().name);
}

PyObject* py_use_capability(PyObject*, PyObject* name) {
  const char* const text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  return PyBool_FromLong(layernorm::use_capability(text));
}

template <typename Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace
}  // namespace layernorm

PyMODINIT_FUNC PyInit__native() {
  using namespace layernorm;
  static PyMethodDef methods[] = {
      {"layer_norm", as_method(py_layer_norm), METH_FASTCALL, nullptr},
      {"rms_norm", as_method(py_rms_norm), METH_FASTCALL, nullptr},
      {"add_layer_norm", as_method(py_add_layer_norm), METH_FASTCALL, nullptr},
      {"add_rms_norm", as_method(py_add_rms_norm), METH_FASTCALL, nullptr},
      {"capabilities", py_capabilities, METH_NOARGS,
       "The instruction sets that this machine can run, the best one last."},
      {"capability", py_capability, METH_NOARGS, "The instruction set in use."},
      {"use_capability", py_use_capability, METH_O,
       "Uses the instruction set of this name; False if the machine has none such."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_native",
                               "The compiled kernels.",
                               -1,
                               methods,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  PyObject* const created = PyModule_Create(&module);
  PyObject* const stream = created == nullptr ? nullptr : stream_type();
  if (stream == nullptr || PyModule_AddObjectRef(created, "Stream", stream) != 0) {
    Py_XDECREF(stream);
    Py_XDECREF(created);
    return nullptr;
  }
  Py_DECREF(stream);
  return created;
}
