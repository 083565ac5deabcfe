// Queries, keys and values from tensors.
#pragma once

#include "bind/fields.h"
#include "common/head_rows.h"

namespace bitfuse {

// t as [batch, rows, heads, dim], of the dtype and on the device of another; packed, [rows, heads, dim].
inline HeadRows head_rows(const char* name, const Tensor& t, const Tensor& like, int64_t batch, int64_t rows,
                          int64_t heads, int64_t dim) {
  require_dtype(name, t, like.dtype);
  require_device(name, t, like.device);
  const bool packed = t.dims == 3;
  const int first = packed ? 0 : 1;
  if ((!packed && t.dims != 4) || (!packed && t.shape[0] != batch) || t.shape[first] != rows ||
      t.shape[first + 1] != heads || t.shape[first + 2] != dim) {
    const int64_t sizes[] = {batch, rows, heads, dim};
    refuse(name, "of shape " + shape_of(t), packed ? text_of(sizes + 1, 3) : text_of(sizes, 4));
  }
  if (!has_dense_rows(t)) refuse(name, "of strides " + text_of(t.strides, t.dims), "a dense last dimension");
  // more than the tensor's own bytes: kernels count in padded rows
  check_bytes(name, {batch, rows, heads, dim, 16});
  return {t.data, packed ? 0 : t.strides[0], t.strides[first], t.strides[first + 1]};
}

// A tensor of torch's own classes whose memory is what it seems.
inline bool plain_layout(py::handle object, Tensor& t) {
  if (!is_plain(object.ptr())) return false;
  const py::object negated =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), torch().is_neg));
  if (negated.ptr() == Py_False && layout_of(object.ptr(), t)) return true;
  PyErr_Clear();
  return false;
}

// float32, dense.
inline const float* floats(const char* name, const Tensor& t, const Tensor& like,
                           std::initializer_list<int64_t> shape) {
  require_device(name, t, like.device);
  return dense<const float>(name, t, Dtype::kFloat32, shape);
}

inline void require_head_dim(const char* name, int64_t dim) {
  require(dim > 0 && dim <= kMaxHeadDim, name, dim, "1 to " + std::to_string(kMaxHeadDim));
}

// Places of a window and of tokens are below, so that sums of them never overflow.
constexpr int64_t kMostTokens = int64_t(1) << 40;

inline void require_tokens(const char* name, int64_t value, int64_t least = 0) {
  require(value >= least && value < kMostTokens, name, value, std::to_string(least) + " to 2^40");
}

inline int64_t window_bound(int64_t given) {
  return given < 0 ? -1 : given < kMostTokens ? given : kMostTokens;
}

}  // namespace bitfuse
