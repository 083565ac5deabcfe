// What every binding checks: an integer that comes from Python is not trusted to be an address or a size.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace py = pybind11;

namespace bitfuse {

[[noreturn]] inline void refuse(const char* name, const std::string& value, const std::string& expected) {
  throw py::value_error(std::string(name) + " is " + value + ", expected " + expected);
}

inline void require(bool condition, const char* name, int64_t value, const std::string& expected) {
  if (!condition) refuse(name, std::to_string(value), expected);
}
// without making a string of what is expected at every call
inline void require(bool condition, const char* name, int64_t value, const char* expected) {
  if (!condition) refuse(name, std::to_string(value), expected);
}

// The address of an array; one that holds nothing may be null.
template <class T>
T* address(const char* name, uintptr_t value, uintptr_t alignment, bool needed = true) {
  if (needed && !value) refuse(name, "null", "an address");
  if (value % alignment) refuse(name, std::to_string(value), "a multiple of " + std::to_string(alignment));
  return reinterpret_cast<T*>(value);
}

// The bytes of an array must be countable in 63 bits.
inline void check_bytes(const char* name, std::initializer_list<int64_t> factors) {
  int64_t bytes = 1;
  for (int64_t f : factors)
    if (__builtin_mul_overflow(bytes, f, &bytes))
      refuse(name, "larger than memory", "sizes whose product is below 2^63");
}

}  // namespace bitfuse
