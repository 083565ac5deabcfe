// The entries of a decoder's step, one a level.
#pragma once

#include <cstddef>

#include "common/decoder.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...)                           \
  namespace level {                                                 \
  void decoder_step(const Decoder& model, const DecoderStep& call); \
  size_t decoder_workspace(const Decoder& model, int64_t rows);     \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
