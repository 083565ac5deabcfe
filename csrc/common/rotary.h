// Rotary position embedding.
#pragma once

#include <cstdint>

#include "common/head_rows.h"

namespace bitfuse {

struct Rotary {
  const void *cos = nullptr, *sin = nullptr;  // [rows][half]; null: no rotation
  Dtype dtype = Dtype::kFloat32;              // of both
  int64_t half = 0;                           // pairs of channels that turn, from the first
  int64_t rows = 0;                           // positions that there are
  const int32_t* positions = nullptr;         // [batch or 1][tokens], or null: places in the sequence
  int64_t positions_batch = 0;                // from one sequence's to the next; 0: one for all
  bool interleaved = false;                   // pairs are channels (2 i, 2 i + 1), not (i, i + half)
  bool inverse = false;                       // turns back
};

struct RopeArgs {
  Dtype dtype = Dtype::kOther;
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0;
  HeadRows x;           // [batch, tokens, heads, dim]
  void* out = nullptr;  // dense
  Rotary rotary;
};

}  // namespace bitfuse
