// Sampling: what the bindings hand to the CPU's kernels.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

constexpr int64_t kMaxVocabulary = int64_t(1) << 20;  // of which 42 bits each sum below 2^62
constexpr int64_t kMaxDrafted = int64_t(1) << 20;     // tokens, or nodes of a tree, of a sequence

// A token a row.
struct SampleArgs {
  int64_t rows = 0, vocabulary = 0;
  Dtype dtype = Dtype::kOther;          // of the logits
  const void* logits = nullptr;         // [rows, vocabulary]
  int64_t stride = 0;                   // elements from row to row of the logits
  const double* uniforms = nullptr;     // [rows], in [0, 1)
  const double* temperature = nullptr;  // [rows]
  const int64_t* top_k = nullptr;       // [rows], tokens; 0: all
  const double* top_p = nullptr;        // [rows]
  const double* min_p = nullptr;        // [rows]
  int64_t* ids = nullptr;               // [rows]
};

// Row (b, i) is at data + b * batch_stride + i * stride elements.
struct ProbabilityRows {
  Dtype dtype = Dtype::kOther;
  const void* data = nullptr;
  int64_t batch_stride = 0, stride = 0;
};

// A chain is a tree in which node i is the child of node i - 1.
struct SpeculativeSampleArgs {
  int64_t batch = 0;  // sequences
  int64_t nodes = 0;  // draft tokens of a sequence
  int64_t rows = 0;   // of draft probabilities, of a sequence
  int64_t vocabulary = 0;
  bool replacement = false;             // siblings were drawn with replacement
  ProbabilityRows draft;                // [batch, rows, vocabulary]
  ProbabilityRows target;               // [batch, nodes + 1, vocabulary]
  const int64_t* draft_ids = nullptr;   // [batch, nodes]; what is outside the vocabulary is no node
  const int64_t* parents = nullptr;     // [batch, nodes], -1 at the root; null: a chain
  const int64_t* draft_rows = nullptr;  // [batch, nodes]; null: node i's is row i
  const double* uniforms = nullptr;     // [batch, nodes + 1]
  int64_t* ids = nullptr;               // [batch, nodes + 1]
  int64_t* accepted = nullptr;          // [batch]
  int64_t* path = nullptr;              // [batch, nodes], or null
};

}  // namespace bitfuse
