// Optimizers: what the bindings hand to the CPU's kernels.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

constexpr int64_t kMaxOptimizerBlock = 4096;  // numbers that share a scale

// One step of AdamW on `count` numbers, in place:
//   m = beta1 m + rest1 g, v = beta2 v + rest2 g^2,
//   p = decay p - step_size m / (sqrt(v) inverse_correction + eps),
// where a moment is the value of its code times the largest magnitude of its block.
struct AdamW8bitArgs {
  Dtype p_dtype = Dtype::kOther, g_dtype = Dtype::kOther;
  void* p = nullptr;                               // [count]
  const void* g = nullptr;                         // [count]
  uint8_t *m = nullptr, *v = nullptr;              // codes, [count]
  float *m_absmax = nullptr, *v_absmax = nullptr;  // [ceil(count / block)]
  int64_t count = 0;
  int64_t block = 0;  // numbers, a multiple of 64, at most kMaxOptimizerBlock
  float beta1 = 0, beta2 = 0, eps = 0;
  float rest1 = 0, rest2 = 0;    // 1 - beta, subtracted before rounding; rest1 < 0 to maximise
  float decay = 0;               // 1 - lr weight_decay
  float step_size = 0;           // lr / (1 - beta1^step)
  float inverse_correction = 0;  // 1 / sqrt(1 - beta2^step)
};

}  // namespace bitfuse
