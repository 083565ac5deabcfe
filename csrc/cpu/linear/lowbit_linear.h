// What the binding hands to lowbit_linear, and the one entry a level has for each direction.
#pragma once

#include <cstdint>

namespace bitfuse {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
// kNested: table[code] * scale_scales[index / kNestedBlock] + offset; kTable: table[code] * factor.
enum class ScaleKind : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kNested = 3, kTable = 4 };
constexpr int kNestedBlock = 256;
// kNibble: 4-bit codes that index `values`; kByte: the code itself, less its zero point; kE4m3: FP8 without
// infinities.
enum class CodeKind : int { kNibble = 0, kByte = 1, kE4m3 = 2 };

// w[n, k] = (value(code[n, k]) - zero[n, g]) * scale[n, g] with g = k / group_size; all arrays row-major, no
// padding.
struct LowBitMatrix {
  int64_t n, k, group_size;
  CodeKind code_kind;
  ScaleKind scale_kind;
  int zero_point;             // where `zeros` is null
  const uint8_t* codes;       // [n, k * bits / 8], low bits first
  const void* scales;         // [n, k / group_size]
  const uint8_t* zeros;       // the same shape, or null
  const float* values;        // kNibble: 16
  const float* scale_table;   // kNested, kTable: 256
  const float* scale_scales;  // kNested: [ceil(n * groups / kNestedBlock)]
  float scale_offset;         // kNested
  float scale_factor;         // kTable
};

// Elements of a matrix that are dropped, as python/bitfuse/core/dropout.py says; p is 0 where none is.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
};

// What a product with W carries along: `rank` more steps of its contraction.
//   forward   h = drop(x) A^T, written; the product gains scale * h B^T.
//   gradient  h = scale * y' B, read; the product gains drop'(h A).
struct Adapter {
  int64_t rank;
  const void *a, *b;  // [rank, k] and [n, rank]; gradient: b is not read
  Dtype a_dtype, b_dtype;
  float scale;
  float* h;  // [rows, rank]
  Dropout dropout;
};

// forward: out[rows, n] = out_scale[n] * (x[rows, k] W^T + the adapter's) + bias[n]; gradient: out[rows, k] =
// x[rows, n] W + the adapter's. x, bias and out have one dtype.
struct LinearCall {
  LowBitMatrix w;
  Dtype dtype;
  int64_t rows, row_stride;  // row_stride counts elements of x; out is dense
  const void *x, *bias;      // bias may be null
  void* out;
  const Adapter* adapter = nullptr;  // or null, for none
  const float* out_scale = nullptr;  // or null, for 1
  bool accumulate = false;           // gradient: out += what else it would be
};

#define BITFUSE_DECLARE_LEVEL(level)                 \
  namespace level {                                  \
  void lowbit_linear(const LinearCall& call);        \
  void lowbit_linear_grad_x(const LinearCall& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
