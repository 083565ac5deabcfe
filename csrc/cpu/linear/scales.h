// Scales and zero points of a LowBitMatrix, read as floats.
#pragma once

#include "cpu/linear/matmul.h"

namespace bitfuse::BITFUSE_ISA {

BITFUSE_INLINE int64_t groups_of(const LowBitMatrix& w) { return w.k / w.group_size; }

// Where a row's scales begin in the flattened array.
BITFUSE_INLINE int64_t scales_of_row(const LowBitMatrix& w, int64_t row) {
  return (w.scale_rows == 1 ? row : row / w.scale_rows) * groups_of(w);
}

// Scale `index` of the flattened [n, groups] array.
template <ScaleKind Kind>
BITFUSE_INLINE float scale_at(const LowBitMatrix& w, int64_t index) {
  if constexpr (Kind == ScaleKind::kFloat32) {
    return static_cast<const float*>(w.scales)[index];
  } else if constexpr (Kind == ScaleKind::kFloat16) {
    return half_to_float(static_cast<const uint16_t*>(w.scales)[index]);
  } else if constexpr (Kind == ScaleKind::kBfloat16) {
    return bfloat_to_float(static_cast<const uint16_t*>(w.scales)[index]);
  } else {
    const float first = w.scale_table[static_cast<const uint8_t*>(w.scales)[index]];
    if constexpr (Kind == ScaleKind::kNested)
      return first * w.scale_scales[index / kNestedBlock] + w.scale_offset;
    return first * w.scale_factor;
  }
}

// Calls f(constant) with the scale kind as a constant, so that no loop over scales asks for it.
template <ScaleKind Kind>
struct ScaleConstant {
  static constexpr ScaleKind value = Kind;
};
template <class F>
BITFUSE_INLINE void with_scale_kind(ScaleKind kind, F f) {
  switch (kind) {
    case ScaleKind::kFloat32:
      return f(ScaleConstant<ScaleKind::kFloat32>{});
    case ScaleKind::kFloat16:
      return f(ScaleConstant<ScaleKind::kFloat16>{});
    case ScaleKind::kBfloat16:
      return f(ScaleConstant<ScaleKind::kBfloat16>{});
    case ScaleKind::kNested:
      return f(ScaleConstant<ScaleKind::kNested>{});
    case ScaleKind::kE8m0:
    case ScaleKind::kE4m3:
      return f(ScaleConstant<ScaleKind::kE4m3>{});  // both by a table
  }
}

// f(first, count, to) for runs of the flattened array that are the scales of rows [row, row + rows), which
// lie at `to` as [rows][groups].
template <class F>
BITFUSE_INLINE void for_rows(const LowBitMatrix& w, int64_t row, int64_t rows, float* to, F f) {
  const int64_t groups = groups_of(w);
  if (w.scale_rows == 1) return f(row * groups, rows * groups, to);
  for (int64_t i = 0; i < rows; ++i) f(scales_of_row(w, row + i), groups, to + i * groups);
}

// Scales [first, first + count) of the flattened array.
inline void read_run(const LowBitMatrix& w, int64_t first, int64_t count, float* to) {
  with_scale_kind(w.scale_kind, [&](auto kind) {
    constexpr ScaleKind Kind = decltype(kind)::value;
    if constexpr (Kind == ScaleKind::kFloat32) {
      to_float(static_cast<const float*>(w.scales) + first, Dtype::kFloat32, to, count);
    } else if constexpr (Kind == ScaleKind::kFloat16) {
      to_float(static_cast<const uint16_t*>(w.scales) + first, Dtype::kFloat16, to, count);
    } else if constexpr (Kind == ScaleKind::kBfloat16) {
      to_float(static_cast<const uint16_t*>(w.scales) + first, Dtype::kBfloat16, to, count);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = scale_at<Kind>(w, first + i);
    }
  });
}

// Scales of rows [row, row + rows) as [rows][groups].
inline void read_scales(const LowBitMatrix& w, int64_t row, int64_t rows, float* to) {
  for_rows(w, row, rows, to, [&](int64_t first, int64_t count, float* at) { read_run(w, first, count, at); });
}

// Ask for the memory of scales (and zeros) that are read soon: they are short runs far apart, which no
// hardware prefetcher follows.
inline void prefetch_scales(const LowBitMatrix& w, int64_t row, int64_t rows) {
  if (w.scale_rows != 1) return;  // most are there already
  const int64_t first = row * groups_of(w), count = rows * groups_of(w);
  const int64_t size = size_of(w.scale_kind);
  const char* scales = static_cast<const char*>(w.scales) + first * size;
  for (int64_t b = 0; b < count * size; b += 64) __builtin_prefetch(scales + b);
  for (int64_t b = 0; w.zeros && b < count; b += 64) __builtin_prefetch(w.zeros + first + b);
  const auto* offsets = static_cast<const char*>(w.offsets) + first * size_of(w.offsets_dtype);
  for (int64_t b = 0; w.offsets && b < count * size_of(w.offsets_dtype); b += 64)
    __builtin_prefetch(offsets + b);
}

// Zero points of rows [row, row + rows) as [rows][groups].
inline void read_zeros(const LowBitMatrix& w, int64_t row, int64_t rows, float* to) {
  for_rows(w, row, rows, to, [&](int64_t first, int64_t count, float* at) {
    for (int64_t i = 0; i < count; ++i) at[i] = float(w.zeros[first + i]);
  });
}

inline void read_offset_run(const LowBitMatrix& w, int64_t first, int64_t count, float* to) {
  to_float(element(w.offsets, w.offsets_dtype, first), w.offsets_dtype, to, count);
}
inline void read_offsets(const LowBitMatrix& w, int64_t row, int64_t rows, float* to) {
  for_rows(w, row, rows, to,
           [&](int64_t first, int64_t count, float* at) { read_offset_run(w, first, count, at); });
}

}  // namespace bitfuse::BITFUSE_ISA
