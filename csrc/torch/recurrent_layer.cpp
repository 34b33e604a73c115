// A recurrent layer as the kernels see it: arguments checked, memory held.
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "isa/huge_pages.hpp"
#include "recurrent.hpp"
#include "recurrent/spec.hpp"

namespace layernorm {
namespace {

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kElementFloat32;
    case at::kDouble:
      return kElementFloat64;
    case at::kBFloat16:
      return kElementBFloat16;
    default:
      return kElementFloat16;
  }
}

// Working memory that calls leave to those after them: fresh memory has to be cleared by the system
// first, and for the packed weights of a few rows that would take longer than the packing. Never
// destroyed, since tensors may outlive it. Nobody waits for the mutex: where another thread holds
// it, memory comes from the system, as it does in the child of a fork() that came meanwhile.
class Blocks {
 public:
  static Blocks& all() {
    static auto* const blocks = new Blocks;
    return *blocks;
  }

  // Of at least so many bytes, and of no more than twice as many.
  void* take(size_t bytes, size_t& found) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto fit = kept_.lower_bound(bytes);
    if (fit == kept_.end() || fit->first / 2 > bytes) return nullptr;
    found = fit->first;
    void* const data = fit->second;
    total_ -= found;
    kept_.erase(fit);
    return data;
  }
  // False if it is not kept.
  bool give_back(void* data, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || total_ + bytes > kMost) return false;
    kept_.emplace(bytes, data);
    total_ += bytes;
    return true;
  }

 private:
  static constexpr size_t kMost = size_t{64} << 20U;
  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;
  size_t total_ = 0;
};

}  // namespace

void read_spec(at::IntArrayRef spec, double eps, Recurrent& r) {
  const std::string problem = decode_spec(spec.data(), static_cast<int64_t>(spec.size()), eps, r);
  TORCH_CHECK(problem.empty(), "layernorm: ", problem);
}

const RecurrentKernels& kernels_of(at::ScalarType type) {
  return (*capability().recurrences)[element_type(type)];
}

Tensor scratch(size_t bytes) {
  constexpr size_t kSmall = size_t{1} << 20U;  // the C library reuses what is smaller
  if (bytes < kSmall) return at::empty({static_cast<int64_t>(bytes)}, at::kByte);
  size_t size = (bytes + 63) / 64 * 64;
  void* data = Blocks::all().take(size, size);
  if (data == nullptr) {
    data = std::aligned_alloc(64, size);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "layernorm: could not allocate ", size,
                     " bytes of working memory");
    want_huge_pages(data, size);
  }
  return at::from_blob(
      data, {static_cast<int64_t>(bytes)},
      [size](void* mine) {
        if (!Blocks::all().give_back(mine, size)) std::free(mine);
      },
      at::kByte);
}

Tensor RecurrentLayer::allocate_computed(at::IntArrayRef sizes) const {
  return at::empty(sizes, options.dtype(computed));
}

const void* Held::hold(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape) {
  if (!is_given(tensor)) return nullptr;
  TORCH_CHECK(tensor->sizes() == shape, "layernorm: ", name, " must be of shape ", shape, ", got ",
              tensor->sizes());
  TORCH_CHECK(tensor->scalar_type() == type && tensor->device().is_cpu() &&
                  tensor->layout() == at::kStrided,
              "layernorm: ", name, " must be a strided tensor of the input's dtype ", type,
              " on the CPU, got ", tensor->scalar_type(), " on ", tensor->device());
  if (tensor->is_contiguous()) return tensor->const_data_ptr();
  tensors.push_back(tensor->contiguous());
  return tensors.back().const_data_ptr();
}

RecurrentLayer::RecurrentLayer(const RecurrentInputs& inputs) {
  read_spec(inputs.spec, inputs.eps, r);
  r.reverse = inputs.reverse;
  require(inputs.input, "input");
  require(inputs.h, "h");
  const Tensor& input = inputs.input;
  const bool packed = inputs.batch_sizes.has_value();
  TORCH_CHECK(is_supported(input.scalar_type()) && input.device().is_cpu() &&
                  input.layout() == at::kStrided && input.dim() == (packed ? 2 : 3),
              "layernorm: input must be a strided tensor of ", packed ? 2 : 3,
              " dimensions on the CPU, of float32, float64, bfloat16 or float16; got ",
              input.sizes(), " of ", input.scalar_type(), " on ", input.device());
  options = input.options();
  held_.type = input.scalar_type();
  computed = computed_type(input.scalar_type());
  kernels = &kernels_of(input.scalar_type());
  read_sizes(inputs);
  read_input(inputs);
  hold_weights(inputs);
  hold_state(inputs);
}

void RecurrentLayer::read_sizes(const RecurrentInputs& inputs) {
  TORCH_CHECK(inputs.weights.size() == kWeights, "layernorm: weights must be a list of ",
              static_cast<int>(kWeights), ", got ", inputs.weights.size());
  const auto& weight_ih = inputs.weights[kWeightIh];
  const auto& weight_hh = inputs.weights[kWeightHh];
  TORCH_CHECK(is_given(weight_ih) && is_given(weight_hh) && weight_ih->dim() == 2 &&
                  weight_hh->dim() == 2 && weight_hh->size(0) > 0 &&
                  weight_hh->size(0) % r.gates == 0 && weight_hh->size(1) > 0,
              "layernorm: weight_ih and weight_hh must be matrices of ", r.gates,
              " times hidden_size rows");
  r.input_size = inputs.input.size(-1);
  r.hidden_size = weight_hh->size(0) / r.gates;
  r.output_size = weight_hh->size(1);
  r.projected = is_given(inputs.weights[kWeightHr]);
  TORCH_CHECK(r.projected ? r.cell == CellKind::kLstm && r.output_size <= r.hidden_size
                          : r.output_size == r.hidden_size,
              "layernorm: weight_hh must have hidden_size=", r.hidden_size,
              " columns, or those of weight_hr's rows; got ", r.output_size);
}

void RecurrentLayer::read_input(const RecurrentInputs& inputs) {
  const Tensor& input = inputs.input;
  const bool packed = inputs.batch_sizes.has_value();
  if (packed) {
    batch_sizes_ = *inputs.batch_sizes;
    r.steps = static_cast<int64_t>(batch_sizes_.size());
    r.batch = batch_sizes_.empty() ? 0 : batch_sizes_[0];
    int64_t before = r.batch;
    for (const int64_t size : batch_sizes_) {
      TORCH_CHECK(size > 0 && size <= before,
                  "layernorm: batch_sizes must be positive and not increasing, got ",
                  *inputs.batch_sizes);
      step_offsets_.push_back(rows);
      rows += size;
      before = size;
    }
    TORCH_CHECK(rows == input.size(0), "layernorm: batch_sizes must sum to the input's rows ",
                input.size(0), ", got ", *inputs.batch_sizes);
    r.batch_sizes = batch_sizes_.data();
    r.step_offsets = step_offsets_.data();
  } else {
    r.steps = input.size(0);
    r.batch = input.size(1);
    rows = r.steps * r.batch;
  }
  TORCH_CHECK(r.steps > 0, "layernorm: Expected sequence length to be larger than 0 in RNN");
  const bool in_place = input.size(-1) <= 1 || input.stride(-1) == 1;
  held_.tensors.push_back(in_place ? input : input.contiguous());
  const Tensor& read = held_.tensors.back();
  r.input = read.const_data_ptr();
  r.input_row_stride = read.stride(packed ? 0 : 1);
  r.input_step_stride = packed ? 0 : read.stride(0);
}

void RecurrentLayer::hold_weights(const RecurrentInputs& inputs) {
  const int64_t width = r.gates * r.hidden_size;
  const auto weight = [&](Weight which, const char* name, at::IntArrayRef shape) {
    return held_.hold(inputs.weights[which], name, shape);
  };
  r.weight_ih = weight(kWeightIh, "weight_ih", {width, r.input_size});
  r.weight_hh = weight(kWeightHh, "weight_hh", {width, r.output_size});
  r.weight_hr = weight(kWeightHr, "weight_hr", {r.output_size, r.hidden_size});
  r.bias_ih = weight(kBiasIh, "bias_ih", width);
  r.bias_hh = weight(kBiasHh, "bias_hh", width);
  r.gain_ih = weight(kGainIh, "gain_ih", width);
  r.gain_hh = weight(kGainHh, "gain_hh", width);
  r.bias = weight(kBias, "bias", width);
  r.bias_hn = weight(kBiasHn, "bias_hn", r.hidden_size);
  r.gain_cell = weight(kGainCell, "gain_cell", r.hidden_size);
  r.bias_cell = weight(kBiasCell, "bias_cell", r.hidden_size);
  // A gradient is summed where the parameter is used, and nowhere else.
  const bool two = r.inputs == Inputs::kSeparate && r.norm != NormKind::kNone;
  const bool normed = r.norm != NormKind::kNone;
  const bool cell_normed = r.cell == CellKind::kLstm && r.cell_norm != CellNorm::kNone;
  TORCH_CHECK((r.projection_bias || (!r.bias_ih && !r.bias_hh)) &&
                  (normed || (!r.gain_ih && !r.bias)) && (two || !r.gain_hh) &&
                  ((two && r.cell == CellKind::kGru) || !r.bias_hn) &&
                  (cell_normed || (!r.gain_cell && !r.bias_cell)),
              "layernorm: weights has a gain or bias that this variant does not have");
}

void RecurrentLayer::hold_state(const RecurrentInputs& inputs) {
  r.h0 = held_.hold(inputs.h, "h", {r.batch, r.output_size});
  if (r.cell == CellKind::kLstm) {
    TORCH_CHECK(is_given(inputs.c), "layernorm: an LSTM's state has a cell, c");
    r.c0 = held_.hold(*inputs.c, "c", {r.batch, r.hidden_size});
  }
  if (is_given(inputs.resets)) {
    const Tensor& resets = *inputs.resets;
    TORCH_CHECK(resets.scalar_type() == at::kBool && resets.device().is_cpu() &&
                    resets.sizes() == inputs.input.sizes().slice(0, inputs.input.dim() - 1),
                "layernorm: resets must be bool, of the input's shape but for the features");
    held_.tensors.push_back(resets.contiguous());
    r.resets = static_cast<const uint8_t*>(held_.tensors.back().const_data_ptr());
  }
}

std::vector<int64_t> RecurrentLayer::output_shape() const {
  if (packed()) return {rows, r.output_size};
  return {r.steps, r.batch, r.output_size};
}

SavedShapes RecurrentLayer::saved_shapes(bool recompute) const {
  const std::vector<int64_t> none{0};
  const int64_t products = r.inputs == Inputs::kSeparate ? 2 : 1;
  SavedShapes shapes;
  shapes.c = r.cell == CellKind::kLstm ? std::vector{rows, r.hidden_size} : none;
  shapes.x = recompute ? none : std::vector{rows, r.gates * r.hidden_size};
  shapes.h = recompute || saved_h_width(r) == 0 ? none : std::vector{rows, saved_h_width(r)};
  shapes.stats = recompute ? none : std::vector{rows, statistics_of(r) * products};
  return shapes;
}

Saved RecurrentLayer::keep(bool recompute) {
  const SavedShapes shapes = saved_shapes(recompute);
  const Saved saved{allocate(shapes.x), allocate(shapes.h), allocate(shapes.c),
                    allocate_computed(shapes.stats)};  // no two results are one tensor
  for (const auto& tensor : {saved.x, saved.h, saved.c})
    if (tensor.numel() > 0) want_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  use(saved);
  return saved;
}

void RecurrentLayer::use(const Saved& saved) {
  held_.tensors.insert(held_.tensors.end(), {saved.x, saved.h, saved.c, saved.stats});
  r.saved_x = data_of(saved.x);
  r.saved_h = data_of(saved.h);
  r.saved_c = data_of(saved.c);
  r.saved_stats = data_of(saved.stats);
}

}  // namespace layernorm
