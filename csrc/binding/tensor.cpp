#include "tensor.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "isa/huge_pages.hpp"
#include "parallel.hpp"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace layernorm {
namespace {

// DLPack's structs for exchanging tensors (dlpack.h, version 1.2 and those after it of the same
// major version), as far as they are used here.
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void* allocate;
  void* managed_of;
  void* object_of;
  int (*tensor_of)(void* object, Tensor* tensor);
  void* current_stream;
};

constexpr int32_t kCpu = 1, kPinned = 3;
constexpr uint8_t kFloat = 2, kBfloat = 4, kBool = 6;

}  // namespace dlpack

// Functions that make a tensor several times faster than a call of Python's: PyTorch's C functions,
// and the one that gives Python's object for a tensor. Any may be missing.
struct Maker {
  int (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                       int32_t device_type, int32_t device_index, void** tensor) = nullptr;
  int (*data_of)(void* tensor, void** data) = nullptr;
  int (*sizes_of)(void* tensor, int64_t** sizes) = nullptr;
  int (*strides_of)(void* tensor, int64_t** strides) = nullptr;
  int (*destroy)(void* tensor) = nullptr;
  PyObject* (*wrap)(const void* tensor) = nullptr;

  [[nodiscard]] bool is_complete() const {
    return empty_strided && data_of && sizes_of && strides_of && destroy && wrap;
  }
};
Maker maker;
// PyTorch's numbers for the types of elements.
constexpr int32_t kScalarTypes[] = {6, 7, 15, 5, 11};

// What is used of PyTorch: classes, and functions that are called.
struct Torch {
  const dlpack::Exchange* exchange = nullptr;
  PyObject *Tensor, *Parameter, *dtypes;
  PyObject *is_neg, *new_empty, *fill_, *contiguous, *to, *increment_version;
  PyObject *function_modes, *dispatch_modes, *is_tracing, *transforms, *forward_ad, *grad_mode;
  PyObject* num_threads = nullptr;  // where threads are not PyTorch's
  PyObject *s_requires_grad, *s_current_level, *s_dtype, *s_data_ptr, *s_shape, *s_stride,
      *s_layout;
  PyObject *s_is_cpu, *strided;
};
Torch torch;

bool is_true(PyObject* result) {
  const Object held = checked(result);
  return held.get() == Py_True;
}
int64_t as_integer(PyObject* result) {
  const Object held = checked(result);
  const int64_t value = PyLong_AsLongLong(held.get());
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}
Object call(PyObject* function, PyObject* argument) {
  return checked(PyObject_CallFunctionObjArgs(function, argument, nullptr));
}

void* symbol_in(const char* library, const char* name) {
#if defined(_WIN32)
  HMODULE const handle = GetModuleHandleA(library);
  return handle == nullptr ? nullptr : reinterpret_cast<void*>(GetProcAddress(handle, name));
#else
  void* const handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
  return handle == nullptr ? nullptr : dlsym(handle, name);
#endif
}

constexpr size_t kItems[] = {4, 8, 2, 2, 1, 0};
constexpr int64_t kMostDims = 64;

}  // namespace

const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"Float", "Double", "BFloat16", "Half", "Bool", "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

bool Tensor::read(PyObject* object) {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.Tensor && type != torch.Parameter) return false;
  object_ = Object::of_borrowed(object);
  if (torch.exchange != nullptr ? read_exchanged() : read_attributes()) {
    // Elements without memory are a tensor's that PyTorch keeps as zero without having it. A
    // negative view is the imaginary part of a conjugate one, of which every other number is read:
    // asking a contiguous tensor would take as long as reading it.
    const int64_t elements = numel();
    if (data_ != nullptr ? (elements > 1 && is_contiguous()) || !is_negative() : elements == 0)
      return true;
  }
  *this = Tensor();
  return false;
}

bool Tensor::read_exchanged() {
  dlpack::Tensor found;
  if (torch.exchange->tensor_of(object_.get(), &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != dlpack::kCpu && found.device_type != dlpack::kPinned) return false;
  data_ = found.data == nullptr ? nullptr : static_cast<char*>(found.data) + found.byte_offset;
  dims_ = found.dims;
  sizes_ = found.sizes;
  strides_ = found.strides;
  dtype_ = Dtype::kOther;
  if (found.lanes != 1) return true;
  if (found.code == dlpack::kFloat)
    dtype_ = found.bits == 32   ? Dtype::kFloat32
             : found.bits == 64 ? Dtype::kFloat64
             : found.bits == 16 ? Dtype::kFloat16
                                : Dtype::kOther;
  else if (found.code == dlpack::kBfloat && found.bits == 16)
    dtype_ = Dtype::kBFloat16;
  else if (found.code == dlpack::kBool)
    dtype_ = Dtype::kBool;
  return true;
}

bool Tensor::read_attributes() {
  try {
    return read_each_attribute();
  } catch (
      const PythonError&) {  // one that a nested tensor or a wrapper of a transform does not have
    PyErr_Clear();
    return false;
  }
}

bool Tensor::read_each_attribute() {
  PyObject* const object = object_.get();
  if (!is_true(PyObject_GetAttr(object, torch.s_is_cpu)) ||
      checked(PyObject_GetAttr(object, torch.s_layout)).get() != torch.strided)
    return false;
  const Object shape = checked(PyObject_GetAttr(object, torch.s_shape));
  const Object strides = checked(PyObject_CallFunctionObjArgs(
      checked(PyObject_GetAttr(object, torch.s_stride)).get(), nullptr));
  dims_ = PyTuple_Size(shape.get());
  if (dims_ < 0 || PyTuple_Size(strides.get()) != dims_) throw PythonError();
  own_ = std::make_unique<int64_t[]>(static_cast<size_t>(2 * dims_));
  for (int64_t i = 0; i < dims_; ++i) {
    own_[i] = PyLong_AsLongLong(PyTuple_GetItem(shape.get(), i));
    own_[dims_ + i] = PyLong_AsLongLong(PyTuple_GetItem(strides.get(), i));
  }
  sizes_ = own_.get();
  strides_ = sizes_ + dims_;
  const Object dtype = checked(PyObject_GetAttr(object, torch.s_dtype));
  dtype_ = Dtype::kOther;
  for (int i = 0; i < static_cast<int>(Dtype::kOther); ++i)
    if (PyTuple_GetItem(torch.dtypes, i) == dtype.get()) dtype_ = static_cast<Dtype>(i);
  const Object pointer = checked(PyObject_CallFunctionObjArgs(
      checked(PyObject_GetAttr(object, torch.s_data_ptr)).get(), nullptr));
  data_ = PyLong_AsVoidPtr(pointer.get());
  if (PyErr_Occurred()) throw PythonError();
  return true;
}

Tensor Tensor::of(Object made) {
  Tensor tensor;
  tensor.object_ = std::move(made);
  if (!(torch.exchange != nullptr ? tensor.read_exchanged() : tensor.read_attributes()))
    fail("PyTorch made a tensor that is not on the CPU");
  return tensor;
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dims_; ++i) count *= sizes_[i];
  return count;
}

size_t Tensor::element_size() const { return kItems[static_cast<int>(dtype_)]; }

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t i = dims_ - 1; i >= 0; --i) {
    if (sizes_[i] == 0) return true;
    if (sizes_[i] != 1 && strides_[i] != expected) return false;
    expected *= sizes_[i];
  }
  return true;
}

bool Tensor::is_negative() const { return is_true(call(torch.is_neg, object()).release()); }

Tensor Tensor::shared() const {
  Tensor tensor;
  tensor.object_ = Object::of_borrowed(object());
  tensor.data_ = data_;
  tensor.dims_ = dims_;
  tensor.sizes_ = sizes_;
  tensor.strides_ = strides_;
  tensor.dtype_ = dtype_;
  if (own_ != nullptr) {
    tensor.own_ = std::make_unique<int64_t[]>(static_cast<size_t>(2 * dims_));
    std::copy_n(own_.get(), 2 * dims_, tensor.own_.get());
    tensor.sizes_ = tensor.own_.get();
    tensor.strides_ = tensor.sizes_ + dims_;
  }
  return tensor;
}

Tensor Tensor::contiguous() const {
  return is_contiguous() ? shared() : of(call(torch.contiguous, object()));
}

Tensor Tensor::to(Dtype dtype) const {
  if (dtype == dtype_) return shared();
  return of(checked(PyObject_CallFunctionObjArgs(
      torch.to, object(), PyTuple_GetItem(torch.dtypes, static_cast<int>(dtype)), nullptr)));
}

Tensor Tensor::empty(std::initializer_list<int64_t> sizes, Dtype dtype) const {
  return empty(Sizes{sizes.begin(), static_cast<int64_t>(sizes.size())}, dtype);
}

Tensor Tensor::empty(Sizes sizes, Dtype dtype) const {
  Tensor made = maker.is_complete() && sizes.count <= kMostDims ? made_fast(sizes, dtype)
                                                                : made_by_python(sizes, dtype);
  want_huge_pages(made.data(), static_cast<size_t>(made.numel()) * made.element_size());
  return made;
}

Tensor Tensor::made_fast(Sizes sizes, Dtype dtype) {
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = sizes.count - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.data[i] > 0 ? sizes.data[i] : 1;
  }
  struct Handle {
    void* tensor = nullptr;
    ~Handle() {
      if (tensor != nullptr) maker.destroy(tensor);
    }
  } handle;
  int64_t *own_sizes = nullptr, *own_strides = nullptr;
  Tensor made;
  if (maker.empty_strided(sizes.count, sizes.data, strides, kScalarTypes[static_cast<int>(dtype)],
                          0, 0, &handle.tensor) != 0 ||
      maker.data_of(handle.tensor, &made.data_) != 0 ||
      maker.sizes_of(handle.tensor, &own_sizes) != 0 ||
      maker.strides_of(handle.tensor, &own_strides) != 0)
    fail("PyTorch could not allocate a tensor of shape ", sizes);
  made.object_ = checked(maker.wrap(handle.tensor));
  made.dims_ = sizes.count;
  made.sizes_ = own_sizes;
  made.strides_ = own_strides;
  made.dtype_ = dtype;
  return made;
}

Tensor Tensor::made_by_python(Sizes sizes, Dtype dtype) const {
  const Object arguments = checked(PyTuple_New(1 + (sizes.count == 0 ? 1 : sizes.count)));
  PyTuple_SetItem(arguments.get(), 0, Py_NewRef(object()));
  if (sizes.count == 0) PyTuple_SetItem(arguments.get(), 1, checked(PyTuple_New(0)).release());
  for (int64_t i = 0; i < sizes.count; ++i)
    PyTuple_SetItem(arguments.get(), i + 1, checked(PyLong_FromLongLong(sizes.data[i])).release());
  Object keywords;
  if (dtype != dtype_) {
    keywords = checked(PyDict_New());
    PyObject* const value = PyTuple_GetItem(torch.dtypes, static_cast<int>(dtype));
    if (PyDict_SetItem(keywords.get(), torch.s_dtype, value) != 0) throw PythonError();
  }
  return of(checked(PyObject_Call(torch.new_empty, arguments.get(), keywords.get())));
}

void Tensor::clear() const {
  if (data_ != nullptr) std::memset(data_, 0, static_cast<size_t>(numel()) * element_size());
}

void Tensor::fill_one() const {
  const Object one = checked(PyLong_FromLong(1));
  checked(PyObject_CallFunctionObjArgs(torch.fill_, object(), one.get(), nullptr));
}

bool is_plain_here() {
  return as_integer(PyObject_CallNoArgs(torch.function_modes)) == 0 &&
         as_integer(PyObject_CallNoArgs(torch.dispatch_modes)) == 0 &&
         !is_true(PyObject_CallNoArgs(torch.is_tracing)) &&
         !is_true(PyObject_CallNoArgs(torch.transforms)) &&
         as_integer(PyObject_GetAttr(torch.forward_ad, torch.s_current_level)) < 0;
}

bool is_grad_enabled() { return is_true(PyObject_CallNoArgs(torch.grad_mode)); }

bool requires_grad(const Tensor& tensor) {
  return tensor.defined() && is_true(PyObject_GetAttr(tensor.object(), torch.s_requires_grad));
}

void count_version(const Tensor& tensor) {
  const Object tensors = checked(PyTuple_New(1));
  PyTuple_SetItem(tensors.get(), 0, Py_NewRef(tensor.object()));
  call(torch.increment_version, tensors.get());
}

void ask_threads() {
  if (torch.num_threads != nullptr)
    use_own_threads(static_cast<int>(as_integer(PyObject_CallNoArgs(torch.num_threads))));
}

PyObject* connect(PyObject*, PyObject* names) {
  return guarded([&] {
    const auto find = [&](const char* name) {
      PyObject* const found = PyDict_GetItemString(names, name);
      if (found == nullptr) throw TypeProblem(std::string("connect: names has no ") + name);
      return Py_NewRef(found);
    };
    torch.Tensor = find("Tensor");
    torch.Parameter = find("Parameter");
    torch.dtypes = find("dtypes");
    torch.is_neg = find("is_neg");
    torch.new_empty = find("new_empty");
    torch.fill_ = find("fill_");
    torch.contiguous = find("contiguous");
    torch.to = find("to");
    torch.increment_version = find("increment_version");
    torch.function_modes = find("function_modes");
    torch.dispatch_modes = find("dispatch_modes");
    torch.is_tracing = find("is_tracing");
    torch.transforms = find("transforms");
    torch.forward_ad = find("forward_ad");
    torch.grad_mode = find("grad_mode");
    torch.strided = find("strided");
    torch.s_requires_grad = checked(PyUnicode_InternFromString("requires_grad")).release();
    torch.s_current_level = checked(PyUnicode_InternFromString("_current_level")).release();
    torch.s_dtype = checked(PyUnicode_InternFromString("dtype")).release();
    torch.s_data_ptr = checked(PyUnicode_InternFromString("data_ptr")).release();
    torch.s_shape = checked(PyUnicode_InternFromString("shape")).release();
    torch.s_stride = checked(PyUnicode_InternFromString("stride")).release();
    torch.s_layout = checked(PyUnicode_InternFromString("layout")).release();
    torch.s_is_cpu = checked(PyUnicode_InternFromString("is_cpu")).release();
    PyObject* const capsule = PyDict_GetItemString(names, "exchange");
    torch.exchange = nullptr;
    if (capsule != nullptr && capsule != Py_None) {
      const auto* api = static_cast<const dlpack::Exchange*>(
          PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
      if (api == nullptr) throw PythonError();
      if (api->major == 1 && api->tensor_of != nullptr) torch.exchange = api;
    }
    const auto symbol = [&](const char* library, const char* name) -> void* {
      PyObject* const path = PyDict_GetItemString(names, library);
      PyObject* const found = PyDict_GetItemString(names, name);
      if (path == nullptr || found == nullptr) return nullptr;
      const char* const file = PyUnicode_AsUTF8AndSize(path, nullptr);
      const char* const text = PyUnicode_AsUTF8AndSize(found, nullptr);
      if (file == nullptr || text == nullptr) throw PythonError();
      return symbol_in(file, text);
    };
    const auto read = [&](auto& function, const char* library, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol(library, name));
    };
    maker = Maker();
    read(maker.empty_strided, "cpu_library", "empty_strided");
    read(maker.data_of, "cpu_library", "data_of");
    read(maker.sizes_of, "cpu_library", "sizes_of");
    read(maker.strides_of, "cpu_library", "strides_of");
    read(maker.destroy, "cpu_library", "destroy");
    // Its name in C++ depends on how the tensor is handed over, which is by its address in any
    // case.
    for (const char* name : {"wrap", "wrap_by_value"})
      if (maker.wrap == nullptr) read(maker.wrap, "python_library", name);
    ParallelFor loop;
    CountThreads count;
    read(loop, "cpu_library", "parallel_for");
    read(count, "cpu_library", "count_threads");
    const bool are_theirs = loop != nullptr && count != nullptr;
    use_threads_of(are_theirs ? loop : nullptr, are_theirs ? count : nullptr);
    torch.num_threads = are_theirs ? nullptr : find("num_threads");
    return Py_NewRef(Py_None);
  });
}

PyObject* reached(PyObject*, PyObject*) {
  return guarded([] {
    Object found = checked(PyDict_New());
    const auto set = [&](const char* name, bool is_there) {
      if (PyDict_SetItemString(found.get(), name, is_there ? Py_True : Py_False) != 0)
        throw PythonError();
    };
    set("exchange", torch.exchange != nullptr);
    set("threads", torch.num_threads == nullptr);
    set("allocation", maker.is_complete());
    return found.release();
  });
}

}  // namespace layernorm
