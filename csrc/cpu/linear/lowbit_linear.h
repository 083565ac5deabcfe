// The one entry a level has for each direction of a product with a few-bit W.
#pragma once

#include "common/linear.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)                  \
  namespace level {                                        \
  void lowbit_linear(const LowbitLinearArgs& args);        \
  void lowbit_linear_grad_x(const LowbitLinearArgs& args); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
