// A matrix in few bits, as LowBitWeight of python/bitfuse/weights/weight.py holds one.
#pragma once

#include <cstdint>

#include "common/limits.h"
#include "common/types.h"

namespace bitfuse {

// w[n, k] = (value(code[n, k]) - zero[s, g]) * scale[s, g], or value(code[n, k]) * scale[s, g] - offset[s, g],
// with g = k / group_size and s = n / scale_rows; all arrays row-major.
struct LowBitMatrix {
  int64_t n, k;        // out_features, in_features
  int64_t group_size;  // columns that share a scale
  CodeKind code_kind;
  ScaleKind scale_kind;
  int zero_point;                // of every group, where `zeros` is null
  const uint8_t* codes;          // [n, k * bits / 8], low bits first
  const void* scales;            // [ceil(n / scale_rows), k / group_size]
  const uint8_t* zeros;          // the same shape, or null
  int64_t codes_stride;          // bytes from row to row; the CPU's kernels take dense arrays only
  int64_t scales_stride;         // elements, of scales
  int64_t zeros_stride;          // elements, of zeros
  const float* values;           // below 8 bits: of each number of 4, whose low ones are a code; CPU
  const float* scale_table;      // scales in bytes: of each of the 256; of kE8m0 and kE4m3 the CPU's kernels
  const float* scale_scales;     // kNested: [ceil(n * groups / kNestedBlock)]
  const float* scale_offset_at;  // kNested: one number; a GPU's kernels
  float scale_offset;            // kNested: the same; the CPU's kernels
  float scale_factor = 1;        // kE8m0, kE4m3: of the whole matrix
  int64_t scale_rows = 1;        // rows that share a scale
  Dtype offsets_dtype = Dtype::kFloat32;
  const void* offsets = nullptr;  // the shape of scales, or null; of integers, in the place of zeros
  int64_t offsets_stride = 0;     // elements, of offsets
};

}  // namespace bitfuse
