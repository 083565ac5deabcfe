// decode_attention on CUDA: what the binding and the kernels agree on. No CUDA header is needed to read this.
#pragma once

#include "cuda/attention/kv_cache.h"

namespace bitfuse {

// DecodeArgs of csrc/common/kv_cache.h, and what a launch has beside them.
struct DecodeParams {
  DeviceCache cache;
  const int* seqlens;  // [batch], before the new tokens, which the cache has
  int new_tokens, queries, heads;
  HeadRows q;
  DeviceRotary rotary;
  float scale, softcap;
  int left, right;            // negative: no bound
  const unsigned char* tree;  // [batch or 1][queries][queries], or null
  int64_t tree_batch;         // 0: one for all
  const float* alibi;         // [heads], or [batch][heads]; or null
  int alibi_batch;            // 0: the same for all
  const float* sinks;         // [heads], or null
  void* out;                  // dense [batch][queries][heads][dim_v]
  float* lse;                 // [batch][heads][queries]
  float* partial;             // of a plan's partial_floats
  unsigned* counters;         // of a plan's counters, zero before and after
};

// The sizes that a plan is made for.
struct DecodeShape {
  CacheFormat format;
  Float type;
  int batch, kv_heads, dim, dim_v, capacity, queries, heads;
  bool operator==(const DecodeShape&) const = default;
};

// How the work is cut: by shapes alone, the rest is found on the device.
struct DecodePlan {
  DecodeShape shape;
  int dim;          // of the kernel: 64, 128 or 256; 0 where none has shared memory enough
  int blocks;       // of the grid
  int stages;       // of a warp's ring
  int sum_bytes;    // that a warp leaves at its end
  int row_tiles;    // of 16 rows, a row being a query of a head
  int least_units;  // of work that a block is started for
  int shared_bytes;
  int64_t partial_floats;
  int counters;
};

DecodePlan plan_decode_attention(const DecodeShape& shape, const DeviceInfo& device);
// Queues the kernel. Throws std::runtime_error with the launch's shape when CUDA refuses it.
void decode_attention(const DecodeParams& params, const DecodePlan& plan, int device, std::uintptr_t stream);

}  // namespace bitfuse
