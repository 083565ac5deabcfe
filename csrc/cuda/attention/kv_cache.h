// What the bindings hand to the kernels of a KV cache. python/bitfuse/ops/attention/kv_cache.py says what
// lies where and what codes mean. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

enum class CacheFormat : int { None, Fp8, Int8, Int4 };
enum class RotaryType : int { Float32, Float16, BFloat16 };

constexpr int MostHeadDim = 256;

inline bool has_codes(CacheFormat format) { return format >= CacheFormat::Int8; }

// K or V: [page][slot][head], each row dense; strides count bytes.
struct CacheRows {
  unsigned char* data;
  int64_t page, slot, head;
};

struct KvCache {
  CacheFormat format;
  Float type;  // of queries, new keys and tails, and of the cache in None
  int batch, pages, page_size, kv_heads, dim, dim_v, group_size, channel_group, value_groups;
  CacheRows k, v;
  unsigned short *k_scales, *k_offsets, *v_scales, *v_offsets;  // Int8, Int4: float16
  const float *k_head_scales, *v_head_scales;                   // Fp8, or null
  void *k_tail, *v_tail;
  const int* table;  // [batch][max_pages]; null: sequence b is page b
  int max_pages;     // 1 without a table
  // Position p is slot p & slot_mask of the sequence's page p >> log_page_size, which is 0 where there is but
  // one.
  int log_page_size, slot_mask;
  int capacity;  // tokens that a sequence has room for
};

// [batch][token][head], strides in elements; each row dense.
struct TokenRows {
  const void* data;
  int64_t batch, token, head;
};

struct Rotary {
  const void *cos, *sin;  // [rows][half]; null: no rotation
  RotaryType type;
  int half, rows;
  const int* positions;     // [batch or 1][tokens], or null: places in the sequence
  int64_t positions_batch;  // 0: one row for all
  bool interleaved;
};

// Token i of sequence b goes to position begins[b] + i. Tokens that have no place are left out.
struct AppendArgs {
  KvCache cache;
  const int* begins;
  int tokens;
  TokenRows k, v;
  Rotary rotary;
};

// Queues the kernel. Throws std::runtime_error with the launch's shape when CUDA refuses it.
void append_kv(const AppendArgs& args, int device, std::uintptr_t stream);

}  // namespace bitfuse
