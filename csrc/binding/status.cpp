#include "status.hpp"

std::string& layernorm::last_error() {
  thread_local std::string text;
  return text;
}

int32_t layernorm_version(void) { return LAYERNORM_VERSION; }

const char* layernorm_last_error(void) { return layernorm::last_error().c_str(); }
