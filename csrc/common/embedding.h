// The problem of lowbit_embedding.
#pragma once

#include <cstdint>

#include "common/lowbit_matrix.h"
#include "common/types.h"

namespace bitfuse {

// out[count, k] = rows of W by their numbers.
struct LowbitEmbeddingArgs {
  LowBitMatrix w;
  const void* indices;  // [count], each from 0 to n - 1
  bool wide;            // of 64 bits, else of 32
  int64_t count;
  Dtype dtype;
  void* out;  // dense
};

}  // namespace bitfuse
