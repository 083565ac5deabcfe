// The products of an adapter that ride along no product with a few-bit W.
#pragma once

#include "common/linear.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)              \
  namespace level {                                    \
  void lora_shrink(const LoraShrinkArgs& call);        \
  void lora_expand(const LoraExpandArgs& call);        \
  void bottleneck_adapter(const BottleneckArgs& call); \
  void lora_times(const LoraTimesArgs& call);          \
  void lora_outer(const LoraOuterArgs& call);          \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
