// What rides along a product with W: a low-rank adapter, and the dropout of its input.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

// Elements of a matrix that are dropped, as python/bitfuse/core/dropout.py says.
struct Dropout {
  double p = 0;  // 0: none
  uint64_t seed = 0;
};

// `rank` more steps of a product's contraction.
//   forward   h = drop(x) A^T, written; the product gains scale * h B^T.
//   gradient  h = scale * y' B, read; the product gains drop'(h A).
struct Adapter {
  int64_t rank = 0;         // 1 to kMaxRank; 0: no adapter
  const void* a = nullptr;  // [rank, k]
  const void* b = nullptr;  // [n, rank]; gradient: not read
  Dtype a_dtype = Dtype::kFloat32, b_dtype = Dtype::kFloat32;
  float scale = 1;
  const float* scale_by =
      nullptr;         // one number on a GPU that scale is times, or null; the CPU's has it in scale
  float* h = nullptr;  // [rows, rank]
  Dropout dropout;
};

}  // namespace bitfuse
