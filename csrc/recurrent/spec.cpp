#include "spec.hpp"

#include <bit>
#include <iterator>

namespace layernorm {
namespace {

// The codes in their order, and how many values each has.
enum Code { kCell, kKind, kInputs, kScope, kCellNorm, kProjectionBias, kFields };
enum Number { kCellEps = kFields, kCellClip, kCodes };  // the bits of a double; 0 for none
struct Field {
  const char* name;
  int64_t values;
};
constexpr Field kFieldList[] = {{"cell", 6},  {"kind", 3},      {"inputs", 3},
                                {"scope", 3}, {"cell_norm", 3}, {"projection_bias", 2}};
static_assert(std::size(kFieldList) == kFields);

constexpr CellKind kCells[] = {CellKind::kLstm, CellKind::kGru, CellKind::kRnn,
                               CellKind::kRnn,  CellKind::kGru, CellKind::kLstm};
static_assert(std::size(kCells) == kFieldList[kCell].values);

}  // namespace

int64_t gates_of_codes(const int64_t* codes, int64_t count) {
  if (count < 1 || codes[kCell] < 0 || codes[kCell] >= kFieldList[kCell].values) return 1;
  constexpr int64_t kGates[] = {4, 3, 1};  // of each kind
  return kGates[static_cast<int>(kCells[codes[kCell]])];
}

std::string decode_spec(const int64_t* codes, int64_t count, double eps, Recurrent& r) {
  if (count != kCodes)
    return "spec must have " + std::to_string(static_cast<int>(kCodes)) + " codes, got " +
           std::to_string(count);
  for (int i = 0; i < kFields; ++i)
    if (codes[i] < 0 || codes[i] >= kFieldList[i].values)
      return std::string("the code of ") + kFieldList[i].name + " in spec must be in [0, " +
             std::to_string(kFieldList[i].values) + "), got " + std::to_string(codes[i]);
  constexpr int64_t kRelu = 3;  // of an RNN, and then of the others
  r.cell = kCells[codes[kCell]];
  r.gates = gates_of_codes(codes, count);
  r.relu = codes[kCell] >= kRelu;
  r.norm = static_cast<NormKind>(codes[kKind]);
  r.inputs = static_cast<Inputs>(codes[kInputs]);
  r.scope = static_cast<Scope>(codes[kScope]);
  r.cell_norm = static_cast<CellNorm>(codes[kCellNorm]);
  r.projection_bias = codes[kProjectionBias] != 0;
  r.centred = r.norm == NormKind::kLayer;
  r.eps = eps;
  r.cell_eps = codes[kCellEps] != 0 ? std::bit_cast<double>(codes[kCellEps]) : eps;
  r.cell_clip = std::bit_cast<double>(codes[kCellClip]);
  if (!(r.cell_eps >= 0 && r.cell_clip >= 0)) return "cell_eps and cell_clip must not be negative";
  const bool gru = r.cell == CellKind::kGru;
  constexpr int64_t kPlain = 2;
  if (r.norm == NormKind::kNone) r.cell_norm = CellNorm::kNone;
  if (codes[kInputs] == kPlain) r.norm = NormKind::kNone;
  if (r.norm == NormKind::kNone) {
    // Nothing tells the products apart but a GRU's candidate.
    r.inputs = gru ? Inputs::kSeparate : Inputs::kSummed;
  } else if (gru && r.inputs == Inputs::kSummed && r.scope != Scope::kAll) {
    r.inputs = Inputs::kLate;
  }
  return {};
}

}  // namespace layernorm
