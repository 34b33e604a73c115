// Python's limited API (3.11 and newer): references that are held, and exceptions.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <utility>

#include "status.hpp"

namespace layernorm {

class Object {
 public:
  Object() = default;
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  static Object of_borrowed(PyObject* object) { return Object(Py_XNewRef(object)); }

  [[nodiscard]] PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

// An exception of Python's has been set.
struct PythonError {};
struct TypeProblem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline Object checked(PyObject* result) {
  if (result == nullptr) throw PythonError();
  return Object(result);
}

inline void check_status(layernorm_status status) {
  if (status != LAYERNORM_OK) throw std::runtime_error(layernorm_last_error());
}

// Runs the function; turns what it throws into an exception of Python's.
template <typename Function>
PyObject* guarded(const Function& function) noexcept {
  try {
    return function();
  } catch (const PythonError&) {
  } catch (const TypeProblem& problem) {
    PyErr_SetString(PyExc_TypeError, problem.what());
  } catch (const std::exception& problem) {
    PyErr_SetString(PyExc_RuntimeError, problem.what());
  }
  return nullptr;
}

// Runs the function without the interpreter's lock if it takes so long that others should run.
template <typename Function>
void unlocked(bool is_long, const Function& function) {
  if (!is_long) return function();
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } guard;
  function();
}

inline PyObject* not_implemented() { return Py_NewRef(Py_NotImplemented); }

template <typename Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace layernorm
