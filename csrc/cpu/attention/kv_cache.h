// What the bindings hand to the ops of a KV cache. python/bitfuse/ops/attention/kv_cache.py says what lies
// where and what codes mean.
#pragma once

#include "cpu/isa/levels.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

enum class CacheFormat : int { kNone = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int64_t kMostHeadDim = 512;

inline bool has_codes(CacheFormat format) { return format >= CacheFormat::kInt8; }
inline int bits_of(CacheFormat format) { return format == CacheFormat::kInt4 ? 4 : 8; }

// K or V: [page][slot][head], each row dense; strides count bytes.
struct CacheRows {
  char* data = nullptr;
  int64_t page = 0, slot = 0, head = 0;
};

struct KvCache {
  CacheFormat format;
  Dtype dtype;  // of queries, new keys and tails, and of the cache in kNone
  int64_t batch, pages, page_size, kv_heads, dim, dim_v, group_size, channel_group;
  CacheRows k, v;
  uint16_t *k_scales, *k_offsets, *v_scales, *v_offsets;  // kInt8, kInt4: float16
  const float *k_head_scales, *v_head_scales;             // kFp8, or null
  void *k_tail, *v_tail;
  const int32_t* table;  // [batch][max_pages]; null: sequence b is page b
  int64_t max_pages;

  int64_t value_groups() const { return (dim_v + channel_group - 1) / channel_group; }
  int64_t page_of(int64_t sequence, int64_t position) const {
    return table ? table[sequence * max_pages + position / page_size] : sequence;
  }
};

// [batch][token][head], strides in elements; each row dense.
struct TokenRows {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct Rotary {
  const void *cos = nullptr, *sin = nullptr;  // [rows][half]; null: no rotation
  Dtype dtype = Dtype::kFloat32;
  int64_t half = 0;
  const int32_t* positions = nullptr;  // [batch or 1][tokens], or null: places in the sequence
  int64_t positions_batch = 0;
  bool interleaved = false, inverse = false;
};

// Token i of sequence b goes to position begins[b] + i. The binding has checked every place.
struct AppendCall {
  KvCache cache;
  const int32_t* begins;
  int64_t tokens;
  TokenRows k, v;
  Rotary rotary;
};

struct RopeCall {
  Dtype dtype;
  int64_t batch, tokens, heads, dim;
  TokenRows x;
  void* out;  // dense
  Rotary rotary;
};

// As a cache of one page a sequence holds them; fp8 with the scales of the heads.
struct QuantizeCall {
  KvCache cache;
  TokenRows k, v;
};

// As python/bitfuse/ops/attention/kv_cache.py's DecodeArgs says.
struct DecodeCall {
  KvCache cache;
  const int32_t* lengths;  // [batch], with new tokens
  int64_t queries, heads;
  TokenRows q;
  Rotary rotary;
  float scale, softcap;
  int64_t left, right;  // negative: no bound
  const uint8_t* tree;  // [batch or 1][queries][queries], or null
  int64_t tree_batch;
  const float* alibi;  // [heads], or [batch][heads]; or null
  int64_t alibi_batch;
  const float* sinks;  // [heads], or null
  void* out;           // dense [batch][queries][heads][dim_v]
  float* lse;          // [batch][heads][queries]
};

// Dense [batch][queries][heads][dim], and [batch][heads][queries].
struct MergeCall {
  Dtype dtype;
  int64_t batch, queries, heads, dim;
  const void *o1, *o2;
  const float *lse1, *lse2;
  void* out;
  float* lse;
};

#define BITFUSE_DECLARE_LEVEL(level, ...)        \
  namespace level {                              \
  void append_kv(const AppendCall& call);        \
  void quantize_kv(const QuantizeCall& call);    \
  void rope(const RopeCall& call);               \
  void decode_attention(const DecodeCall& call); \
  void merge_attention(const MergeCall& call);   \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
