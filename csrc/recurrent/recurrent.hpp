// Normalized recurrent networks over sequences: what a kernel is given, and the kernels of each
// instruction set. Plain C++20, no framework header.
//
// Shapes: T steps, N rows of the batch, F input features, H hidden, P features of h (the projection
// size, or H), G gates. Every matrix and row is contiguous in its last dimension.
#pragma once

#include <cstddef>
#include <cstdint>

#include "norm/norm.hpp"
#include "team.hpp"

namespace layernorm {

// The words of src/layernorm/variants.py.
enum class CellKind { kLstm, kGru, kRnn };
enum class NormKind { kLayer, kRms, kNone };
enum class Scope { kMatrix, kAll, kGate };
enum class CellNorm { kOutput, kCarried, kNone };

// How a step combines W_ih x (called x below) and W_hh h.
enum class Inputs {
  kSeparate,  // each normalized by itself; two rows reach the gates
  kSummed,    // added to x before the norm; one row reaches the gates
  kLate,      // GRU, summed but not over all gates: the candidate is summed after the reset
};

// What a stream keeps matrices as.
enum class WeightKind { kAsGiven, kBFloat16, kInt8 };

// One layer and direction. Elements are of the kernel's type T unless said otherwise.
struct Recurrent {
  CellKind cell;
  NormKind norm;  // of the gates
  bool centred;   // norms are layer norms, and not RMS norms
  Inputs inputs;
  Scope scope;
  CellNorm cell_norm;
  bool projection_bias;  // the products have biases, inside the norms
  bool relu;             // of an RNN, or of a GRU's candidate
  bool reverse;
  bool wide_vectors;
  bool streamed;           // parameters are prepared once, for any number of calls
  WeightKind weight_kind;  // as given, unless streamed and of float
  double eps, cell_eps;
  double cell_clip;  // the largest magnitude of an LSTM's cell; 0 for any

  int64_t steps, batch, input_size, hidden_size, output_size, gates;  // T, N, F, H, P, G
  bool projected;
  const int64_t* batch_sizes;   // [T], not increasing, or null: N rows at each step
  const int64_t* step_offsets;  // [T], the first row of each step; null where batch_sizes is

  const void* input;  // element (t, n, 0) is t·step_stride + n·row_stride
  int64_t input_step_stride, input_row_stride;
  const void* h0;            // [N, P]
  const void* c0;            // [N, H], LSTM
  const void* hidden_gates;  // [N, G·H], of gates alone: W_hh h, beside W_ih x as the input
  const uint8_t* resets;     // [rows of all steps], or null
  // The state from which a row goes on where it is reset, as h0 and c0; null for zeros.
  const void *reset_h, *reset_c;

  const void* weight_ih;  // [G·H, F]
  const void* weight_hh;  // [G·H, P]
  const void* weight_hr;  // [P, H], where projected
  // [G·H], [G·H], [G·H], [G·H], [G·H], [H], [H], [H]; null where there is none. Of float where
  // wide_vectors says so.
  const void *bias_ih, *bias_hh, *gain_ih, *gain_hh, *bias, *bias_hn, *gain_cell, *bias_cell;

  void* output;  // [rows of all steps, P]
  void* hn;      // [N, P]
  void* cn;      // [N, H], LSTM

  // Kept for backward; null where not wanted. A row of the LSTM's c is what is carried on.
  void* saved_x;      // [rows, G·H]: normalized; where summed, of the sum
  void* saved_h;      // [rows, saved_h_width]
  void* saved_c;      // [rows, H], LSTM
  void* saved_stats;  // [rows, rstd of x's groups and, where inputs are separate, of h's], as
                      // computed
};

// Gradients of one layer and direction; null where not wanted.
struct RecurrentGradients {
  const void* grad_output;  // [rows, P], or null for 0
  const void* grad_hn;      // [N, P], or null for 0
  const void* grad_cn;      // [N, H], or null for 0
  void* grad_input;         // [rows, F]
  void* grad_h0;            // [N, P]
  void* grad_c0;            // [N, H]
  void* grad_hidden_gates;  // [N, G·H], of gates alone
  // [N, P] and [N, H] in the type computed in, zero to begin with.
  void *grad_reset_h, *grad_reset_c;
  // In the type computed in.
  void *weight_ih, *weight_hh, *weight_hr;
  void *bias_ih, *bias_hh, *gain_ih, *gain_hh, *bias, *bias_hn, *gain_cell, *bias_cell;
};

// How many groups of features of a row share statistics.
int64_t statistics_of(const Recurrent& r);
// Features of W_hh h that backward needs beside saved_x.
int64_t saved_h_width(const Recurrent& r);

// Rows of the batch whose gradients of gains and biases are summed together, a number that N alone
// decides; and the kinds of sums over all rows: three matrices, and what goes to the input.
int64_t rows_per_block(int64_t batch);
inline constexpr int kSumKinds = 4;

struct RecurrentKernels {
  // Parameters in the order in which they are read, used for all steps. The parts of prepare() can
  // run in any order and at once.
  size_t (*prepared_bytes)(const Recurrent&, bool backward);
  int64_t (*prepare_parts)(const Recurrent&, bool backward);
  void (*prepare)(const Recurrent&, bool backward, void* prepared, int64_t part_begin,
                  int64_t part_end);

  // The whole sequence for the rows [row_begin, row_end) of the batch, by the members of a team,
  // which share the scratch memory.
  size_t (*forward_bytes)(const Recurrent&, int64_t rows, int team_size);
  void (*forward)(const Recurrent&, const void* prepared, void* scratch, int64_t row_begin,
                  int64_t row_end, Team& team, int rank);

  // Backward goes through the sequence in chunks of so many steps, from its end. For each chunk
  // first the steps, by whole blocks of rows; then the sums over its rows, of kSumKinds kinds and
  // each by parts. All of a phase comes before the next.
  int64_t (*chunk_steps)(const Recurrent&);
  size_t (*shared_bytes)(const Recurrent&, const RecurrentGradients&);
  size_t (*backward_bytes)(const Recurrent&, int64_t rows, int team_size);
  void (*backward_steps)(const Recurrent&, const RecurrentGradients&, const void* prepared,
                         void* shared, void* scratch, int64_t chunk, int64_t row_begin,
                         int64_t row_end, Team& team, int rank);
  int64_t (*sum_parts)(const Recurrent&, const RecurrentGradients&, void* shared, int64_t chunk,
                       int kind);
  size_t (*sum_bytes)(const Recurrent&);
  void (*sum)(const Recurrent&, const RecurrentGradients&, const void* prepared, void* shared,
              void* scratch, int64_t chunk, int kind, int64_t part_begin, int64_t part_end);
  // After the last chunk: gradients of the initial state, and of gains and biases.
  void (*finish)(const Recurrent&, const RecurrentGradients&, void* shared);

  // The part of a step after its products, of an LSTM from c0 or of a GRU from h0: `input` is
  // W_ih x and `hidden_gates` W_hh h, both [N, G·H], and there is no input or output size. Forward
  // goes by rows; backward by blocks of rows_per_block() rows, with sums that are zero to begin
  // with. Where the products are summed, their one gradient is grad_input.
  size_t (*gates_bytes)(const Recurrent&);
  void (*gates)(const Recurrent&, const void* prepared, void* scratch, int64_t row_begin,
                int64_t row_end);
  size_t (*gate_sums_bytes)(const Recurrent&, const RecurrentGradients&);
  void (*gates_backward)(const Recurrent&, const RecurrentGradients&, const void* prepared,
                         void* sums, void* scratch, int64_t block_begin, int64_t block_end);
  void (*finish_gates)(const Recurrent&, const RecurrentGradients&, const void* sums);
};

// By the type of the elements: float, double, bfloat16, float16.
enum ElementType {
  kElementFloat32,
  kElementFloat64,
  kElementBFloat16,
  kElementFloat16,
  kElementTypes
};
using RecurrentTable = RecurrentKernels[kElementTypes];

}  // namespace layernorm
