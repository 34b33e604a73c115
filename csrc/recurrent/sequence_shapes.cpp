// What follows from a recurrent layer's shapes alone, whatever the instruction set.
#include "recurrent.hpp"

namespace layernorm {

int64_t statistics_of(const Recurrent& r) {
  if (r.norm == NormKind::kNone) return 0;
  if (r.scope == Scope::kGate) return r.gates;
  return r.scope == Scope::kMatrix && r.cell == CellKind::kGru ? 2 : 1;
}

int64_t saved_h_width(const Recurrent& r) {
  if (r.inputs == Inputs::kSummed) return 0;
  return r.inputs == Inputs::kLate ? r.hidden_size : r.gates * r.hidden_size;
}

int64_t rows_per_block(int64_t batch) {
  constexpr int64_t kLeast = 4;
  constexpr int64_t kBlocks = 16;
  const int64_t even = (batch + kBlocks - 1) / kBlocks;
  return even < kLeast ? kLeast : even;
}

}  // namespace layernorm
