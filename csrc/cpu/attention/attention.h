// The entries of attention and of its backward, one a level.
#pragma once

#include "common/attention.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)                     \
  namespace level {                                           \
  void attention(const AttentionArgs& call);                  \
  void attention_backward(const AttentionBackwardArgs& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
