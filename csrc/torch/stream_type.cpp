// The Python type `layernorm._native.Stream`, on which src/layernorm/streaming.py is built.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "stream.hpp"

namespace layernorm {
namespace {

struct PyStream {
  PyObject object;  // as PyObject_HEAD
  Stream* stream;
  bool busy;  // a step is running without the interpreter's lock
};

OptionalTensor optional_tensor(PyObject* object, const char* name) {
  if (object == Py_None) return std::nullopt;
  TORCH_CHECK_TYPE(THPVariable_Check(object), "Stream: ", name, " must be a Tensor or None");
  return THPVariable_Unpack(object);
}

// A layer's weights, in the operators' order.
std::vector<OptionalTensor> weights_of(PyObject* list) {
  TORCH_CHECK_TYPE(PyList_Check(list), "Stream: weights must be lists of Tensors, one for a layer");
  std::vector<OptionalTensor> weights;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i)
    weights.push_back(optional_tensor(PyList_GET_ITEM(list, i), "a weight"));
  TORCH_CHECK(weights.size() == kWeights && weights[kWeightIh] && weights[kWeightIh]->dim() == 2,
              "Stream: weights must be lists of ", static_cast<int>(kWeights),
              " Tensors, a matrix the first");
  return weights;
}

// The codes of a layer's spec.
std::vector<int64_t> codes_of(PyObject* tuple) {
  std::vector<int64_t> codes;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    codes.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
    if (PyErr_Occurred()) throw python_error();
  }
  return codes;
}

// Stream(weights, h, c, spec, eps): lists of weights, the state (layers, N, size) that the steps
// write to, and the spec of every layer.
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* /*keywords*/) {
  HANDLE_TH_ERRORS
  PyObject *lists = nullptr, *hidden = nullptr, *cell_state = nullptr, *codes = nullptr;
  double eps = 0;
  if (!PyArg_ParseTuple(arguments, "O!OOO!d", &PyList_Type, &lists, &hidden, &cell_state,
                        &PyTuple_Type, &codes, &eps))
    return nullptr;
  const std::vector<int64_t> spec = codes_of(codes);
  const auto h = optional_tensor(hidden, "h");
  const auto c = optional_tensor(cell_state, "c");
  const Py_ssize_t count = PyList_GET_SIZE(lists);
  const auto is_state = [&](const OptionalTensor& state) {
    return state && state->dim() == 3 && state->size(0) == count && state->is_contiguous();
  };
  TORCH_CHECK(is_state(h) && (!c || is_state(c)),
              "Stream: h and c must be contiguous, (layers, batch, size)");
  std::vector<RecurrentInputs> layers;
  for (Py_ssize_t i = 0; i < count; ++i) {
    RecurrentInputs layer;
    layer.weights = weights_of(PyList_GET_ITEM(lists, i));
    layer.input = at::empty({1, h->size(1), layer.weights[kWeightIh]->size(1)}, h->options());
    layer.h = h->select(0, i);
    if (c) layer.c = c->select(0, i);
    layer.spec = spec;
    layer.eps = eps;
    layers.push_back(std::move(layer));
  }
  auto stream = std::make_unique<Stream>(layers);
  PyObject* const self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  reinterpret_cast<PyStream*>(self)->stream = stream.release();
  return self;
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<PyStream*>(self)->stream;
  type->tp_free(self);
  Py_DECREF(type);
}

// step(input, out): the result, which is `out` unless that is None. NotImplemented where an
// argument does not fit: src/layernorm/streaming.py says why.
PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto& held = *reinterpret_cast<PyStream*>(self);
  if (count != 2 || !THPVariable_CheckExact(arguments[0])) Py_RETURN_NOTIMPLEMENTED;
  const Tensor& input = THPVariable_Unpack(arguments[0]);
  if (!held.stream->reads(input)) Py_RETURN_NOTIMPLEMENTED;
  Tensor output;
  if (arguments[1] == Py_None) {
    output = held.stream->allocate(input);
  } else {
    if (!THPVariable_CheckExact(arguments[1])) Py_RETURN_NOTIMPLEMENTED;
    output = THPVariable_Unpack(arguments[1]);
    if (!held.stream->writes(output) || output.dim() != input.dim()) Py_RETURN_NOTIMPLEMENTED;
    output.unsafeGetTensorImpl()->bump_version();
  }
  TORCH_CHECK(!held.busy, "Stream: another thread is taking a step; give each thread a stream");
  if (held.stream->is_long()) {
    struct Unlocked {
      PyStream& held;
      PyThreadState* state;
      explicit Unlocked(PyStream& stream) : held(stream) {
        held.busy = true;
        state = PyEval_SaveThread();
      }
      ~Unlocked() {
        PyEval_RestoreThread(state);
        held.busy = false;
      }
    } guard(held);
    held.stream->step(input, output);
  } else {
    held.stream->step(input, output);
  }
  if (arguments[1] != Py_None) return Py_NewRef(arguments[1]);
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyObject* stream_type() {
  static PyMethodDef methods[] = {
      {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
       "Takes one step."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {"layernorm._native.Stream", sizeof(PyStream), 0, Py_TPFLAGS_DEFAULT,
                             slots};
  return PyType_FromSpec(&spec);
}

}  // namespace layernorm
