#include "spec.hpp"

#include <iterator>

namespace layernorm {
namespace {

// The codes in their order, and how many values each has.
enum Code { kCell, kKind, kInputs, kScope, kCellNorm, kProjectionBias, kCodes };
struct Field {
  const char* name;
  int64_t values;
};
constexpr Field kFields[] = {{"cell", 4},  {"kind", 3},      {"inputs", 2},
                             {"scope", 3}, {"cell_norm", 3}, {"projection_bias", 2}};
static_assert(std::size(kFields) == kCodes);

}  // namespace

std::string decode_spec(const int64_t* codes, int64_t count, double eps, Recurrent& r) {
  if (count != kCodes)
    return "spec must have " + std::to_string(static_cast<int>(kCodes)) + " codes, got " +
           std::to_string(count);
  for (int i = 0; i < kCodes; ++i)
    if (codes[i] < 0 || codes[i] >= kFields[i].values)
      return std::string("the code of ") + kFields[i].name + " in spec must be in [0, " +
             std::to_string(kFields[i].values) + "), got " + std::to_string(codes[i]);
  constexpr CellKind kCells[] = {CellKind::kLstm, CellKind::kGru, CellKind::kRnn, CellKind::kRnn};
  constexpr int64_t kGates[] = {4, 3, 1, 1};
  constexpr int64_t kRelu = 3;
  r.cell = kCells[codes[kCell]];
  r.gates = kGates[codes[kCell]];
  r.relu = codes[kCell] == kRelu;
  r.norm = static_cast<NormKind>(codes[kKind]);
  r.inputs = static_cast<Inputs>(codes[kInputs]);
  r.scope = static_cast<Scope>(codes[kScope]);
  r.cell_norm = static_cast<CellNorm>(codes[kCellNorm]);
  r.projection_bias = codes[kProjectionBias] != 0;
  const bool gru = r.cell == CellKind::kGru;
  if (r.norm == NormKind::kNone) {
    // Nothing tells the products apart but a GRU's candidate.
    r.inputs = gru ? Inputs::kSeparate : Inputs::kSummed;
    r.cell_norm = CellNorm::kNone;
  } else if (gru && r.inputs == Inputs::kSummed && r.scope != Scope::kAll) {
    r.inputs = Inputs::kLate;
  }
  r.eps = eps;
  return {};
}

}  // namespace layernorm
