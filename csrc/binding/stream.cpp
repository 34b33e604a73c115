// The streams of layernorm.h: layers one step at a time, their parameters packed once and their
// memory taken once.
#include <algorithm>
#include <memory>
#include <vector>

#include "layer.hpp"
#include "parallel.hpp"

namespace layernorm {
namespace {

// The rows of a tensor as they lie in memory, strides in elements.
struct StridedRows {
  char* data = nullptr;
  int64_t row_stride = 0, feature_stride = 0;
};

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
}  // namespace layernorm

struct layernorm_stream {
 public:
  layernorm_stream(const layernorm_layer* layers, int64_t count);

  void step(layernorm::StridedRows x, const layernorm::StridedRows& y);

 private:
  using StridedRows = layernorm::StridedRows;
  using Scratch = layernorm::Scratch;

  struct Layer {
    layernorm::Layer layer;
    Scratch prepared;
    Scratch output;  // [N, P]
  };
  static constexpr int64_t kWorthAThread = int64_t{1} << 21;  // multiplications, about 40 us
  // Bytes of weights from which two threads are faster than one in a step of a row: a parallel
  // region and its barriers cost 5 us, and these do not stay in the cache of one core. Measured on
  // two cores of a Zen 4: 2.0 MiB 25 us by one and 19 by two, 2.3 MiB 28 and 21, 3.1 MiB 37 and 27,
  // 8 MiB 91 and 49; where the second core is busy the second thread is a loss.
  static constexpr int64_t kWorthATeam = int64_t{1} << 21;

  std::vector<Layer> layers_;
  Scratch input_;  // [N, F], for rows that are not contiguous
  int64_t batch_ = 0, input_size_ = 0, output_size_ = 0;
  int64_t products_ = 0, weight_bytes_ = 0;
  size_t element_ = 0;

  // How the work is shared, by so many threads.
  int threads_ = 0;
  int members_ = 1;     // of a team
  int64_t ranges_ = 1;  // of rows
  Scratch scratch_;
  size_t scratch_bytes_ = 0;  // of a range

  void copy(const StridedRows& from, const StridedRows& to, int64_t features) const;
  [[nodiscard]] bool meet(const StridedRows& a, int64_t a_size, const StridedRows& b,
                          int64_t b_size) const;
  void plan(int threads);
  void run();
  void run_rows(int64_t begin, int64_t end, void* memory, layernorm::Team& team, int rank);
};

layernorm_stream::layernorm_stream(const layernorm_layer* layers, int64_t count) {
  using layernorm::check;
  check(layers != nullptr && count > 0, "a stream must have a layer");
  layers_.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    auto& one = layers_.emplace_back(
        Layer{layernorm::Layer(layers + i, layernorm::Layer::kStreamed), {}, {}});
    auto& r = one.layer.r;
    check(r.batch > 0 && !r.reverse && r.h0 != nullptr,
          "a stream must have a row, and a contiguous state");
    check(i == 0 || r.input_size == output_size_, "a layer of ", output_size_,
          " features before one that reads ", r.input_size);
    check(i == 0 || (r.batch == batch_ && layers[i].dtype == layers[0].dtype),
          "layers must have the same batch and dtype");
    one.prepared = layernorm::prepare(one.layer, false);
    // A step has read a row's state before it writes that row's next.
    r.hn = const_cast<void*>(r.h0);
    r.cn = const_cast<void*>(r.c0);
    const bool half = layers[i].dtype >= LAYERNORM_BFLOAT16;
    element_ = half ? 2 : layernorm::computed_bytes(layers[i].dtype);
    batch_ = r.batch;
    output_size_ = r.output_size;
    one.output = Scratch(static_cast<size_t>(batch_ * output_size_) * element_);
    const int64_t products = r.gates * r.hidden_size * (r.input_size + r.output_size) +
                             (r.projected ? r.hidden_size * r.output_size : 0);
    products_ += r.batch * products;
    constexpr int64_t kNarrow[] = {0, 2, 1};  // bytes of an element, by layernorm_weight_kind
    const int64_t narrow = kNarrow[layers[i].weight_kind];
    weight_bytes_ += products * (narrow > 0 ? narrow : static_cast<int64_t>(element_));
  }
  input_size_ = layers_.front().layer.r.input_size;
  input_ = Scratch(static_cast<size_t>(batch_ * input_size_) * element_);
  for (size_t i = 1; i < layers_.size(); ++i) {
    auto& r = layers_[i].layer.r;
    r.input = layers_[i - 1].output.data();
    r.input_row_stride = r.input_size;
  }
}

void layernorm_stream::copy(const StridedRows& from, const StridedRows& to,
                            int64_t features) const {
  switch (element_) {
    case 2:
      return layernorm::copy_as<uint16_t>(from, to, batch_, features);
    case 4:
      return layernorm::copy_as<uint32_t>(from, to, batch_, features);
    default:
      return layernorm::copy_as<uint64_t>(from, to, batch_, features);
  }
}

// Whether the memory from the first to the last element of a meets that of b.
bool layernorm_stream::meet(const StridedRows& a, int64_t a_size, const StridedRows& b,
                            int64_t b_size) const {
  const auto end = [&](const StridedRows& rows, int64_t size) {
    const int64_t last = (batch_ - 1) * rows.row_stride + (size - 1) * rows.feature_stride;
    return rows.data + (last + 1) * static_cast<int64_t>(element_);
  };
  return a.data < end(b, b_size) && b.data < end(a, a_size);
}

void layernorm_stream::step(StridedRows x, const StridedRows& y) {
  const bool in_place = (output_size_ == 1 || y.feature_stride == 1) &&
                        (batch_ == 1 || y.row_stride == output_size_) &&
                        !meet(x, input_size_, y, output_size_);
  if (x.feature_stride != 1 && input_size_ > 1) {
    const StridedRows buffer{static_cast<char*>(input_.data()), input_size_, 1};
    copy(x, buffer, input_size_);
    x = buffer;
  }
  auto& first = layers_.front().layer.r;
  first.input = x.data;
  first.input_row_stride = x.row_stride;
  for (auto& one : layers_) one.layer.r.output = one.output.data();
  if (in_place) layers_.back().layer.r.output = y.data;
  run();
  if (!in_place)
    copy({static_cast<char*>(layers_.back().output.data()), output_size_, 1}, y, output_size_);
}

void layernorm_stream::plan(int threads) {
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
  scratch_ = Scratch(scratch_bytes_ * static_cast<size_t>(ranges_));
}

void layernorm_stream::run() {
  using layernorm::Team;
  const int threads = layernorm::thread_count();
  if (threads != threads_) plan(threads);
  auto* const memory = static_cast<char*>(scratch_.data());
  if (members_ > 1) {
    Team team(members_);
    layernorm::in_parallel_parts(members_, 1, [&](int64_t, int64_t) {
      const int rank = team.join();
      if (rank >= 0) run_rows(0, batch_, memory, team, rank);
    });
    return;
  }
  layernorm::in_parallel_parts(ranges_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Team alone(1);
      run_rows(batch_ * i / ranges_, batch_ * (i + 1) / ranges_,
               memory + scratch_bytes_ * static_cast<size_t>(i), alone, 0);
    }
  });
}

void layernorm_stream::run_rows(int64_t begin, int64_t end, void* memory, layernorm::Team& team,
                                int rank) {
  for (const auto& one : layers_) {
    one.layer.kernels->forward(one.layer.r, one.prepared.data(), memory, begin, end, team, rank);
    team.wait();  // the layers share the scratch memory
  }
}

layernorm_status layernorm_stream_create(const layernorm_layer* layers, int64_t count,
                                         layernorm_stream** stream) {
  return layernorm::status_of([&] {
    layernorm::check(stream != nullptr, "stream must be given");
    *stream = std::make_unique<layernorm_stream>(layers, count).release();
  });
}

layernorm_status layernorm_stream_step(layernorm_stream* stream, const void* input,
                                       const int64_t input_strides[2], void* output,
                                       const int64_t output_strides[2]) {
  return layernorm::status_of([&] {
    layernorm::check(stream != nullptr && output != nullptr, "stream and output must be given");
    stream->step({static_cast<char*>(const_cast<void*>(input)), input_strides[0], input_strides[1]},
                 {static_cast<char*>(output), output_strides[0], output_strides[1]});
  });
}

void layernorm_stream_destroy(layernorm_stream* stream) { delete stream; }
