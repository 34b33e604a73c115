#include "layer.hpp"

#include "parallel.hpp"
#include "recurrent/spec.hpp"

namespace layernorm {

Layer::Layer(const layernorm_layer* given, Kind kind) {
  check_struct(given, "layer");
  check(given->dtype >= LAYERNORM_FLOAT32 && given->dtype <= LAYERNORM_FLOAT16,
        "dtype is no layernorm_dtype");
  const std::string problem = decode_spec(given->spec, given->spec_count, given->eps, r);
  check(problem.empty(), problem);
  check(kind != kGates || r.cell != CellKind::kRnn, "spec must be of an LSTM or a GRU");
  kernels = &(*capability().recurrences)[given->dtype];
  const bool half = given->dtype >= LAYERNORM_BFLOAT16;
  check(given->parameter_dtype == given->dtype ||
            (half && given->parameter_dtype == LAYERNORM_FLOAT32),
        "parameter_dtype must be the layer's dtype, or float32 with half precision");
  r.wide_vectors = given->parameter_dtype != given->dtype;
  r.reverse = given->reverse != 0;
  check(given->weight_kind >= LAYERNORM_AS_GIVEN && given->weight_kind <= LAYERNORM_AS_INT8 &&
            (given->weight_kind == LAYERNORM_AS_GIVEN ||
             (kind == kStreamed && given->dtype == LAYERNORM_FLOAT32)),
        "weight_kind must be LAYERNORM_AS_GIVEN, or another of a float32 stream");
  r.weight_kind = static_cast<WeightKind>(given->weight_kind);
  r.streamed = kind == kStreamed;
  check_sizes(*given, kind);
  r.steps = kind == kSequence ? given->steps : 1;
  r.batch = given->batch;
  r.input_size = kind == kGates ? 0 : given->input_size;
  r.hidden_size = given->hidden_size;
  r.output_size = kind == kGates ? 0 : given->output_size;
  r.input = given->input;
  r.input_step_stride = given->input_step_stride;
  r.input_row_stride = given->input_row_stride;
  r.h0 = given->h0;
  r.c0 = given->c0;
  if (kind == kSequence) {
    r.resets = given->resets;
    r.reset_h = given->reset_h;
    r.reset_c = given->reset_c;
    check(r.cell != CellKind::kLstm || (r.reset_h == nullptr) == (r.reset_c == nullptr),
          "reset_h and reset_c must be given together");
  }
  rows = r.steps * r.batch;
  if (kind == kSequence && given->batch_sizes != nullptr) read_steps(*given);
  read_weights(*given, kind);
  check(r.cell != CellKind::kLstm || r.batch == 0 || r.c0 != nullptr,
        "an LSTM's state has a cell, c");
}

void Layer::check_sizes(const layernorm_layer& given, Kind kind) {
  check(given.hidden_size > 0 && given.batch >= 0 && given.input_size >= 0,
        "hidden_size must be positive, and no size negative");
  if (kind == kGates) return;
  check(kind == kStreamed || given.steps > 0,
        "Expected sequence length to be larger than 0 in RNN");
  r.projected = given.weights[LAYERNORM_WEIGHT_HR] != nullptr;
  check_output_size(r.cell == CellKind::kLstm, r.projected, given.hidden_size, given.output_size);
}

void check_output_size(bool is_lstm, bool projected, int64_t hidden_size, int64_t output_size) {
  check(projected ? is_lstm && output_size > 0 && output_size <= hidden_size
                  : output_size == hidden_size,
        "weight_hh must have hidden_size=", hidden_size,
        " columns, or those of weight_hr's rows; got ", output_size);
}

void check_batch_sizes(const Sizes& sizes, int64_t batch) {
  int64_t before = batch;
  for (int64_t t = 0; t < sizes.count; ++t) {
    const int64_t size = sizes.data[t];
    check(size > 0 && size <= before && (t > 0 || size == before),
          "batch_sizes must be positive and not increasing, got ", sizes);
    before = size;
  }
}

void Layer::read_steps(const layernorm_layer& given) {
  check_batch_sizes({given.batch_sizes, given.steps}, given.batch);
  rows = 0;
  step_offsets_.reserve(static_cast<size_t>(given.steps));
  for (int64_t t = 0; t < given.steps; ++t) {
    step_offsets_.push_back(rows);
    rows += given.batch_sizes[t];
  }
  r.batch_sizes = given.batch_sizes;
  r.step_offsets = step_offsets_.data();
}

void Layer::read_weights(const layernorm_layer& given, Kind kind) {
  const auto* const w = given.weights;
  if (kind != kGates) {
    check(w[LAYERNORM_WEIGHT_HH] != nullptr &&
              (w[LAYERNORM_WEIGHT_IH] != nullptr || r.input_size == 0),
          "weight_ih and weight_hh must be given");
    r.weight_ih = w[LAYERNORM_WEIGHT_IH];
    r.weight_hh = w[LAYERNORM_WEIGHT_HH];
    r.weight_hr = w[LAYERNORM_WEIGHT_HR];
  }
  r.bias_ih = w[LAYERNORM_BIAS_IH];
  r.bias_hh = w[LAYERNORM_BIAS_HH];
  r.gain_ih = w[LAYERNORM_GAIN_IH];
  r.gain_hh = w[LAYERNORM_GAIN_HH];
  r.bias = w[LAYERNORM_BIAS];
  r.bias_hn = w[LAYERNORM_BIAS_HN];
  r.gain_cell = w[LAYERNORM_GAIN_CELL];
  r.bias_cell = w[LAYERNORM_BIAS_CELL];
  // A gradient is summed where the parameter is used, and nowhere else.
  const bool normed = r.norm != NormKind::kNone;
  const bool two = r.inputs == Inputs::kSeparate && normed;
  const bool cell_normed = r.cell == CellKind::kLstm && r.cell_norm != CellNorm::kNone;
  check((r.projection_bias || (!r.bias_ih && !r.bias_hh)) && (normed || (!r.gain_ih && !r.bias)) &&
            (two || !r.gain_hh) && ((two && r.cell == CellKind::kGru) || !r.bias_hn) &&
            (cell_normed || (!r.gain_cell && !r.bias_cell)),
        kind == kGates ? "there is a gain or bias that this variant does not have"
                       : "weights has a gain or bias that this variant does not have");
}

void Layer::keep(const layernorm_saved& saved) {
  r.saved_x = saved.x;
  r.saved_h = saved.h;
  r.saved_c = saved.c;
  r.saved_stats = saved.stats;
}

Scratch prepare(const Layer& layer, bool backward) {
  const auto& r = layer.r;
  const auto& kernels = *layer.kernels;
  Scratch prepared(kernels.prepared_bytes(r, backward));
  const int64_t parts = kernels.prepare_parts(r, backward);
  in_parallel(parts, r.gates * r.hidden_size * (r.input_size + r.output_size) / parts,
              [&](int64_t begin, int64_t end) {
                kernels.prepare(r, backward, prepared.data(), begin, end);
              });
  return prepared;
}

}  // namespace layernorm
