// PyTorch's tensors, read and made without its headers: by its functions for exchanging tensors
// (DLPack, PyTorch 2.10 and newer), else by attributes.
#pragma once

#include <initializer_list>
#include <memory>

#include "python.hpp"

namespace layernorm {

// Types of elements; the first four are layernorm_dtype's.
enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kOther };

const char* name_of(Dtype dtype);
inline bool is_supported(Dtype dtype) { return dtype <= Dtype::kFloat16; }
inline bool is_half(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }
inline layernorm_dtype c_dtype(Dtype dtype) { return static_cast<layernorm_dtype>(dtype); }
// What statistics, sums and gradients of parameters are computed in.
inline Dtype computed_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// A strided tensor on the CPU, of PyTorch's own class or a parameter; not defined for None.
class Tensor {
 public:
  Tensor() = default;

  // Reads a tensor. False, and no exception, for whatever is not such a one or whose memory is not
  // what its elements are: a subclass, another layout or device, a wrapper of a transform, a
  // negative view.
  bool read(PyObject* object);
  // Likewise; None is read as well.
  bool read_optional(PyObject* object) { return object == Py_None || read(object); }

  [[nodiscard]] bool defined() const { return object_.get() != nullptr; }
  [[nodiscard]] PyObject* object() const { return object_.get(); }
  [[nodiscard]] Dtype dtype() const { return dtype_; }
  [[nodiscard]] int64_t dims() const { return dims_; }
  [[nodiscard]] Sizes sizes() const { return {sizes_, dims_}; }
  [[nodiscard]] int64_t size(int64_t dim) const { return sizes_[dim < 0 ? dim + dims_ : dim]; }
  [[nodiscard]] int64_t stride(int64_t dim) const { return strides_[dim < 0 ? dim + dims_ : dim]; }
  [[nodiscard]] int64_t numel() const;
  [[nodiscard]] size_t element_size() const;
  [[nodiscard]] bool is_contiguous() const;
  // Where the first element is; null if there is none.
  [[nodiscard]] void* data() const { return data_; }

  [[nodiscard]] Tensor contiguous() const;
  [[nodiscard]] Tensor to(Dtype dtype) const;
  // A fresh tensor, without a derivative; `clear` fills it with zeros, the other with ones.
  [[nodiscard]] Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) const;
  [[nodiscard]] Tensor empty(Sizes sizes, Dtype dtype) const;
  [[nodiscard]] Tensor empty_like() const { return empty(sizes(), dtype()); }
  void clear() const;
  void fill_one() const;
  // For Python; the tensor is not to be used any more.
  PyObject* release() { return object_.release(); }

 private:
  Object object_;
  void* data_ = nullptr;
  int64_t dims_ = 0;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  Dtype dtype_ = Dtype::kOther;
  std::unique_ptr<int64_t[]> own_;  // sizes and strides that are not PyTorch's

  [[nodiscard]] bool is_negative() const;
  [[nodiscard]] Tensor shared() const;  // the same once more
  bool read_exchanged();
  bool read_attributes();
  bool read_each_attribute();
  static Tensor of(Object made);
  static Tensor made_fast(Sizes sizes, Dtype dtype);
  [[nodiscard]] Tensor made_by_python(Sizes sizes, Dtype dtype) const;
};

// Reads what of PyTorch's is used here: connect(names), a dict.
PyObject* connect(PyObject* module, PyObject* names);
// Which of the faster ways connect() found: exchange, threads, allocation.
PyObject* reached(PyObject* module, PyObject* none);

// Whether nothing but the arguments of a call decides what happens to it: no mode that sees
// functions or operators, no transform, no torch.jit.trace, no level of forward-mode derivatives.
bool is_plain_here();
// Whether derivatives are recorded, and one of the tensors needs one.
bool is_grad_enabled();
bool requires_grad(const Tensor& tensor);
// Lets PyTorch know that a tensor was written to.
void count_version(const Tensor& tensor);
// Asks how many threads PyTorch would use, where they are not PyTorch's own.
void ask_threads();

}  // namespace layernorm
