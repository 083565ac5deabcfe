// Rotary position embedding of one row, in float.
#pragma once

#include "kv_cache.h"
#include "matmul.h"

namespace bitfuse::BITFUSE_ISA {

// cos and sin of one token.
struct Turn {
  alignas(64) float cos[kMostHeadDim / 2], sin[kMostHeadDim / 2];
};

// The turn of token `index`, whose place in its sequence is `place`.
inline void turn_of(const Rotary& rotary, int64_t batch, int64_t index, int64_t place, Turn& to) {
  if (!rotary.cos) return;
  const int64_t row = rotary.positions ? rotary.positions[batch * rotary.positions_batch + index] : place;
  to_float(element(rotary.cos, rotary.dtype, row * rotary.half), rotary.dtype, to.cos, rotary.half);
  to_float(element(rotary.sin, rotary.dtype, row * rotary.half), rotary.dtype, to.sin, rotary.half);
  if (rotary.inverse)
    for (int64_t i = 0; i < rotary.half; ++i) to.sin[i] = -to.sin[i];
}

// x in place: each pair (a, b) becomes (a cos - b sin, b cos + a sin).
inline void rotate_row(const Rotary& rotary, const Turn& turn, float* x) {
  if (!rotary.cos) return;
  const int64_t half = rotary.half;
  if (!rotary.interleaved) {
    float* y = x + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a * turn.cos[i] - b * turn.sin[i];
      y[i] = b * turn.cos[i] + a * turn.sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * turn.cos[i] - b * turn.sin[i];
    x[2 * i + 1] = b * turn.cos[i] + a * turn.sin[i];
  }
}

BITFUSE_INLINE const void* row_of(const TokenRows& rows, Dtype dtype, int64_t batch, int64_t token,
                                  int64_t head) {
  return element(rows.data, dtype, batch * rows.batch + token * rows.token + head * rows.head);
}

}  // namespace bitfuse::BITFUSE_ISA
