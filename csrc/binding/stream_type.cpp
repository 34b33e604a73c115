// The Python type `layernorm._native.Stream`, on which src/layernorm/streaming.py is built.
#include <memory>
#include <numeric>

#include "entries.hpp"
#include "layer_arguments.hpp"

namespace layernorm {
namespace {

struct Destroy {
  void operator()(layernorm_stream* stream) const { layernorm_stream_destroy(stream); }
};

struct Stream {
  std::unique_ptr<layernorm_stream, Destroy> stream;
  Tensor h, c;  // the state, [layers, N, size], to which the steps write
  Dtype dtype = Dtype::kOther;
  int64_t batch = 0, input_size = 0, output_size = 0;
  bool is_long = false;  // a step takes so long that others should run meanwhile
  bool busy = false;     // a step is running without the interpreter's lock

  [[nodiscard]] bool fits(const Tensor& tensor, int64_t size) const {
    if (tensor.dtype() != dtype) return false;
    if (tensor.dims() == 2) return tensor.size(0) == batch && tensor.size(1) == size;
    return tensor.dims() == 1 && batch == 1 && tensor.size(0) == size;
  }
  // Whether a step can write to a tensor: no two of its elements share memory, as do the nearest
  // two of equal offset, feature_stride/common rows and row_stride/common features apart, if both
  // are there; and no derivative of it is recorded.
  [[nodiscard]] bool writes(const Tensor& output) const {
    if (!fits(output, output_size)) return false;
    const Strides strides(output);
    const int64_t common = std::gcd(strides.of[0], strides.of[1]);
    if (common == 0 ? batch * output_size > 1
                    : strides.of[1] / common < batch && strides.of[0] / common < output_size)
      return false;
    return !(is_grad_enabled() && requires_grad(output));
  }

  // Of rows and features, in elements.
  struct Strides {
    int64_t of[2];
    explicit Strides(const Tensor& tensor)
        : of{tensor.dims() == 1 ? tensor.stride(0) * tensor.size(0) : tensor.stride(0),
             tensor.stride(-1)} {}
  };
};

struct PyStream {
  PyObject_HEAD Stream* stream;
};

void* at_layer(const Tensor& state, Py_ssize_t layer) {
  const int64_t elements = layer * state.size(1) * state.size(2);
  return static_cast<char*>(state.data()) + static_cast<size_t>(elements) * state.element_size();
}

void read_weights(PyObject* list, Dtype dtype, layernorm_layer& layer,
                  std::array<Tensor, LAYERNORM_WEIGHTS>& weights, Held& held) {
  if (!PyList_Check(list) || PyList_Size(list) != LAYERNORM_WEIGHTS)
    throw TypeProblem("Stream: weights must be lists of 11 Tensors or None, one for a layer");
  for (int i = 0; i < LAYERNORM_WEIGHTS; ++i)
    if (!weights[i].read_optional(PyList_GetItem(list, i)))
      throw TypeProblem("Stream: a weight must be a plain Tensor on the CPU, or None");
  const Tensor &ih = weights[LAYERNORM_WEIGHT_IH], &hh = weights[LAYERNORM_WEIGHT_HH];
  check(ih.defined() && hh.defined() && ih.dims() == 2 && hh.dims() == 2,
        "weight_ih and weight_hh must be matrices");
  held.decide(dtype, weights, layer);
  layer.input_size = ih.size(1);
  for (int i = 0; i < LAYERNORM_WEIGHTS; ++i) {
    const Tensor& w = weights[i];
    if (!w.defined()) continue;
    const int64_t H = layer.hidden_size, P = layer.output_size, width = ih.size(0);
    const bool is_of_cell = i >= LAYERNORM_BIAS_HN;
    layer.weights[i] = i == LAYERNORM_WEIGHT_IH   ? held.hold(w, "weight_ih", {width, ih.size(1)})
                       : i == LAYERNORM_WEIGHT_HH ? held.hold(w, "weight_hh", {width, P})
                       : i == LAYERNORM_WEIGHT_HR
                           ? held.hold(w, "weight_hr", {P, H})
                           : held.hold_vector(w, "a gain or bias", is_of_cell ? H : width);
  }
}

// Stream(weights, h, c, spec, eps, weight_kind): lists of weights, the state (layers, N, size) that
// the steps write to, the spec of every layer, and what its matrices are kept as.
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* /*keywords*/) {
  return guarded([&]() -> PyObject* {
    PyObject *lists = nullptr, *hidden = nullptr, *cell_state = nullptr, *codes = nullptr;
    auto stream = std::make_unique<Stream>();
    double eps = 0;
    int weight_kind = 0;
    if (!PyArg_ParseTuple(arguments, "O!OOOd|i", &PyList_Type, &lists, &hidden, &cell_state, &codes,
                          &eps, &weight_kind))
      throw PythonError();
    const std::vector<int64_t> spec = as_integers(codes, "spec");
    Recurrent r{};
    const std::string problem = decode_spec(spec.data(), static_cast<int64_t>(spec.size()), eps, r);
    check(problem.empty(), problem);
    const Py_ssize_t count = PyList_Size(lists);
    if (!stream->h.read(hidden) || !stream->c.read_optional(cell_state))
      throw TypeProblem("Stream: h must be a plain Tensor on the CPU, and c one or None");
    const auto is_state = [&](const Tensor& state) {
      return state.dims() == 3 && state.size(0) == count && state.is_contiguous();
    };
    check(is_state(stream->h) && (!stream->c.defined() || is_state(stream->c)),
          "Stream: h and c must be contiguous, (layers, batch, size)");
    check(stream->h.size(1) > 0, "a stream must have a row, and a contiguous state");
    stream->dtype = stream->h.dtype();
    check(is_supported(stream->dtype),
          "Stream: h must be of float32, float64, bfloat16 or float16");
    stream->batch = stream->h.size(1);
    stream->output_size = stream->h.size(2);
    std::vector<layernorm_layer> layers(static_cast<size_t>(count));
    std::vector<std::array<Tensor, LAYERNORM_WEIGHTS>> weights(static_cast<size_t>(count));
    Held held;
    int64_t products = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      auto& layer = layers[i];
      layer.struct_size = sizeof(layer);
      layer.spec = spec.data();
      layer.spec_count = static_cast<int64_t>(spec.size());
      layer.eps = eps;
      layer.weight_kind = weight_kind;
      layer.batch = stream->batch;
      layer.output_size = stream->output_size;
      layer.h0 = at_layer(stream->h, i);
      layer.hidden_size = stream->output_size;
      if (stream->c.defined()) {
        check(stream->c.size(1) == stream->batch, "Stream: h and c must have the same batch");
        layer.hidden_size = stream->c.size(2);
        layer.c0 = at_layer(stream->c, i);
      }
      read_weights(PyList_GetItem(lists, i), stream->dtype, layer, weights[i], held);
      check(weights[i][LAYERNORM_WEIGHT_IH].size(0) == r.gates * layer.hidden_size,
            "weight_ih must have ", r.gates * layer.hidden_size, " rows");
      products +=
          layer.batch * r.gates * layer.hidden_size * (layer.input_size + layer.output_size);
    }
    stream->input_size = layers.empty() ? 0 : layers[0].input_size;
    constexpr int64_t kLong = int64_t{1} << 21;  // multiplications, about 40 us
    stream->is_long = products >= kLong;
    ask_threads();
    layernorm_stream* made = nullptr;
    check_status(layernorm_stream_create(layers.data(), count, &made));
    stream->stream.reset(made);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    Object self = checked(allocate(type, 0));
    reinterpret_cast<PyStream*>(self.get())->stream = stream.release();
    return self.release();
  });
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<PyStream*>(self)->stream;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// step(input, out): the result, which is `out` unless that is None. NotImplemented where an
// argument does not fit: src/layernorm/streaming.py says why.
PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    auto& stream = *reinterpret_cast<PyStream*>(self)->stream;
    Tensor input, output;
    if (count != 2 || !input.read(arguments[0]) || !stream.fits(input, stream.input_size))
      return not_implemented();
    const bool is_given = arguments[1] != Py_None;
    if (is_given) {
      if (!output.read(arguments[1]) || !stream.writes(output) || output.dims() != input.dims())
        return not_implemented();
      count_version(output);
    } else if (input.dims() == 2) {
      output = input.empty({stream.batch, stream.output_size}, stream.dtype);
    } else {
      output = input.empty({stream.output_size}, stream.dtype);
    }
    check(!stream.busy, "Stream: another thread is taking a step; give each thread a stream");
    const Stream::Strides from(input), to(output);
    ask_threads();
    layernorm_status status{};
    stream.busy = true;
    unlocked(stream.is_long, [&] {
      status =
          layernorm_stream_step(stream.stream.get(), input.data(), from.of, output.data(), to.of);
    });
    stream.busy = false;
    check_status(status);
    return output.release();
  });
}

}  // namespace

PyObject* stream_type() {
  static PyMethodDef methods[] = {{"step", as_method(step), METH_FASTCALL, "Takes one step."},
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
