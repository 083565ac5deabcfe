// What the binding hands to multi_lora_linear: rows of x put in segments of one adapter each.
#pragma once

#include "common/types.h"
#include "cpu/isa/levels.h"

namespace bitfuse {

// One adapter, and the rows that ask for it: those that `MultiLoraSegments::order` has at [begin, end).
struct LoraSegment {
  const void *a, *b;  // [rank, k] and [n, rank], dense
  int64_t rank, begin, end;
  float scale;
};

// y[m] += scale (x[m] a^T) b^T for the rows of each segment.
struct MultiLoraSegments {
  const LoraSegment* segments;
  int64_t segment_count, most_rank;
  const int64_t* order;           // rows by segment; each at most once
  int64_t n, k, row_stride;       // row_stride counts elements of x; y is dense
  Dtype dtype, a_dtype, b_dtype;  // dtype: of x and y
  const void* x;
  void* y;
};

#define BITFUSE_DECLARE_LEVEL(level, ...)             \
  namespace level {                                   \
  void multi_lora_add(const MultiLoraSegments& call); \
  }
BITFUSE_LEVELS(BITFUSE_DECLARE_LEVEL)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
