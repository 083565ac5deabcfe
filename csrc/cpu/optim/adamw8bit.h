// The entry of adamw8bit, one a level.
#pragma once

#include "common/optim.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level)         \
  namespace level {                          \
  void adamw8bit(const AdamW8bitArgs& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
