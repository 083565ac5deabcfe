// Problems of the linear family on a GPU, from tensors.
#pragma once

#include "bind/cuda.h"
#include "bind/weights.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

// Kinds and limits of the kernels' own headers are those of csrc/common, by the same numbers.
static_assert(int(Code::Int4) == int(CodeKind::kInt4) && int(Code::Codebook4) == int(CodeKind::kCodebook4) &&
              int(Code::Int8) == int(CodeKind::kInt8) && int(Code::Fp8) == int(CodeKind::kE4m3));
static_assert(int(AdapterFloat::Float32) == int(Dtype::kFloat32) &&
              int(AdapterFloat::Float16) == int(Dtype::kFloat16) &&
              int(AdapterFloat::BFloat16) == int(Dtype::kBfloat16));
static_assert(LowbitLinearMaxTokens == kMaxTokens && AdapterMaxTokens == kMaxTokens &&
              AdapterMaxRank == kMaxRank);

// The number of a tensor's GPU; the simulator's, whose tensors are on the host, is 0.
inline int device_number(const Tensor& t) { return t.device == kHost ? 0 : t.device; }

inline void require_aligned(const char* name, const Tensor& t, uintptr_t alignment) {
  address<void>(name, reinterpret_cast<uintptr_t>(t.data), alignment, false);
}

// x [..., k] as rows that start at multiples of 16 bytes. The stride is 0 where there is one row: it is not
// read.
inline Matrix aligned_rows(const char* name, const Tensor& t) {
  Matrix m = rows_of(name, t);
  require_aligned(name, t, 16);
  require(m.columns > 0 && m.columns % 8 == 0, name, m.columns, "columns that are a multiple of 8");
  if (m.rows == 1) m.stride = 0;
  if (m.rows > 1 && (m.stride < m.columns || m.stride % 8))
    refuse(name, "of strides " + text_of(t.strides, t.dims),
           "a row stride that is a multiple of 8, a row or more");
  return m;
}

// A dense tensor on a GPU with so many elements or more.
template <class T>
T* at_least(const char* name, const Tensor& t, Dtype dtype, int device, int64_t count, uintptr_t alignment) {
  require_dtype(name, t, dtype);
  require_device(name, t, device);
  require_aligned(name, t, alignment);
  if (!is_dense(t) || count_of(t) < count)
    refuse(name, "of shape " + shape_of(t), "a contiguous tensor of " + std::to_string(count) + " elements");
  return static_cast<T*>(t.data);
}

// Adapters as kernels take them, with what is checked against the product: columns of A, rows of B, the device.
struct Adapters : AdapterArgs {
  int64_t k, n;  // 0: by the table
  int64_t rows;  // of h
  int device;
};

}  // namespace bitfuse
