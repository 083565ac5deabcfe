// A cache of keys and values, and the problems that are made of one: what the bindings hand to the CPU's
// kernels and to CUDA's. python/bitfuse/ops/attention/kv_cache.py says what lies where and what codes mean.
#pragma once

#include <cstdint>

#include "common/head_rows.h"
#include "common/rotary.h"

namespace bitfuse {

enum class CacheFormat : int { kNone, kFp8, kInt8, kInt4 };
// Python's names of them, in the same order.
constexpr const char* kCacheFormats[] = {"none", "fp8", "int8", "int4"};

constexpr bool has_codes(CacheFormat format) { return format >= CacheFormat::kInt8; }
constexpr int bits_of(CacheFormat format) { return format == CacheFormat::kInt4 ? 4 : 8; }

// K or V: [page][slot][head], each row dense; strides count bytes.
struct CacheRows {
  char* data = nullptr;
  int64_t page = 0, slot = 0, head = 0;
};

struct KvCache {
  CacheFormat format = CacheFormat::kNone;
  Dtype dtype = Dtype::kOther;  // of queries, new keys and tails, and of the cache in kNone
  int64_t batch = 0;            // sequences
  int64_t pages = 0;            // of all sequences; without a table one a sequence
  int64_t page_size = 0;        // tokens
  int64_t kv_heads = 0, dim = 0, dim_v = 0;
  int64_t group_size = 1;     // kInt8, kInt4: tokens that share K's scales
  int64_t channel_group = 1;  // kInt8, kInt4: channels that share V's scales
  CacheRows k, v;
  uint16_t *k_scales = nullptr,
           *k_offsets = nullptr;  // kInt8, kInt4: float16 [pages][page_size / group_size]
                                  // [kv_heads][dim]
  uint16_t *v_scales = nullptr, *v_offsets = nullptr;  // float16 [pages][page_size][kv_heads][value_groups()]
  const float *k_head_scales = nullptr, *v_head_scales = nullptr;  // kFp8: [kv_heads], or null
  void *k_tail = nullptr, *v_tail = nullptr;  // kInt8, kInt4: [batch][2 group_size][kv_heads][dim or dim_v]
  const int32_t* table = nullptr;             // [batch][max_pages]; null: sequence b is page b
  int64_t max_pages = 1;                      // of a sequence

  int64_t value_groups() const { return (dim_v + channel_group - 1) / channel_group; }
  int64_t capacity() const { return max_pages * page_size; }  // tokens of a sequence
  int64_t page_of(int64_t sequence, int64_t position) const {
    return table ? table[sequence * max_pages + position / page_size] : sequence;
  }
};

// Token i of sequence b goes to position seqlens[b] + i.
struct AppendArgs {
  KvCache cache;
  const int32_t* seqlens = nullptr;  // [batch]: tokens of each sequence before
  int64_t tokens = 0;                // new ones of each sequence
  HeadRows k, v;                     // [batch, tokens, kv_heads, dim or dim_v]
  Rotary rotary;                     // of k

  int64_t length(int64_t sequence) const { return seqlens[sequence] + tokens; }  // with the new tokens
};

// The new tokens are appended, if there are any, and seen. As DecodeArgs of
// python/bitfuse/ops/attention/kv_cache.py says.
struct DecodeArgs : AppendArgs {
  int64_t queries = 0, heads = 0;
  HeadRows q;  // [batch, queries, heads, dim], turned as k is
  float scale = 0;
  float softcap = 0;              // 0: none
  int64_t left = 0, right = 0;    // of the window; negative: no bound
  const uint8_t* tree = nullptr;  // [batch or 1][queries][queries], 0 for a key that is not seen; or null
  int64_t tree_batch = 0;         // from one sequence's to the next; 0: one for all
  const float* alibi = nullptr;   // [heads], or [batch][heads]; or null
  int64_t alibi_batch = 0;        // from one sequence's to the next; 0: the same for all
  const float* sinks = nullptr;   // [heads], or null
  void* out = nullptr;            // dense [batch][queries][heads][dim_v]
  float* lse = nullptr;           // [batch][heads][queries]
};

// As a cache of one page a sequence holds them; kFp8 with the scales of the heads.
struct QuantizeKvArgs {
  KvCache cache;
  HeadRows k, v;  // [batch, page_size, kv_heads, dim or dim_v]
};

// All dense: outputs [batch][queries][heads][dim], lse [batch][heads][queries].
struct MergeArgs {
  Dtype dtype = Dtype::kOther;
  int64_t batch = 0, queries = 0, heads = 0, dim = 0;
  const void *o1 = nullptr, *o2 = nullptr;
  const float *lse1 = nullptr, *lse2 = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
};

}  // namespace bitfuse
