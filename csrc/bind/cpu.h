// What the bindings of the CPU kernels share: which level runs, and one function an op that adds it to the
// module.
#pragma once

#include "bind/bind.h"

namespace bitfuse {

enum class Level { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The widest level that this machine runs, or the one that BITFUSE_CPU_ISA names.
Level level();

// Of a function that every level has, the one of the level that runs.
#if defined(__x86_64__)
#define BITFUSE_OF_LEVEL(function)                                            \
  (::bitfuse::level() == ::bitfuse::Level::kAvx512Bf16 ? avx512bf16::function \
   : ::bitfuse::level() == ::bitfuse::Level::kAvx512   ? avx512::function     \
   : ::bitfuse::level() == ::bitfuse::Level::kAvx2     ? avx2::function       \
                                                       : portable::function)
#else
#define BITFUSE_OF_LEVEL(function) (portable::function)
#endif

void bind_lowbit_linear(py::module_& module);
void bind_lora_linear(py::module_& module);
void bind_gated_activation(py::module_& module);
void bind_multi_lora_linear(py::module_& module);
void bind_adamw8bit(py::module_& module);
void bind_attention(py::module_& module);
void bind_decode_attention(py::module_& module);
void bind_speculative_sample(py::module_& module);
void bind_sample(py::module_& module);

}  // namespace bitfuse
