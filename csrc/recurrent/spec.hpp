// The description of a recurrent layer as the operators have it: src/layernorm/spec.py encodes it.
#pragma once

#include <string>

#include "recurrent.hpp"

namespace layernorm {

// Decodes `count` codes and eps into what a layer computes. Returns what is wrong with them, or an
// empty string.
std::string decode_spec(const int64_t* codes, int64_t count, double eps, Recurrent& r);

// The gates of the cell of such codes, which may be none that there are.
int64_t gates_of_codes(const int64_t* codes, int64_t count);

}  // namespace layernorm
