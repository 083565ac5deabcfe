// The entry of sample, one a level.
#pragma once

#include "common/sampling.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

#define BITFUSE_DECLARE_LEVEL(level, ...) \
  namespace level {                       \
  void sample(const SampleArgs& call);    \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
