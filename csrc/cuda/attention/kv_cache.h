// What the kernels of a KV cache have as parameters: the descriptors of csrc/common/kv_cache.h in 32 bits where
// they fit, and what a kernel would else work out each time. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

#include "common/kv_cache.h"
#include "common/limits.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

// K or V: [page][slot][head], each row dense; strides count bytes, multiples of 16.
struct DeviceRows {
  unsigned char* data;
  int64_t page, slot, head;
};

struct DeviceCache {
  CacheFormat format;
  Float type;  // of queries, new keys and tails, and of the cache in kNone
  int batch, pages, page_size, kv_heads, dim, dim_v, group_size, channel_group, value_groups;
  DeviceRows k, v;
  unsigned short *k_scales, *k_offsets, *v_scales, *v_offsets;  // kInt8, kInt4: float16
  const float *k_head_scales, *v_head_scales;                   // kFp8, or null
  void *k_tail, *v_tail;
  const int* table;  // [batch][max_pages]; null: sequence b is page b
  int max_pages;     // 1 without a table
  // Position p is slot p & slot_mask of the sequence's page p >> log_page_size, which is 0 where there is but
  // one.
  int log_page_size, slot_mask;
  int capacity;  // tokens that a sequence has room for
};

struct DeviceRotary {
  const void *cos, *sin;  // [rows][half]; null: no rotation
  Dtype type;
  int half, rows;
  const int* positions;     // [batch or 1][tokens], or null: places in the sequence
  int64_t positions_batch;  // 0: one row for all
  bool interleaved;
};

// Token i of sequence b goes to position begins[b] + i. Tokens that have no place are left out.
struct AppendParams {
  DeviceCache cache;
  const int* begins;
  int tokens;
  HeadRows k, v;
  DeviceRotary rotary;
};

// Queues the kernel. Throws std::runtime_error with the launch's shape when CUDA refuses it.
void append_kv(const AppendParams& params, int device, std::uintptr_t stream);

}  // namespace bitfuse
