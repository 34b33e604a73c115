// The functions of the Python module `layernorm._native`. An entry that a user's call reaches
// returns NotImplemented for arguments that are not plain; src/layernorm/functional.py and
// src/layernorm/ops see to those. Where a derivative is to be recorded it calls the Python function
// that `record` was given.
#pragma once

#include <vector>

#include "tensor.hpp"

namespace layernorm {

// Of an entry's name, the function that records its derivative.
PyObject* recorder(const char* name);
PyObject* record(PyObject* module, PyObject* recorders);

using Entry = PyObject*(PyObject*, PyObject* const* arguments, Py_ssize_t count);
Entry layer_norm, rms_norm, add_layer_norm, add_rms_norm, norm_forward, norm_backward;
Entry recurrent, recurrent_forward, recurrent_backward;
Entry gates, gates_forward, gates_backward;

// The Python type `layernorm._native.Stream`, or null with an exception set.
PyObject* stream_type();

// A double or an integer; raises for another object.
double as_double(PyObject* object);
bool as_flag(PyObject* object);
// Integers of a list or tuple; raises for another object.
std::vector<int64_t> as_integers(PyObject* sequence, const char* name);

inline void check_count(Py_ssize_t count, Py_ssize_t expected, const char* name) {
  if (count != expected) [[unlikely]]
    throw TypeProblem(std::string(name) + " takes " + std::to_string(expected) +
                      " arguments, got " + std::to_string(count));
}

// A tuple of tensors; None for one that is not defined.
template <typename... Tensors>
PyObject* tuple_of(Tensors&... tensors) {
  Object tuple = checked(PyTuple_New(sizeof...(tensors)));
  Py_ssize_t i = 0;
  const auto put = [&](Tensor& tensor) {
    PyTuple_SetItem(tuple.get(), i++, tensor.defined() ? tensor.release() : Py_NewRef(Py_None));
  };
  (put(tensors), ...);
  return tuple.release();
}

}  // namespace layernorm
