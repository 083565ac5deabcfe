// What the binding hands to attention and to its backward.
#pragma once

#include "cpu/isa/levels.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

constexpr int64_t kMaxHeadDim = 512;

// [batch, row, head, dim] with a dense last dimension; strides count elements.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
};

// Queries [q_begin, + q_length) meet keys [k_begin, + k_length). Sequences that are not packed begin at 0, in
// a batch of their own.
struct AttentionSequence {
  int64_t q_begin, q_length, k_begin, k_length;
};

// [batch, heads, seqlen_q, seqlen_k], strides in elements, 0 for what is broadcast. `mask`: bytes, 0 for a
// key that is not seen; else added.
struct AttentionBias {
  const void* data = nullptr;
  bool mask = false;
  Dtype dtype = Dtype::kFloat32;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// As python/bitfuse/ops/attention/attention_args.py says.
struct AttentionCall {
  Dtype dtype;
  int64_t batch, heads, kv_heads, dim, dim_v, prefix;
  // of the tensors, all sequences together where they are packed; lse is [batch, heads, rows], or [heads,
  // rows]
  int64_t rows, keys;
  bool packed;
  const AttentionSequence* sequences;  // [batch]
  HeadsView q, k, v, prefix_k, prefix_v;
  float scale, softcap;
  int64_t left, right;  // negative: no bound
  bool top_left;
  Dropout dropout;
  AttentionBias bias;
  const float* alibi;  // [heads], or [batch, heads]; or null
  int64_t alibi_batch;
  const float* sinks;  // [heads], or null
  void* out;           // dense
  float* lse;
};

// Gradients are dense; null for one that is not wanted.
struct AttentionBackwardCall : AttentionCall {
  HeadsView grad, output;
  const float* grad_lse;  // or null
  void *grad_q, *grad_k, *grad_v, *grad_prefix_k, *grad_prefix_v;
  void* grad_bias;
  int64_t bias_sizes[4];
  float* grad_sinks;
};

#define BITFUSE_DECLARE_LEVEL(level, ...)                     \
  namespace level {                                           \
  void attention(const AttentionCall& call);                  \
  void attention_backward(const AttentionBackwardCall& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
