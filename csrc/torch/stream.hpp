// Recurrent layers one step at a time: parameters are packed once, memory is taken once.
#pragma once

#include <Python.h>

#include <memory>

#include "recurrent.hpp"

namespace layernorm {

// The rows of a tensor as they lie in memory, strides in elements.
struct StridedRows {
  char* data = nullptr;
  int64_t row_stride = 0, feature_stride = 0;
};

class Stream {
 public:
  // Of each layer its weights, its state in memory that is written to, and an input of one step, to
  // be used as a buffer.
  explicit Stream(const std::vector<RecurrentInputs>& layers);

  // Whether a step can read or write such a tensor: (batch, size), or (size) where the batch is 1.
  [[nodiscard]] bool reads(const Tensor& input) const;
  [[nodiscard]] bool writes(const Tensor& output) const;
  // The result of a step for such an input.
  [[nodiscard]] Tensor allocate(const Tensor& input) const;
  // Whether a step takes so long that others should run meanwhile.
  [[nodiscard]] bool is_long() const { return products_ >= kWorthAThread; }

  // Takes one step. Input and output may overlap in any way.
  void step(const Tensor& input, const Tensor& output);

 private:
  struct Layer {
    RecurrentLayer layer;
    Tensor prepared;
    Tensor output;  // [N, P]
  };
  static constexpr int64_t kWorthAThread = int64_t{1} << 21;  // multiplications, about 40 us
  // Bytes of weights from which two threads are faster than one in a step of a row: a parallel
  // region and its barriers cost 5 us, and these do not stay in the cache of one core. Measured on
  // two cores of a Zen 4: 2.0 MiB 25 us by one and 19 by two, 2.3 MiB 28 and 21, 3.1 MiB 37 and 27,
  // 8 MiB 91 and 49; where the second core is busy the second thread is a loss.
  static constexpr int64_t kWorthATeam = int64_t{1} << 21;

  std::vector<Layer> layers_;
  Tensor input_;  // [N, F], for rows that are not contiguous
  at::ScalarType type_;
  int64_t batch_, input_size_, output_size_;
  int64_t products_ = 0, weight_bytes_ = 0;
  size_t element_;

  // How the work is shared, by so many threads.
  int threads_ = 0;
  int members_ = 1;     // of a team
  int64_t ranges_ = 1;  // of rows
  Tensor scratch_;
  size_t scratch_bytes_ = 0;  // of a range

  [[nodiscard]] bool fits(const Tensor& tensor, int64_t size) const;
  [[nodiscard]] StridedRows rows_of(const Tensor& tensor) const;
  void copy(const StridedRows& from, const StridedRows& to, int64_t features) const;
  [[nodiscard]] bool meet(const StridedRows& a, int64_t a_size, const StridedRows& b,
                          int64_t b_size) const;
  void plan(int threads);
  void run();
  void run_rows(int64_t begin, int64_t end, void* memory, Team& team, int rank);
};

// The Python type `layernorm._native.Stream`, or null with an exception set.
PyObject* stream_type();

}  // namespace layernorm
