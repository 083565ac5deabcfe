// The integers of a product with a few-bit W, checked: shared by the bindings of the ops that are built on
// one.
#pragma once

#include "bind/cpu.h"
#include "cpu/linear/gated_activation.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

inline Dtype make_dtype(const char* name, int dtype) {
  if (dtype < 0 || dtype > 2) refuse(name, std::to_string(dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<Dtype>(dtype);
}

// A dense or strided [rows, columns] of a dtype.
template <class T>
T* matrix(const char* name, uintptr_t value, Dtype dtype, int64_t rows, int64_t columns, int64_t stride) {
  require(rows >= 0, name, rows, "0 rows or more");
  require(columns >= 0, name, columns, "0 columns or more");
  require(stride >= 0, name, stride, "a row stride of 0 or more");
  check_bytes(name, {rows, stride > columns ? stride : columns, size_of(dtype)});
  return address<T>(name, value, uintptr_t(size_of(dtype)), rows > 0 && columns > 0);
}

inline Activation make_activation(int activation) {
  if (activation < 0 || activation > 3) refuse("activation", std::to_string(activation), "0 to 3");
  return static_cast<Activation>(activation);
}

LowbitLinearArgs make_linear_call(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                                  uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                                  uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values,
                                  int code_kind, int zero_point, int64_t n, int64_t k, int64_t group_size,
                                  uintptr_t bias, uintptr_t out, bool gradient);

}  // namespace bitfuse
