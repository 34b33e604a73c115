// Layer norm and RMS norm over rows: what a kernel is given, and the kernels of each instruction
// set. Plain C++20, no framework header.
#pragma once

#include <cstdint>

namespace layernorm {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Where the rows of a tensor begin. The elements of a row lie side by side; the rows are indexed
// over up to kMaxDims dimensions, in elements.
struct RowLayout {
  static constexpr int kMaxDims = 6;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

// Types of the rows and of gain and bias.
enum Types { kFloat32, kFloat64, kBFloat16, kBFloat16Float32, kFloat16, kFloat16Float32, kTypes };

// output = (a - mean)·rstd·gain + bias, a = input or input + residual; without the mean where the
// norm is not centred (RMS norm). Statistics are float, for rows of double double.
struct Forward {
  const void* input;
  RowLayout input_rows;
  const void* residual;  // or null
  RowLayout residual_rows;
  const void* gain;  // [width], or null for 1; not null where there is a bias
  const void* bias;  // [width], or null for 0; null where not centred
  void* output;      // [rows, width]
  void* sum;         // [rows, width], where there is a residual
  void* mean;        // [rows]; null where not wanted or not centred
  void* rstd;        // [rows]; null where not wanted
  int64_t rows;
  int64_t width;
  double eps;
};

// The rows are cut into blocks, a number that depends on rows and width alone. The gradients of
// gain and bias are summed over each block, then over the blocks: in the same order for any number
// of threads.
struct Backward {
  const void* grad;  // of the output
  RowLayout grad_rows;
  const void* grad_sum;  // of the sum, or null
  RowLayout grad_sum_rows;
  const void* input;  // what was normalized: the input, or its sum with the residual
  RowLayout input_rows;
  const void* mean;  // [rows]; null where not centred
  const void* rstd;  // [rows]
  const void* gain;  // [width], or null for 1; not null where there are block sums
  void* grad_input;  // [rows, width], or null where not wanted
  void* block_gain;  // [blocks, width] of the statistics' type, or null where not wanted
  void* block_bias;  // likewise, where centred
  int64_t rows;
  int64_t width;
  int64_t rows_per_block;
};

// grad[column] = sum over the blocks of block_sums[block, column], in the type of gain and bias.
struct Reduce {
  const void* block_sums;
  void* grad;
  int64_t blocks;
  int64_t width;
};

struct NormKernels {
  void (*forward)(const Forward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const Backward&, int64_t block_begin, int64_t block_end);
  void (*reduce)(const Reduce&, int64_t column_begin, int64_t column_end);
};

// By [centred][types].
using NormTable = NormKernels[2][kTypes];

}  // namespace layernorm
