// What the bindings of the CUDA kernels share, and one function an op that adds it to the module.
#pragma once

#include <limits>

#include "bind/tensors.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

inline int size(int64_t value, const char* name, int multiple = 1) {
  require(value > 0 && value <= std::numeric_limits<int>::max(), name, value, "1 to 2**31 - 1");
  require(value % multiple == 0, name, value, "a multiple of " + std::to_string(multiple));
  return static_cast<int>(value);
}

template <typename E>
E choice(int value, int count, const char* name) {
  require(value >= 0 && value < count, name, value, "0 to " + std::to_string(count - 1));
  return static_cast<E>(value);
}

// Of what tensor cores take.
inline Float float_type(const char* name, Dtype dtype) {
  if (dtype != Dtype::kFloat16 && dtype != Dtype::kBfloat16)
    refuse(name, name_of(dtype), "float16 or bfloat16");
  return dtype == Dtype::kFloat16 ? Float::Float16 : Float::BFloat16;
}

void bind_attention(py::module_& module);
void bind_decode_attention(py::module_& module);
void bind_lowbit_linear(py::module_& module);
void bind_multi_lora_linear(py::module_& module);

}  // namespace bitfuse
