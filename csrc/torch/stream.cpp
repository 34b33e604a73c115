#include "stream.hpp"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "parallel.hpp"

namespace layernorm {
namespace {

// Nothing stands between such a tensor and its memory: no conjugate or negative view, no wrapper of
// a transform or of a subclass, no other layout or device.
bool is_plain(const Tensor& tensor) {
  static const uint64_t others = ~(c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                   c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
                                   c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) |
                                   c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView))
                                      .raw_repr();
  return (tensor.key_set().raw_repr() & others) == 0;
}

template <typename Element>
void copy_as(const StridedRows& from, const StridedRows& to, int64_t rows, int64_t features) {
  const auto* const a = reinterpret_cast<const Element*>(from.data);
  auto* const b = reinterpret_cast<Element*>(to.data);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t j = 0; j < features; ++j)
      b[n * to.row_stride + j * to.feature_stride] =
          a[n * from.row_stride + j * from.feature_stride];
}

}  // namespace

Stream::Stream(const std::vector<RecurrentInputs>& layers) {
  TORCH_CHECK(!layers.empty(), "layernorm: a stream must have a layer");
  layers_.reserve(layers.size());
  for (const auto& inputs : layers) {
    auto& one = layers_.emplace_back(Layer{RecurrentLayer(inputs), {}, {}});
    auto& r = one.layer.r;
    TORCH_CHECK(r.steps == 1 && r.batch > 0 && !r.reverse && inputs.h.is_contiguous() &&
                    (!inputs.c || inputs.c->is_contiguous()),
                "layernorm: a stream must have a row, and a contiguous state");
    TORCH_CHECK(layers_.size() == 1 || r.input_size == output_size_, "layernorm: a layer of ",
                output_size_, " features before one that reads ", r.input_size);
    one.prepared = prepare(one.layer, false);
    one.output = one.layer.allocate({r.batch, r.output_size});
    // A step has read a row's state before it writes that row's next.
    r.hn = inputs.h.mutable_data_ptr();
    r.cn = r.c0 == nullptr ? nullptr : inputs.c->mutable_data_ptr();
    output_size_ = r.output_size;
    const int64_t products = r.gates * r.hidden_size * (r.input_size + r.output_size) +
                             (r.projected ? r.hidden_size * r.output_size : 0);
    products_ += r.batch * products;
    weight_bytes_ += products * static_cast<int64_t>(inputs.h.element_size());
  }
  const auto& first = layers_.front().layer;
  batch_ = first.r.batch;
  input_size_ = first.r.input_size;
  type_ = first.options.dtype().toScalarType();
  element_ = c10::elementSize(type_);
  input_ = first.allocate({batch_, input_size_});
  for (size_t i = 1; i < layers_.size(); ++i) {
    auto& r = layers_[i].layer.r;
    TORCH_CHECK(r.batch == batch_, "layernorm: layers must have the same batch");
    r.input = layers_[i - 1].output.const_data_ptr();
    r.input_row_stride = r.input_size;
  }
}

bool Stream::fits(const Tensor& tensor, int64_t size) const {
  if (!is_plain(tensor) || tensor.scalar_type() != type_) return false;
  const auto sizes = tensor.sizes();
  if (sizes.size() == 2) return sizes[0] == batch_ && sizes[1] == size;
  return sizes.size() == 1 && batch_ == 1 && sizes[0] == size;
}

bool Stream::reads(const Tensor& input) const { return fits(input, input_size_); }

bool Stream::writes(const Tensor& output) const {
  if (!fits(output, output_size_)) return false;
  // Elements share memory where the nearest two of equal offset, feature_stride/common rows and
  // row_stride/common features apart, are both there.
  const StridedRows rows = rows_of(output);
  const int64_t common = std::gcd(rows.row_stride, rows.feature_stride);
  if (common == 0
          ? batch_ * output_size_ > 1
          : rows.feature_stride / common < batch_ && rows.row_stride / common < output_size_)
    return false;
  return !(output.requires_grad() && at::GradMode::is_enabled());
}

Tensor Stream::allocate(const Tensor& input) const {
  const int64_t sizes[] = {batch_, output_size_};
  return at::detail::empty_cpu(
      input.dim() == 2 ? at::IntArrayRef(sizes, 2) : at::IntArrayRef(sizes + 1, 1), type_);
}

StridedRows Stream::rows_of(const Tensor& tensor) const {
  const auto strides = tensor.strides();
  auto* const data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  if (strides.size() == 1) return {data, strides[0] * tensor.sizes()[0], strides[0]};
  return {data, strides[0], strides[1]};
}

void Stream::copy(const StridedRows& from, const StridedRows& to, int64_t features) const {
  switch (element_) {
    case 2:
      return copy_as<uint16_t>(from, to, batch_, features);
    case 4:
      return copy_as<uint32_t>(from, to, batch_, features);
    default:
      return copy_as<uint64_t>(from, to, batch_, features);
  }
}

// Whether the memory from the first to the last element of a meets that of b.
bool Stream::meet(const StridedRows& a, int64_t a_size, const StridedRows& b,
                  int64_t b_size) const {
  const auto end = [&](const StridedRows& rows, int64_t size) {
    const int64_t last = (batch_ - 1) * rows.row_stride + (size - 1) * rows.feature_stride;
    return rows.data + (last + 1) * static_cast<int64_t>(element_);
  };
  return a.data < end(b, b_size) && b.data < end(a, a_size);
}

void Stream::step(const Tensor& input, const Tensor& output) {
  StridedRows x = rows_of(input);
  const StridedRows y = rows_of(output);
  const bool in_place = (output_size_ == 1 || y.feature_stride == 1) &&
                        (batch_ == 1 || y.row_stride == output_size_) &&
                        !meet(x, input_size_, y, output_size_);
  if (x.feature_stride != 1 && input_size_ > 1) {
    const StridedRows buffer = rows_of(input_);
    copy(x, buffer, input_size_);
    x = buffer;
  }
  auto& first = layers_.front().layer.r;
  first.input = x.data;
  first.input_row_stride = x.row_stride;
  for (auto& one : layers_) one.layer.r.output = one.output.mutable_data_ptr();
  if (in_place) layers_.back().layer.r.output = y.data;
  run();
  if (!in_place) copy(rows_of(layers_.back().output), y, output_size_);
}

void Stream::plan(int threads) {
  threads_ = threads;
  members_ = 1;
  ranges_ = 1;
  if (threads > 1 && (products_ >= kWorthAThread || weight_bytes_ > kWorthATeam)) {
    if (batch_ < 4 * threads)
      members_ = threads;
    else
      ranges_ = std::min<int64_t>(threads, batch_);
  }
  scratch_bytes_ = 0;
  const int64_t rows = (batch_ + ranges_ - 1) / ranges_;
  for (const auto& one : layers_)
    scratch_bytes_ =
        std::max(scratch_bytes_, one.layer.kernels->forward_bytes(one.layer.r, rows, members_));
  scratch_bytes_ = (scratch_bytes_ + 63) / 64 * 64;
  scratch_ = scratch(scratch_bytes_ * static_cast<size_t>(ranges_));
}

void Stream::run() {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads != threads_) plan(threads);
  auto* const memory = static_cast<char*>(scratch_.mutable_data_ptr());
  if (members_ > 1) {
    Team team(members_);
    in_parallel_parts(members_, 1, [&](int64_t, int64_t) {
      const int rank = team.join();
      if (rank >= 0) run_rows(0, batch_, memory, team, rank);
    });
    return;
  }
  in_parallel_parts(ranges_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Team alone(1);
      run_rows(batch_ * i / ranges_, batch_ * (i + 1) / ranges_,
               memory + scratch_bytes_ * static_cast<size_t>(i), alone, 0);
    }
  });
}

void Stream::run_rows(int64_t begin, int64_t end, void* memory, Team& team, int rank) {
  for (const auto& one : layers_) {
    one.layer.kernels->forward(one.layer.r, one.prepared.const_data_ptr(), memory, begin, end, team,
                               rank);
    team.wait();  // the layers share the scratch memory
  }
}

}  // namespace layernorm
