// attention on Hopper: what the binding and the kernel agree on. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

#include "common/head_rows.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

// What the kernel is launched with: AttentionArgs of csrc/common/attention.h in 32 bits. Packed sequences are one
// batch of total_q or total_k rows; else these are sq and sk.
struct AttentionSm90Params {
  HeadRows q, k, v;         // strides are multiples of 8 above 0
  void* out;                // as q, contiguous
  float* lse;               // [batch, heads, sq], or [heads, total_q]
  const int* cu_seqlens_q;  // [batch + 1]; null: not packed
  const int* cu_seqlens_k;
  const float* sinks;  // [heads]: one more logit a head, without a value; null: none
  unsigned* counters;  // two, zero before and after
  int batch;           // sequences
  int heads, kv_heads, dim;
  int sq, sk;            // rows of the longest
  int total_q, total_k;  // rows of all
  int left, right;       // of the window, 0 to 2**30
  bool top_left;
  float scale;    // above 0
  float softcap;  // 0: none
  int multiprocessors;
};

// Queues the kernel; dim is 64, 128 or 256. Throws std::runtime_error with the launch's shape when CUDA
// refuses it.
void attention_sm90(const AttentionSm90Params& params, Float type, int device, std::uintptr_t stream);

}  // namespace bitfuse
