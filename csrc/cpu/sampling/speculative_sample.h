// What the binding hands to speculative_sample.
#pragma once

#include "cpu/isa/levels.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

// Probabilities, row (b, i) at data + b * batch_stride + i * stride elements.
struct ProbabilityRows {
  Dtype dtype;
  const void* data;
  int64_t batch_stride, stride;
};

// A chain is a tree in which node i is the child of node i - 1.
struct SpeculativeCall {
  int64_t batch, nodes, rows, vocabulary;
  bool replacement;
  ProbabilityRows draft;      // [batch, rows, vocabulary]
  ProbabilityRows target;     // [batch, nodes + 1, vocabulary]
  const int64_t* draft_ids;   // [batch, nodes]; what is outside the vocabulary is no node
  const int64_t* parents;     // [batch, nodes], -1 at the root; null: a chain
  const int64_t* draft_rows;  // [batch, nodes]; null: node i's is row i
  const double* uniforms;     // [batch, nodes + 1]
  int64_t* ids;               // [batch, nodes + 1]
  int64_t* accepted;          // [batch]
  int64_t* path;              // [batch, nodes], or null
};

#define BITFUSE_DECLARE_LEVEL(level, ...)               \
  namespace level {                                     \
  void speculative_sample(const SpeculativeCall& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
