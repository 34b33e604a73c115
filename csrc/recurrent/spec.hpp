// The description of a recurrent layer as the operators have it: src/layernorm/spec.py encodes it.
#pragma once

#include <string>

#include "recurrent.hpp"

namespace layernorm {

// Decodes `count` codes and eps into what a layer computes. Returns what is wrong with them, or an
// empty string.
std::string decode_spec(const int64_t* codes, int64_t count, double eps, Recurrent& r);

}  // namespace layernorm
