// The entry of adamw8bit, one a level.
#pragma once

#include "common/optim.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)    \
  namespace level {                          \
  void adamw8bit(const AdamW8bitArgs& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
