// The entries a level has for rms_norm and layer_norm: forward, and gradients.
#pragma once

#include "common/norm.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)   \
  namespace level {                         \
  void norm(const NormArgs& call);          \
  void norm_backward(const NormArgs& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
