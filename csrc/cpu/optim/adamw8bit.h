// What the binding hands to adamw8bit, and the one entry that a level has.
#pragma once

#include <cstdint>

#include "cpu/isa/levels.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

constexpr int64_t kMaxOptimizerBlock = 4096;

// One step of AdamW on `count` numbers, in place:
//   m = beta1 m + rest1 g, v = beta2 v + rest2 g^2,
//   p = decay p - step_size m / (sqrt(v) inverse_correction + eps),
// where a moment is the value of its code times the largest magnitude of its block.
struct AdamW8bitCall {
  Dtype p_dtype, g_dtype;
  void* p;
  const void* g;
  uint8_t *m, *v;              // codes, [count]
  float *m_absmax, *v_absmax;  // [ceil(count / block)]
  int64_t count;
  int64_t block;  // a multiple of 64, at most kMaxOptimizerBlock
  float beta1, beta2, eps;
  float rest1, rest2;        // 1 - beta, subtracted before rounding; rest1 < 0 to maximise
  float decay;               // 1 - lr weight_decay
  float step_size;           // lr / (1 - beta1^step)
  float inverse_correction;  // 1 / sqrt(1 - beta2^step)
};

#define BITFUSE_DECLARE_LEVEL(level, ...)    \
  namespace level {                          \
  void adamw8bit(const AdamW8bitCall& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
