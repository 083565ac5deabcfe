// What the bindings of the CPU kernels share: which level runs, and one function an op that adds it to the
// module.
#pragma once

#include "bind/bind.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_LEVEL_NAME(level, ...) level,
enum class Level { BITFUSE_LEVELS(BITFUSE_LEVEL_NAME) };
#undef BITFUSE_LEVEL_NAME

// The widest level that this machine runs, or the one that BITFUSE_CPU_ISA names.
Level level();

#ifndef BITFUSE_OF_LEVEL  // of a function that every level has, the one that runs
#define BITFUSE_FUNCTION_OF_LEVEL(level, available, function) level::function,
#define BITFUSE_OF_LEVEL(function)                            \
  ([]() {                                                     \
    static constexpr decltype(&portable::function) kAll[] = { \
        BITFUSE_LEVELS(BITFUSE_FUNCTION_OF_LEVEL, function)}; \
    return kAll[static_cast<int>(::bitfuse::level())];        \
  }())
#endif
void bind_lowbit_linear(py::module_& module);
void bind_lora_linear(py::module_& module);
void bind_lowbit_embedding(py::module_& module);
void bind_gated_activation(py::module_& module);
void bind_multi_lora_linear(py::module_& module);
void bind_norm(py::module_& module);
void bind_adamw8bit(py::module_& module);
void bind_attention(py::module_& module);
void bind_decode_attention(py::module_& module);
void bind_speculative_sample(py::module_& module);
void bind_sample(py::module_& module);
void bind_decoder(py::module_& module);

}  // namespace bitfuse
