// Recurrent layers over sequences of PyTorch's tensors.
#include <array>
#include <optional>
#include <string>

#include "entries.hpp"
#include "layer.hpp"
#include "layer_arguments.hpp"
#include "parallel.hpp"

namespace layernorm {

bool LayerArguments::read(PyObject* const* arguments) {
  PyObject* const list = arguments[3];
  if (!input.read(arguments[0]) || !h.read(arguments[1]) || !c.read_optional(arguments[2]) ||
      !resets.read_optional(arguments[4]) || !reset_h.read_optional(arguments[5]) ||
      !reset_c.read_optional(arguments[6]))
    return false;
  if (!PyList_Check(list)) throw TypeProblem("layernorm: weights must be a list");
  count = PyList_Size(list);
  for (Py_ssize_t i = 0; i < std::min<Py_ssize_t>(count, LAYERNORM_WEIGHTS); ++i)
    if (!weights[i].read_optional(PyList_GetItem(list, i))) return false;
  if (arguments[7] != Py_None) batch_sizes = as_integers(arguments[7], "batch_sizes");
  codes = as_integers(arguments[8], "spec");
  eps = as_double(arguments[9]);
  return true;
}

bool LayerArguments::requires_grad() const {
  for (const Tensor* tensor : {&input, &h, &c, &reset_h, &reset_c})
    if (layernorm::requires_grad(*tensor)) return true;
  for (const Tensor& weight : weights)
    if (layernorm::requires_grad(weight)) return true;
  return false;
}

bool fits_vector(const Tensor& vector, Dtype rows) {
  return vector.dtype() == rows || (is_half(rows) && vector.dtype() == Dtype::kFloat32);
}

bool LayerArguments::fits() const {
  const Dtype dtype = input.dtype();
  if (!is_supported(dtype)) return false;
  for (const Tensor* tensor : {&h, &c, &reset_h, &reset_c})
    if (tensor->defined() && tensor->dtype() != dtype) return false;
  for (const Tensor& weight : weights)
    if (weight.defined() &&
        (weight.dims() == 1 ? !fits_vector(weight, dtype) : weight.dtype() != dtype))
      return false;
  return true;
}

const void* Held::hold(const Tensor& tensor, const char* name,
                       std::initializer_list<int64_t> shape) {
  if (!tensor.defined()) return nullptr;
  check(tensor.dtype() == dtype, name, " must be a strided tensor of the input's dtype ",
        name_of(dtype), " on the CPU, got ", name_of(tensor.dtype()), " on cpu");
  return hold_as(tensor, name, shape, dtype);
}

const void* Held::hold_vector(const Tensor& tensor, const char* name, int64_t size) {
  if (!tensor.defined()) return nullptr;
  check(fits_vector(tensor, dtype), name, " must be a strided tensor of the input's dtype ",
        name_of(dtype), ", or Float beside half precision, on the CPU, got ",
        name_of(tensor.dtype()), " on cpu");
  return hold_as(tensor, name, {size}, vectors);
}

const void* Held::hold_as(const Tensor& tensor, const char* name,
                          std::initializer_list<int64_t> shape, Dtype wanted) {
  const Sizes expected{shape.begin(), static_cast<int64_t>(shape.size())};
  check(tensor.sizes() == expected, name, " must be of shape ", expected, ", got ", tensor.sizes());
  if (tensor.dtype() == wanted && tensor.is_contiguous()) return tensor.data();
  copies.push_back(tensor.to(wanted).contiguous());
  return copies.back().data();
}

namespace {

int64_t gates_of(const std::vector<int64_t>& codes) {
  return gates_of_codes(codes.data(), static_cast<int64_t>(codes.size()));
}

// A layer with its memory: whatever `layer` points to is held by what is beside it, or by whoever
// called.
struct HeldLayer {
  layernorm_layer layer{};
  int64_t rows = 0;  // of all steps
  bool is_lstm = false;

  explicit HeldLayer(const LayerArguments& given, bool reverse) : given_(given) {
    const Tensor& input = given.input;
    const bool packed = given.batch_sizes.has_value();
    check_codes();
    check(is_supported(input.dtype()) && input.dims() == (packed ? 2 : 3),
          "input must be a strided tensor of ", packed ? 2 : 3,
          " dimensions on the CPU, of float32, float64, bfloat16 or float16; got ", input.sizes(),
          " of ", name_of(input.dtype()));
    held_.decide(input.dtype(), given.weights, layer);
    layer.struct_size = sizeof(layer);
    layer.reverse = reverse;
    layer.spec = given.codes.data();
    layer.spec_count = static_cast<int64_t>(given.codes.size());
    layer.eps = given.eps;
    is_lstm = gates_of(given.codes) == 4;
    read_sizes();
    read_input(packed);
    hold_weights();
    hold_state();
  }

  [[nodiscard]] bool packed() const { return layer.batch_sizes != nullptr; }
  [[nodiscard]] Tensor empty_output() const {
    const Tensor& input = given_.input;
    if (packed()) return input.empty({rows, layer.output_size}, input.dtype());
    return input.empty({layer.steps, layer.batch, layer.output_size}, input.dtype());
  }
  [[nodiscard]] bool is_long() const {
    return rows * layer.hidden_size * (layer.input_size + layer.output_size) > 8 * kGrain;
  }
  // x, h, c and stats; one that is not kept has a single dimension of no element.
  [[nodiscard]] std::array<Tensor, 4> empty_saved(bool recompute) const {
    std::array<Tensor, 4> saved;
    const auto widths = saved_widths(recompute);
    for (size_t i = 0; i < 4; ++i) {
      const Tensor& input = given_.input;
      const Dtype dtype = i == 3 ? computed_dtype(input.dtype()) : input.dtype();
      saved[i] =
          is_kept(i, recompute) ? input.empty({rows, widths[i]}, dtype) : input.empty({0}, dtype);
    }
    return saved;
  }
  // What forward returned, in whatever layout it comes back.
  layernorm_saved hold_saved(const std::array<Tensor, 4>& saved) {
    constexpr const char* kNames[] = {"saved_x", "saved_h", "saved_c", "saved_stats"};
    const bool recompute = saved[0].dims() == 1;
    const auto widths = saved_widths(recompute);
    void* data[4];
    for (size_t i = 0; i < 4; ++i) {
      Held& held = i == 3 ? held_stats_ : held_;
      held_stats_.dtype = computed_dtype(held_.dtype);
      const void* const at = is_kept(i, recompute)
                                 ? held.hold(saved[i], kNames[i], {rows, widths[i]})
                                 : held.hold(saved[i], kNames[i], {0});
      data[i] = const_cast<void*>(at);
    }
    return {data[0], data[1], data[2], data[3]};
  }
  const void* hold(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    return held_.hold(tensor, name, shape);
  }
  const void* hold_output(const Tensor& tensor, const char* name) {
    if (packed()) return hold(tensor, name, {rows, layer.output_size});
    return hold(tensor, name, {layer.steps, layer.batch, layer.output_size});
  }

 private:
  const LayerArguments& given_;
  Held held_, held_stats_;

  void check_codes() {
    Recurrent unused{};
    const std::string problem =
        decode_spec(given_.codes.data(), static_cast<int64_t>(given_.codes.size()), 0, unused);
    check(problem.empty(), problem);
  }

  [[nodiscard]] std::array<int64_t, 4> saved_widths(bool recompute) const {
    std::array<int64_t, 4> widths;
    check_status(layernorm_saved_widths(&layer, recompute, widths.data()));
    return widths;
  }
  [[nodiscard]] bool is_kept(size_t i, bool recompute) const {
    if (i == 2) return is_lstm;
    return !recompute && (i != 1 || saved_widths(false)[1] > 0);
  }

  void read_sizes() {
    check(given_.count == LAYERNORM_WEIGHTS, "weights must be a list of ",
          static_cast<int>(LAYERNORM_WEIGHTS), ", got ", given_.count);
    const Tensor& weight_ih = given_.weights[LAYERNORM_WEIGHT_IH];
    const Tensor& weight_hh = given_.weights[LAYERNORM_WEIGHT_HH];
    const int64_t gates = gates_of(given_.codes);
    check(weight_ih.defined() && weight_hh.defined() && weight_ih.dims() == 2 &&
              weight_hh.dims() == 2 && weight_hh.size(0) > 0 && weight_hh.size(0) % gates == 0 &&
              weight_hh.size(1) > 0,
          "weight_ih and weight_hh must be matrices of ", gates, " times hidden_size rows");
    layer.input_size = given_.input.size(-1);
    layer.hidden_size = weight_hh.size(0) / gates;
    layer.output_size = weight_hh.size(1);
    check_output_size(is_lstm, given_.weights[LAYERNORM_WEIGHT_HR].defined(), layer.hidden_size,
                      layer.output_size);
  }

  void read_input(bool packed) {
    const Tensor& input = given_.input;
    if (packed) {
      const auto& sizes = *given_.batch_sizes;
      layer.steps = static_cast<int64_t>(sizes.size());
      layer.batch = sizes.empty() ? 0 : sizes[0];
      check_batch_sizes({sizes.data(), layer.steps}, layer.batch);
      for (const int64_t size : sizes) rows += size;
      check(rows == input.size(0), "batch_sizes must sum to the input's rows ", input.size(0),
            ", got ", Sizes{sizes.data(), layer.steps});
      layer.batch_sizes = sizes.data();
    } else {
      layer.steps = input.size(0);
      layer.batch = input.size(1);
      rows = layer.steps * layer.batch;
    }
    check(layer.steps > 0, "Expected sequence length to be larger than 0 in RNN");
    const bool in_place = input.size(-1) <= 1 || input.stride(-1) == 1;
    if (!in_place) held_.copies.push_back(input.contiguous());
    const Tensor& read = in_place ? input : held_.copies.back();
    layer.input = read.data();
    layer.input_row_stride = read.stride(packed ? 0 : 1);
    layer.input_step_stride = packed ? 0 : read.stride(0);
  }

  void hold_weights() {
    const int64_t width = gates_of(given_.codes) * layer.hidden_size;
    const int64_t H = layer.hidden_size, P = layer.output_size;
    const auto weight = [&](int at, const char* name, std::initializer_list<int64_t> shape) {
      layer.weights[at] = held_.hold(given_.weights[at], name, shape);
    };
    const auto vector = [&](int at, const char* name, int64_t size) {
      layer.weights[at] = held_.hold_vector(given_.weights[at], name, size);
    };
    weight(LAYERNORM_WEIGHT_IH, "weight_ih", {width, layer.input_size});
    weight(LAYERNORM_WEIGHT_HH, "weight_hh", {width, P});
    weight(LAYERNORM_WEIGHT_HR, "weight_hr", {P, H});
    vector(LAYERNORM_BIAS_IH, "bias_ih", width);
    vector(LAYERNORM_BIAS_HH, "bias_hh", width);
    vector(LAYERNORM_GAIN_IH, "gain_ih", width);
    vector(LAYERNORM_GAIN_HH, "gain_hh", width);
    vector(LAYERNORM_BIAS, "bias", width);
    vector(LAYERNORM_BIAS_HN, "bias_hn", H);
    vector(LAYERNORM_GAIN_CELL, "gain_cell", H);
    vector(LAYERNORM_BIAS_CELL, "bias_cell", H);
  }

  void hold_state() {
    layer.h0 = held_.hold(given_.h, "h", {layer.batch, layer.output_size});
    if (is_lstm) {
      check(given_.c.defined(), "an LSTM's state has a cell, c");
      layer.c0 = held_.hold(given_.c, "c", {layer.batch, layer.hidden_size});
    }
    layer.reset_h = held_.hold(given_.reset_h, "reset_h", {layer.batch, layer.output_size});
    if (is_lstm)
      layer.reset_c = held_.hold(given_.reset_c, "reset_c", {layer.batch, layer.hidden_size});
    const Tensor& resets = given_.resets;
    if (!resets.defined()) return;
    const Sizes all = given_.input.sizes();
    check(resets.dtype() == Dtype::kBool && resets.sizes() == Sizes{all.data, all.count - 1},
          "resets must be bool, of the input's shape but for the features");
    if (!resets.is_contiguous()) held_.copies.push_back(resets.contiguous());
    layer.resets = static_cast<const uint8_t*>(resets.is_contiguous() ? resets.data()
                                                                      : held_.copies.back().data());
  }
};

// Whether to keep what backward needs, and how much of it.
enum class Keep { kNothing, kAll, kLittle };

PyObject* run_forward(const LayerArguments& given, bool reverse, Keep keep) {
  const HeldLayer held(given, reverse);
  const auto& layer = held.layer;
  const Tensor& input = given.input;
  Tensor output = held.empty_output();
  Tensor hn = input.empty({layer.batch, layer.output_size}, input.dtype());
  Tensor cn = held.is_lstm ? input.empty({layer.batch, layer.hidden_size}, input.dtype())
                           : input.empty({0}, input.dtype());
  std::array<Tensor, 4> saved;
  if (keep != Keep::kNothing) saved = held.empty_saved(keep == Keep::kLittle);
  const layernorm_layer_outputs outputs{
      sizeof(outputs),
      output.data(),
      hn.data(),
      cn.data(),
      {saved[0].data(), saved[1].data(), saved[2].data(), saved[3].data()}};
  ask_threads();
  layernorm_status status{};
  unlocked(held.is_long(), [&] { status = layernorm_recurrent_forward(&layer, &outputs); });
  check_status(status);
  if (keep == Keep::kNothing) return tuple_of(output, hn, cn);
  return tuple_of(output, hn, cn, saved[0], saved[1], saved[2], saved[3]);
}

}  // namespace

// recurrent(input, h, c, weights, resets, reset_h, reset_c, batch_sizes, spec, eps, reverse,
// recompute): output, h and c, which has no element but for an LSTM.
PyObject* recurrent(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    constexpr int kLayer = LayerArguments::kCount;
    check_count(count, kLayer + 2, "recurrent");
    LayerArguments given;
    if (!is_plain_here() || !given.read(arguments) || !given.fits()) return not_implemented();
    const bool reverse = as_flag(arguments[kLayer]);
    if (!is_grad_enabled() || !given.requires_grad())
      return run_forward(given, reverse, Keep::kNothing);
    const Keep keep = as_flag(arguments[kLayer + 1]) ? Keep::kLittle : Keep::kAll;
    Object found(run_forward(given, reverse, keep));
    Object options = checked(PyTuple_New(4));  // batch_sizes, spec, eps, reverse
    for (Py_ssize_t i = 0; i < 4; ++i)
      PyTuple_SetItem(options.get(), i, Py_NewRef(arguments[7 + i]));
    // input, h, c, reset_h, reset_c, resets, and what is no tensor.
    constexpr Py_ssize_t kOrder[] = {0, 1, 2, 5, 6, 4};
    const Object all = checked(PyTuple_New(8 + LAYERNORM_WEIGHTS));
    for (Py_ssize_t i = 0; i < 6; ++i)
      PyTuple_SetItem(all.get(), i, Py_NewRef(arguments[kOrder[i]]));
    PyTuple_SetItem(all.get(), 6, options.release());
    PyTuple_SetItem(all.get(), 7, found.release());
    for (Py_ssize_t i = 0; i < LAYERNORM_WEIGHTS; ++i)
      PyTuple_SetItem(all.get(), 8 + i, Py_NewRef(PyList_GetItem(arguments[3], i)));
    return checked(PyObject_Call(recorder("recurrent"), all.get(), nullptr)).release();
  });
}

// Likewise without a derivative; recompute is None where nothing is to be kept, else what is kept
// is returned too: x, h, c and stats, without an element where there is nothing.
PyObject* recurrent_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    constexpr int kLayer = LayerArguments::kCount;
    check_count(count, kLayer + 2, "recurrent_forward");
    LayerArguments given;
    if (!given.read(arguments)) return not_implemented();
    PyObject* const recompute = arguments[kLayer + 1];
    const Keep keep = recompute == Py_None ? Keep::kNothing
                      : as_flag(recompute) ? Keep::kLittle
                                           : Keep::kAll;
    return run_forward(given, as_flag(arguments[kLayer]), keep);
  });
}

// recurrent_backward(input, h, c, weights, resets, reset_h, reset_c, batch_sizes, spec, eps,
// reverse, grad_output, grad_h, grad_c, output, saved_x, saved_h, saved_c, saved_stats, wanted):
// gradients of input, h, c, reset_h and reset_c, and a list of those of the weights; None for those
// not wanted.
PyObject* recurrent_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    constexpr int kLayer = LayerArguments::kCount, kStates = 5;
    check_count(count, kLayer + 10, "recurrent_backward");
    PyObject* const* const rest = arguments + kLayer + 1;
    LayerArguments given;
    Tensor grad_output, grad_h, grad_c, output;
    std::array<Tensor, 4> saved;
    if (!given.read(arguments) || !grad_output.read_optional(rest[0]) ||
        !grad_h.read_optional(rest[1]) || !grad_c.read_optional(rest[2]) || !output.read(rest[3]))
      return not_implemented();
    for (size_t i = 0; i < 4; ++i)
      if (!saved[i].read(rest[4 + i])) return not_implemented();
    const std::vector<int64_t> wanted = as_integers(rest[8], "wanted");
    check(wanted.size() == kStates + LAYERNORM_WEIGHTS, "wanted must be a list of ",
          kStates + LAYERNORM_WEIGHTS, ", got ", wanted.size());
    HeldLayer held(given, as_flag(arguments[kLayer]));
    const auto& layer = held.layer;
    const Tensor& input = given.input;
    const Dtype dtype = input.dtype();
    layernorm_layer_gradients g{};
    g.struct_size = sizeof(g);
    g.grad_output = held.hold_output(grad_output, "grad_output");
    g.grad_hn = held.hold(grad_h, "grad_h", {layer.batch, layer.output_size});
    if (held.is_lstm) g.grad_cn = held.hold(grad_c, "grad_c", {layer.batch, layer.hidden_size});
    g.output = held.hold_output(output, "output");
    g.saved = held.hold_saved(saved);
    std::array<Tensor, kStates> found;
    if (wanted[0]) found[0] = input.empty(input.sizes(), dtype);
    if (wanted[1]) found[1] = input.empty({layer.batch, layer.output_size}, dtype);
    if (wanted[2] && held.is_lstm) found[2] = input.empty({layer.batch, layer.hidden_size}, dtype);
    g.grad_input = found[0].data();
    g.grad_h0 = found[1].data();
    g.grad_c0 = found[2].data();
    const std::array<const Tensor*, 2> starts{&given.reset_h, &given.reset_c};
    std::array<Tensor, 2> of_starts;
    for (size_t i = 0; i < (held.is_lstm ? 2u : 1u); ++i) {
      if (!wanted[3 + i] || !starts[i]->defined()) continue;
      of_starts[i] = input.empty(starts[i]->sizes(), computed_dtype(dtype));
      of_starts[i].clear();
    }
    g.grad_reset_h = of_starts[0].data();
    g.grad_reset_c = of_starts[1].data();
    std::array<Tensor, LAYERNORM_WEIGHTS> grads;
    for (int i = 0; i < LAYERNORM_WEIGHTS; ++i) {
      const Tensor& weight = given.weights[i];
      if (!wanted[kStates + i] || !weight.defined()) continue;
      grads[i] = input.empty(weight.sizes(), computed_dtype(dtype));
      if (held.rows == 0) grads[i].clear();
      g.grad_weights[i] = grads[i].data();
    }
    ask_threads();
    layernorm_status status{};
    unlocked(held.is_long(), [&] { status = layernorm_recurrent_backward(&layer, &g); });
    check_status(status);
    Object list = checked(PyList_New(LAYERNORM_WEIGHTS));
    for (int i = 0; i < LAYERNORM_WEIGHTS; ++i)
      PyList_SetItem(list.get(), i,
                     grads[i].defined() ? grads[i].to(given.weights[i].dtype()).release()
                                        : Py_NewRef(Py_None));
    for (size_t i = 0; i < 2; ++i)
      if (of_starts[i].defined()) found[3 + i] = of_starts[i].to(dtype);
    const Object of_states(tuple_of(found[0], found[1], found[2], found[3], found[4]));
    const Object all = checked(PyTuple_New(kStates + 1));
    for (Py_ssize_t i = 0; i < kStates; ++i)
      PyTuple_SetItem(all.get(), i, Py_NewRef(PyTuple_GetItem(of_states.get(), i)));
    PyTuple_SetItem(all.get(), kStates, list.release());
    return Py_NewRef(all.get());
  });
}

}  // namespace layernorm
