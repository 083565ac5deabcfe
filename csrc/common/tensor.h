// A tensor as native code sees it: an address and a layout. It owns nothing.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

constexpr int kMaxDims = 8;
constexpr int kHost = -1;  // the device of host memory; a GPU's is its number

struct Tensor {
  void* data = nullptr;  // of the first element
  Dtype dtype = Dtype::kOther;
  int device = kHost;
  int dims = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
};

// A tensor [..., columns] as rows that are one stride apart.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kOther;
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;  // elements from row to row; a row's own elements are neighbours
};

constexpr int64_t count_of(const Tensor& t) {
  int64_t count = 1;
  for (int i = 0; i < t.dims; ++i) count *= t.shape[i];
  return count;
}

// Whether elements lie one after the other, row-major. The stride of a dimension of one is not looked at.
// One that holds nothing is dense.
constexpr bool is_dense(const Tensor& t) {
  for (int i = 0; i < t.dims; ++i)
    if (t.shape[i] == 0) return true;
  int64_t step = 1;
  for (int i = t.dims - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
    step *= t.shape[i];
  }
  return true;
}

// Folds all dimensions but the last into rows; false where one stride does not lead from each to the next.
constexpr bool fold_rows(const Tensor& t, Matrix& m) {
  if (t.dims == 0) return false;
  const int last = t.dims - 1;
  m = {t.data, t.dtype, 1, t.shape[last], t.shape[last]};
  if (is_dense(t)) {
    for (int i = 0; i < last; ++i) m.rows *= t.shape[i];
    return true;
  }
  if (t.shape[last] != 1 && t.strides[last] != 1) return false;
  bool first = true;
  for (int i = last - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (first) {
      m.stride = t.strides[i];
      first = false;
    } else if (t.strides[i] != m.rows * m.stride) {
      return false;
    }
    m.rows *= t.shape[i];
  }
  return true;
}

}  // namespace bitfuse
