// The instruction sets that the kernels were compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "norm/norm.hpp"
#include "recurrent/recurrent.hpp"

namespace layernorm {

struct Capability {
  const char* name;
  bool (*supported)();  // by this machine
  const NormTable* norms;
  const RecurrentTable* recurrences;
};

// Those that this machine can execute, the best one last.
const std::vector<Capability>& capabilities();

// The one in use: the best, or what use_capability() chose.
const Capability& capability();

// False if this machine has no capability of that name.
bool use_capability(const std::string& name);

}  // namespace layernorm
