// The one entry a level has for gated_activation and its gradients.
#pragma once

#include "common/linear.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)                 \
  namespace level {                                       \
  void gated_activation(const GatedActivationArgs& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
