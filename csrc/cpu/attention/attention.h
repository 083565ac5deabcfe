// The entries of attention and of its backward, one a level.
#pragma once

#include "common/attention.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level)                          \
  namespace level {                                           \
  void attention(const AttentionArgs& call);                  \
  void attention_backward(const AttentionBackwardArgs& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
