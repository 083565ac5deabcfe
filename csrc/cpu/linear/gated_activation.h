// The one entry a level has for gated_activation and its gradients.
#pragma once

#include "common/linear.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level)                      \
  namespace level {                                       \
  void gated_activation(const GatedActivationArgs& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
