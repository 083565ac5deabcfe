// What the binding hands to sample.
#pragma once

#include "cpu/isa/levels.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

struct SampleCall {
  int64_t rows, vocabulary;
  Dtype dtype;
  const void* logits;  // [rows, vocabulary]
  int64_t stride;
  const double *uniforms, *temperature;  // [rows]
  const int64_t* top_k;
  const double *top_p, *min_p;
  int64_t* ids;
};

#define BITFUSE_DECLARE_LEVEL(level, ...) \
  namespace level {                       \
  void sample(const SampleCall& call);    \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
