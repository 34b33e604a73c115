#include "capability.hpp"

#include <atomic>

namespace layernorm {

// LAYERNORM_CAPABILITIES comes from CMakeLists.txt: X(name, condition) for each set of flags that
// norm.cpp and recurrent.cpp were compiled with, from the plainest to the best.
#define X(name, condition)                 \
  namespace name {                         \
  extern const NormTable norms;            \
  extern const RecurrentTable recurrences; \
  }
LAYERNORM_CAPABILITIES
#undef X

namespace {

std::vector<Capability> supported_ones() {
  std::vector<Capability> found;
#define X(name, condition) \
  Capability{#name, [] { return bool(condition); }, &name::norms, &name::recurrences},
  for (const auto& one : {LAYERNORM_CAPABILITIES})
    if (one.supported()) found.push_back(one);
#undef X
  return found;
}

std::atomic<const Capability*> in_use{nullptr};

}  // namespace

const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> found = supported_ones();
  return found;
}

const Capability& capability() {
  const Capability* one = in_use.load(std::memory_order_relaxed);
  return one != nullptr ? *one : capabilities().back();
}

bool use_capability(const std::string& name) {
  for (const auto& one : capabilities())
    if (name == one.name) {
      in_use.store(&one, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace layernorm
