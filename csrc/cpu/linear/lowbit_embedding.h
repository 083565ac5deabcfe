// The entry of lowbit_embedding, one a level.
#pragma once

#include "common/embedding.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)                 \
  namespace level {                                       \
  void lowbit_embedding(const LowbitEmbeddingArgs& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
