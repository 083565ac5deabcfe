// What the binding hands to the products of an adapter that ride along no product with a few-bit W.
#pragma once

#include "cpu/linear/gated_activation.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

// h[rows, rank] = drop(x) A^T.
struct ShrinkCall {
  const void* x;
  Dtype dtype;
  int64_t rows, row_stride, depth;
  Adapter adapter;  // rank, a, h, dropout
};

// out[rows, outs] = (base + scale * drop'(t P)) * out_scale + bias. P is B turned, [outs, rank], or A, [rank,
// outs].
struct ExpandCall {
  void* out;
  const void* base;  // [rows, outs] of out's dtype, also out itself; or null
  int64_t base_stride;
  Dtype dtype;
  int64_t rows, outs, rank;
  const float* t;  // [rows, rank]
  const void* p;
  Dtype p_dtype;
  bool turned;
  float scale;
  Dropout dropout;         // where P is A
  const float* out_scale;  // or null
  const void* bias;        // or null
  Dtype bias_dtype;
};

// down: h = x D^T, to which `bias` is added; t = act(h), which `up` reads.
struct BottleneckCall {
  ShrinkCall down;
  const void* bias;  // [rank], or null
  Dtype bias_dtype;
  Activation activation;
  float* t;
  ExpandCall up;
};

// out[rows, rank] = scale * y B, for y [rows, depth] and B [depth, rank].
struct TimesCall {
  const void* y;
  Dtype dtype;
  int64_t rows, row_stride, depth, rank;
  const void* b;
  Dtype b_dtype;
  float scale;
  float* out;
};

// out[rank, columns] = scale * t^T drop(x), or its transpose, for t [rows, rank] and x [rows, columns].
struct OuterCall {
  const float* t;
  const void* x;
  Dtype dtype;
  int64_t rows, row_stride, columns, rank;
  Dropout dropout;
  float scale;
  void* out;
  Dtype out_dtype;
  bool turned;
};

#define BITFUSE_DECLARE_LEVEL(level)                   \
  namespace level {                                    \
  void lora_shrink(const ShrinkCall& call);            \
  void lora_expand(const ExpandCall& call);            \
  void bottleneck_adapter(const BottleneckCall& call); \
  void lora_times(const TimesCall& call);              \
  void lora_outer(const OuterCall& call);              \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
