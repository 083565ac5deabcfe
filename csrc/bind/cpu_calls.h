// Integers as dtypes and matrices, checked.
#pragma once

#include "bind/cpu.h"
#include "common/types.h"

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

}  // namespace bitfuse
