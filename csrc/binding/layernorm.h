/* The compiled kernels on plain pointers: norms, recurrent layers over sequences, and streams.
 *
 * Every function returns LAYERNORM_OK or says what went wrong by its status and, in words, by
 * layernorm_last_error(). Each struct begins with its own size, which the caller sets to
 * sizeof(the struct); all else that is not set must be zero. Pointers that are not marked "or NULL"
 * must be given. Elements are of the struct's dtype unless said otherwise; matrices and rows are
 * contiguous in their last dimension. Functions may be called from any number of threads at once,
 * but for a stream, which takes one step at a time.
 *
 * Shapes: T steps, N rows of the batch, F input features, H hidden, P features of h (the size of
 * the projection, or H), G gates (4 of an LSTM: i, f, g, o; 3 of a GRU: r, z, n; 1 of an RNN).
 */
#ifndef LAYERNORM_H
#define LAYERNORM_H

#include <stddef.h>
#include <stdint.h>

#define LAYERNORM_VERSION 1

#if defined(_WIN32)
#define LAYERNORM_API __declspec(dllexport)
#else
#define LAYERNORM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Integers and no enumerations: any value that a caller sets may be read and refused. */
typedef int32_t layernorm_status;
enum {
  LAYERNORM_OK = 0,
  LAYERNORM_INVALID = 1, /* an argument is wrong */
  LAYERNORM_NO_MEMORY = 2
};

typedef int32_t layernorm_dtype;
enum {
  LAYERNORM_FLOAT32 = 0,
  LAYERNORM_FLOAT64 = 1,
  LAYERNORM_BFLOAT16 = 2,
  LAYERNORM_FLOAT16 = 3
};

/* LAYERNORM_VERSION of the library. */
LAYERNORM_API int32_t layernorm_version(void);

/* What went wrong in the last call of this thread that failed. */
LAYERNORM_API const char* layernorm_last_error(void);

/* ---- norms ---- */

#define LAYERNORM_MAX_DIMS 6

/* Rows in memory: each contiguous, their beginnings indexed over up to LAYERNORM_MAX_DIMS
 * dimensions, strides in elements. */
typedef struct layernorm_rows {
  const void* data; /* or NULL: there are none */
  int32_t dims;
  int64_t sizes[LAYERNORM_MAX_DIMS];
  int64_t strides[LAYERNORM_MAX_DIMS];
} layernorm_rows;

/* y = (a - mean)·rstd·gain + bias over rows a of `width` elements, rstd = 1/√(var + eps); where
 * not centred (RMS norm) without the mean, and with the mean square for the variance. */
typedef struct layernorm_norm {
  size_t struct_size;
  layernorm_dtype dtype;
  layernorm_dtype
      parameter_dtype; /* of gain and bias: dtype, or float32 with rows of half precision */
  int32_t centred;
  int64_t rows;
  int64_t width;
  double eps;
  const void* gain; /* [width], or NULL for 1; given where there is a bias */
  const void* bias; /* [width], or NULL for 0; NULL where not centred */
} layernorm_norm;

/* a = input, or input + residual, which is written to `sum`. Statistics are float32 (float64 of
 * float64). */
typedef struct layernorm_norm_forward_call {
  size_t struct_size;
  layernorm_rows input;
  layernorm_rows residual; /* may have no data */
  void* output;            /* [rows, width] */
  void* sum;               /* [rows, width], or NULL without a residual */
  void* mean;              /* [rows], or NULL */
  void* rstd;              /* [rows], or NULL */
} layernorm_norm_forward_call;

LAYERNORM_API layernorm_status layernorm_norm_forward(const layernorm_norm* norm,
                                                      const layernorm_norm_forward_call* call);

typedef struct layernorm_norm_backward_call {
  size_t struct_size;
  layernorm_rows grad;     /* of the output */
  layernorm_rows grad_sum; /* of the sum; may have no data */
  layernorm_rows input;    /* what was normalized */
  const void* mean;        /* [rows], as forward wrote it; NULL where not centred */
  const void* rstd;        /* [rows] */
  void* grad_input;        /* [rows, width], or NULL where not wanted */
  void* grad_gain;         /* [width] of grad_gain_dtype, or NULL; norm->gain must be given */
  void* grad_bias;         /* [width] of grad_bias_dtype, or NULL; norm->gain must be given */
  layernorm_dtype grad_gain_dtype;
  layernorm_dtype grad_bias_dtype;
} layernorm_norm_backward_call;

LAYERNORM_API layernorm_status layernorm_norm_backward(const layernorm_norm* norm,
                                                       const layernorm_norm_backward_call* call);

/* ---- recurrent layers ---- */

/* A layer's parameters, by their places in every list of them. */
enum {
  LAYERNORM_WEIGHT_IH, /* [G·H, F] */
  LAYERNORM_WEIGHT_HH, /* [G·H, P] */
  LAYERNORM_WEIGHT_HR, /* [P, H], or NULL without a projection */
  LAYERNORM_BIAS_IH,   /* [G·H]; this and all below may be NULL */
  LAYERNORM_BIAS_HH,   /* [G·H] */
  LAYERNORM_GAIN_IH,   /* [G·H]; where inputs are summed, the one gain */
  LAYERNORM_GAIN_HH,   /* [G·H] */
  LAYERNORM_BIAS,      /* [G·H] */
  LAYERNORM_BIAS_HN,   /* [H], of a GRU */
  LAYERNORM_GAIN_CELL, /* [H], of an LSTM */
  LAYERNORM_BIAS_CELL, /* [H], of an LSTM */
  LAYERNORM_WEIGHTS
};

/* What a stream keeps matrices as. */
typedef int32_t layernorm_weight_kind;
enum {
  LAYERNORM_AS_GIVEN,
  LAYERNORM_AS_BFLOAT16, /* of float32 */
  LAYERNORM_AS_INT8      /* of float32; with a scale for each row of the matrix */
};

/* One layer and direction, and what it reads. */
typedef struct layernorm_layer {
  size_t struct_size;
  layernorm_dtype dtype;
  layernorm_dtype parameter_dtype; /* of gains and biases: dtype, or float32 with half precision */
  layernorm_weight_kind weight_kind; /* of a stream's layers; LAYERNORM_AS_GIVEN elsewhere */
  int32_t reverse;                   /* from the last step to the first */
  const int64_t* spec;               /* the codes of layernorm.spec.LayerSpec */
  int64_t spec_count;
  double eps;
  int64_t steps, batch, input_size, hidden_size, output_size; /* T, N, F, H, P */
  const int64_t* batch_sizes; /* [T] rows of each step, not increasing; or NULL: N at each */
  const void* input;          /* element (t, n, 0) is at t·step_stride + n·row_stride */
  int64_t input_step_stride, input_row_stride;
  const void* h0;        /* [N, P] */
  const void* c0;        /* [N, H], of an LSTM */
  const uint8_t* resets; /* [T, N], or [rows of all steps] with batch_sizes; or NULL */
  const void* reset_h;   /* [N, P], from which a row goes on where it is reset; or NULL: zeros */
  const void* reset_c;   /* [N, H], of an LSTM; given where reset_h is */
  const void* weights[LAYERNORM_WEIGHTS];
} layernorm_layer;

/* What forward keeps for backward; each may have no element, by layernorm_saved_shape. */
typedef struct layernorm_saved {
  void* x;
  void* h;
  void* c;
  void* stats; /* float32 (float64 of float64) */
} layernorm_saved;

/* Columns of what is kept for each row of all steps, of x, h, c and stats; with `recompute` only c
 * is kept, and the rest computed again. */
LAYERNORM_API layernorm_status layernorm_saved_widths(const layernorm_layer* layer,
                                                      int32_t recompute, int64_t widths[4]);

typedef struct layernorm_layer_outputs {
  size_t struct_size;
  void* output; /* [T, N, P], or [rows of all steps, P] with batch_sizes */
  void* hn;     /* [N, P] */
  void* cn;     /* [N, H], of an LSTM */
  layernorm_saved saved;
} layernorm_layer_outputs;

LAYERNORM_API layernorm_status layernorm_recurrent_forward(const layernorm_layer* layer,
                                                           const layernorm_layer_outputs* outputs);

/* Gradients; NULL where not wanted, and NULL for a gradient of 0 that comes in. */
typedef struct layernorm_layer_gradients {
  size_t struct_size;
  const void* output; /* as forward wrote it */
  layernorm_saved saved;
  const void* grad_output;
  const void* grad_hn;
  const void* grad_cn;
  void* grad_input; /* [T, N, F], or [rows of all steps, F] */
  void* grad_h0;
  void* grad_c0;
  void* grad_reset_h; /* [N, P], float32 (float64 of float64), zero to begin with */
  void* grad_reset_c; /* [N, H], likewise */
  void* grad_weights[LAYERNORM_WEIGHTS]; /* float32 (float64 of float64) */
} layernorm_layer_gradients;

LAYERNORM_API layernorm_status layernorm_recurrent_backward(
    const layernorm_layer* layer, const layernorm_layer_gradients* gradients);

/* The part of a step after its products, of an LSTM from c0 or of a GRU from h0: the step's input
 * is W_ih x and hidden_gates W_hh h, both [N, G·H]; the matrices, steps, input_size and output_size
 * are not read. c is an LSTM's. Gradients: grad_hn and grad_cn come in; grad_input,
 * grad_hidden_gates, grad_c0 or grad_h0 and those of gains and biases go out. Where the inputs are
 * summed, grad_input is the gradient of both products, and grad_hidden_gates is NULL. */
LAYERNORM_API layernorm_status layernorm_gates_forward(const layernorm_layer* step,
                                                       const void* hidden_gates, void* h, void* c);
LAYERNORM_API layernorm_status layernorm_gates_backward(const layernorm_layer* step,
                                                        const void* hidden_gates,
                                                        const layernorm_layer_gradients* gradients,
                                                        void* grad_hidden_gates);

/* ---- streams: layers one step at a time, their parameters packed once ---- */

typedef struct layernorm_stream layernorm_stream;

/* Layers of one step (steps 1, no input, no resets), each of which reads what the one before
 * writes. The steps write to the memory of h0 and c0, which must outlive the stream; the parameters
 * are not read after this call. */
LAYERNORM_API layernorm_status layernorm_stream_create(const layernorm_layer* layers, int64_t count,
                                                       layernorm_stream** stream);
/* Input (N, F) and output (N, P) by their strides in elements; they may overlap in any way. */
LAYERNORM_API layernorm_status layernorm_stream_step(layernorm_stream* stream, const void* input,
                                                     const int64_t input_strides[2], void* output,
                                                     const int64_t output_strides[2]);
LAYERNORM_API void layernorm_stream_destroy(layernorm_stream* stream);

#ifdef __cplusplus
}
#endif

#endif
