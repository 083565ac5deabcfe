// The entries of the ops of a KV cache, one a level.
#pragma once

#include "common/kv_cache.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)        \
  namespace level {                              \
  void append_kv(const AppendArgs& call);        \
  void quantize_kv(const QuantizeKvArgs& call);  \
  void rope(const RopeArgs& call);               \
  void decode_attention(const DecodeArgs& call); \
  void merge_attention(const MergeArgs& call);   \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
