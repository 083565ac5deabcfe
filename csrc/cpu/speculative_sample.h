// What the binding hands to speculative_sample.
#pragma once

#include "lowbit_linear.h"

namespace bitfuse {

// Probabilities, row (b, i) at data + b * batch_stride + i * stride elements.
struct ProbabilityRows {
  Dtype dtype;
  const void* data;
  int64_t batch_stride, stride;
};

struct SpeculativeCall {
  int64_t batch, drafted, vocabulary;
  ProbabilityRows draft;     // [batch, drafted, vocabulary]
  ProbabilityRows target;    // [batch, drafted + 1, vocabulary]
  const int64_t* draft_ids;  // [batch, drafted]; one outside the vocabulary ends the draft
  const double* uniforms;    // [batch, drafted + 1]
  int64_t* ids;              // [batch, drafted + 1]
  int64_t* accepted;         // [batch]
};

#define BITFUSE_DECLARE_LEVEL(level)                    \
  namespace level {                                     \
  void speculative_sample(const SpeculativeCall& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
