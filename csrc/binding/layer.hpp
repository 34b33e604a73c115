// A recurrent layer of layernorm.h as the kernels see it.
#pragma once

#include <vector>

#include "isa/capability.hpp"
#include "memory.hpp"
#include "status.hpp"

namespace layernorm {

// A layer whose description has been checked. Whatever `r` points to belongs to somebody else, but
// for the first rows of the steps.
struct Layer {
  Recurrent r{};
  const RecurrentKernels* kernels = nullptr;
  int64_t rows = 0;  // of all steps

  // A layer over a sequence; one step of a stream, which has no input yet; or the part of a step
  // after its products.
  enum Kind { kSequence, kStreamed, kGates };
  Layer(const layernorm_layer* given, Kind kind);

  void keep(const layernorm_saved& saved);

 private:
  std::vector<int64_t> step_offsets_;

  void check_sizes(const layernorm_layer& given, Kind kind);
  void read_steps(const layernorm_layer& given);
  void read_weights(const layernorm_layer& given, Kind kind);
};

// Raise where the sizes do not fit together.
void check_output_size(bool is_lstm, bool projected, int64_t hidden_size, int64_t output_size);
void check_batch_sizes(const Sizes& sizes, int64_t batch);

// The parameters of a layer as the kernels read them.
Scratch prepare(const Layer& layer, bool backward);

// Bytes of an element, as it is computed with.
inline size_t computed_bytes(layernorm_dtype dtype) { return dtype == LAYERNORM_FLOAT64 ? 8 : 4; }

}  // namespace layernorm
