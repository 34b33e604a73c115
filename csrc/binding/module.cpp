// The Python module `layernorm._native`: the kernels on PyTorch's tensors, for every PyTorch and
// every Python from 3.11.
#include "entries.hpp"
#include "isa/capability.hpp"

namespace layernorm {
namespace {

PyObject* recorders_ = nullptr;  // a dict

PyObject* py_capabilities(PyObject*, PyObject*) {
  return guarded([] {
    const auto& all = capabilities();
    Object names = checked(PyTuple_New(static_cast<Py_ssize_t>(all.size())));
    for (size_t i = 0; i < all.size(); ++i)
      PyTuple_SetItem(names.get(), static_cast<Py_ssize_t>(i),
                      checked(PyUnicode_FromString(all[i].name)).release());
    return names.release();
  });
}

PyObject* py_capability(PyObject*, PyObject*) { return PyUnicode_FromString(capability().name); }

PyObject* py_version(PyObject*, PyObject*) {
  return PyUnicode_FromString(LAYERNORM_PACKAGE_VERSION);
}

PyObject* py_use_capability(PyObject*, PyObject* name) {
  const char* const text = PyUnicode_AsUTF8AndSize(name, nullptr);
  return text == nullptr ? nullptr : PyBool_FromLong(use_capability(text));
}

}  // namespace

PyObject* record(PyObject*, PyObject* recorders) {
  return guarded([&] {
    if (!PyDict_Check(recorders)) throw TypeProblem("record: recorders must be a dict");
    Py_XDECREF(std::exchange(recorders_, Py_NewRef(recorders)));
    return Py_NewRef(Py_None);
  });
}

PyObject* recorder(const char* name) {
  PyObject* const found = recorders_ == nullptr ? nullptr : PyDict_GetItemString(recorders_, name);
  if (found == nullptr) throw std::runtime_error(std::string("no derivative of ") + name);
  return found;
}

double as_double(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool as_flag(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw PythonError();
  return value != 0;
}

std::vector<int64_t> as_integers(PyObject* sequence, const char* name) {
  const bool is_tuple = PyTuple_Check(sequence);
  if (!is_tuple && !PyList_Check(sequence))
    throw TypeProblem(std::string("layernorm: ") + name + " must be a list or tuple of integers");
  const Py_ssize_t size = is_tuple ? PyTuple_Size(sequence) : PyList_Size(sequence);
  std::vector<int64_t> values(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const item = is_tuple ? PyTuple_GetItem(sequence, i) : PyList_GetItem(sequence, i);
    values[i] = PyLong_AsLongLong(item);
    if (values[i] == -1 && PyErr_Occurred()) throw PythonError();
  }
  return values;
}

}  // namespace layernorm

PyMODINIT_FUNC PyInit__native() {
  using namespace layernorm;
#define ENTRY(name)                                \
  {                                                \
    #name, as_method(name), METH_FASTCALL, nullptr \
  }
  static PyMethodDef methods[] = {
      {"connect", connect, METH_O, "Takes a dict of what of PyTorch's is used."},
      {"reached", reached, METH_NOARGS, "Which ways to PyTorch were found, a dict of flags."},
      {"record", record, METH_O, "Takes a dict of the functions that record a derivative."},
      ENTRY(layer_norm),
      ENTRY(rms_norm),
      ENTRY(add_layer_norm),
      ENTRY(add_rms_norm),
      ENTRY(norm_forward),
      ENTRY(norm_backward),
      ENTRY(recurrent),
      ENTRY(recurrent_forward),
      ENTRY(recurrent_backward),
      ENTRY(gates),
      ENTRY(gates_forward),
      ENTRY(gates_backward),
      {"version", py_version, METH_NOARGS, "The version of the package that this was built for."},
      {"capabilities", py_capabilities, METH_NOARGS,
       "The instruction sets that this machine can run, the best one last."},
      {"capability", py_capability, METH_NOARGS, "The instruction set in use."},
      {"use_capability", py_use_capability, METH_O,
       "Uses the instruction set of this name; False if the machine has none such."},
      {nullptr, nullptr, 0, nullptr}};
#undef ENTRY
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_native",
                               "The compiled kernels.",
                               -1,
                               methods,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  Object created(PyModule_Create(&module));
  const Object stream(created.get() == nullptr ? nullptr : stream_type());
  if (stream.get() == nullptr || PyModule_AddObjectRef(created.get(), "Stream", stream.get()) != 0)
    return nullptr;
  return created.release();
}
