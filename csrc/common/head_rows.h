// Queries, keys or values: tensors of heads.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

constexpr int64_t kMaxHeadDim = 512;

// [batch, rows, heads, dim], a row being a token, each head's part of it dense; strides in elements. Packed
// sequences, [rows, heads, dim], are one batch.
struct HeadRows {
  const void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
};

}  // namespace bitfuse
