// Rotary position embedding of one row, in float.
#pragma once

#include "cpu/attention/kv_cache.h"
#include "cpu/core/elements.h"
#include "cpu/core/threads.h"

namespace bitfuse::BITFUSE_ISA {

// cos and sin of one token.
struct Turn {
  alignas(64) float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
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

// x in place: each pair (a, b) becomes (a cos - b sin, b cos + a sin). Products are rounded before they are
// added, as torch does, so that a cache holds the same bits whoever writes to it.
inline void rotate_row(const Rotary& rotary, const Turn& turn, float* x) {
  if (!rotary.cos) return;
  const int64_t half = rotary.half, step = rotary.interleaved ? 2 : 1;
  float* y = rotary.interleaved ? x + 1 : x + half;
  constexpr int64_t kHalf = kMaxHeadDim / 2;
  alignas(64) float ac[kHalf], as[kHalf], bc[kHalf], bs[kHalf];
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = y[i * step];
    ac[i] = a * turn.cos[i], as[i] = a * turn.sin[i];
    bc[i] = b * turn.cos[i], bs[i] = b * turn.sin[i];
  }
  // the arrays are read again: no product is fused with a sum
  asm volatile("" : : "r"(ac), "r"(as), "r"(bc), "r"(bs) : "memory");
  for (int64_t i = 0; i < half; ++i) {
    x[i * step] = ac[i] - bs[i];
    y[i * step] = bc[i] + as[i];
  }
}

BITFUSE_INLINE const void* row_of(const HeadRows& rows, Dtype dtype, int64_t batch, int64_t token,
                                  int64_t head) {
  return element(rows.data, dtype, batch * rows.batch + token * rows.row + head * rows.head);
}

}  // namespace bitfuse::BITFUSE_ISA
