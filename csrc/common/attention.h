// attention and its gradient: what the bindings hand to the CPU's kernels and to CUDA's.
#pragma once

#include <cstdint>

#include "common/adapter.h"
#include "common/head_rows.h"

namespace bitfuse {

// Queries [q_begin, + q_length) meet keys [k_begin, + k_length). Sequences that are not packed begin at 0, in
// a batch of their own.
struct AttentionSequence {
  int64_t q_begin, q_length, k_begin, k_length;
};

// [batch, heads, rows, keys], strides in elements, 0 for what is broadcast.
struct AttentionBias {
  const void* data = nullptr;  // null: none
  bool mask = false;           // bytes, 0 for a key that is not seen; else floats that are added
  Dtype dtype = Dtype::kFloat32;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// As AttentionArgs of python/bitfuse/ops/attention/attention_args.py says.
struct AttentionArgs {
  Dtype dtype = Dtype::kOther;  // of q, k, v, prefixes and out
  int64_t batch = 0;            // sequences
  int64_t heads = 0, kv_heads = 0, dim = 0, dim_v = 0;
  int64_t rows = 0, keys = 0;          // queries and keys of a sequence; packed: of all together
  int64_t max_rows = 0, max_keys = 0;  // of the longest sequence, or more
  bool packed = false;
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // [batch + 1]; null: not packed
  const AttentionSequence* sequences =
      nullptr;                  // [batch]: on the CPU, where the binding has read the offsets
  HeadRows q, k, v;             // [batch, rows, heads, dim], [batch, keys, kv_heads, ...]
  int64_t prefix = 0;           // keys that every query sees
  HeadRows prefix_k, prefix_v;  // [batch, prefix, kv_heads, dim or dim_v]
  float scale = 0;
  float softcap = 0;            // 0: none
  int64_t left = 0, right = 0;  // of the window; negative: no bound
  bool top_left = false;        // how two lengths are aligned
  Dropout dropout;
  AttentionBias bias;
  const float* alibi = nullptr;  // [heads], or [batch, heads]; or null
  int64_t alibi_batch = 0;       // from one sequence's to the next; 0: the same for all
  const float* sinks = nullptr;  // [heads], or null
  void* out = nullptr;           // dense [batch, rows, heads, dim_v]
  float* lse = nullptr;          // [batch, heads, rows], or [heads, rows] of packed sequences
};

// `out` is read. Gradients are dense, of the shape of what they are of; null for one that is not wanted.
struct AttentionBackwardArgs : AttentionArgs {
  HeadRows grad, output;            // [batch, rows, heads, dim_v]
  const float* grad_lse = nullptr;  // as lse, or null
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;
  void *grad_prefix_k = nullptr, *grad_prefix_v = nullptr;
  void* grad_bias = nullptr;
  int64_t bias_sizes[4] = {};  // of grad_bias: each as the scores', or 1
  float* grad_sinks = nullptr;
};

}  // namespace bitfuse
