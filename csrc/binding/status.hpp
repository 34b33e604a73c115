// How the functions of layernorm.h fail: by exceptions inside, by a status and a text outside.
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "layernorm.h"

namespace layernorm {

// Integers as PyTorch prints a shape.
struct Sizes {
  const int64_t* data;
  int64_t count;

  friend bool operator==(const Sizes& a, const Sizes& b) {
    if (a.count != b.count) return false;
    for (int64_t i = 0; i < a.count; ++i)
      if (a.data[i] != b.data[i]) return false;
    return true;
  }
};

inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t i = 0; i < sizes.count; ++i)
    text += (i > 0 ? ", " : "") + std::to_string(sizes.data[i]);
  return text + "]";
}
template <typename Integer>
  requires std::is_integral_v<Integer>
std::string text_of(Integer value) {
  return std::to_string(value);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string("layernorm: ") + ... + text_of(parts)));
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

template <typename Struct>
void check_struct(const Struct* given, const char* name) {
  check(given != nullptr && given->struct_size == sizeof(Struct), name,
        " must be given, with the struct_size of this version of layernorm.h");
}

std::string& last_error();

// Runs the function; turns what it throws into a status.
template <typename Function>
layernorm_status status_of(const Function& function) noexcept {
  try {
    function();
    return LAYERNORM_OK;
  } catch (const std::bad_alloc&) {
    last_error() = "layernorm: out of memory";
    return LAYERNORM_NO_MEMORY;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return LAYERNORM_INVALID;
  }
}

}  // namespace layernorm
