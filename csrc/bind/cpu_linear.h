// Problems of the linear family from tensors, checked: shared by the bindings of the ops that are built on them.
#pragma once

#include "bind/cpu.h"
#include "bind/weights.h"
#include "common/linear.h"

namespace bitfuse {

// An adapter from Python, as it is given: rank and contents are checked against the product that it rides along.
struct AdapterTensors {
  Tensor a, b, h;  // b: of no dimensions where there is none
  bool has_b;
  double scale;
  Dropout dropout;
};

inline void require_dtype(const char* name, const Tensor& t, const Tensor& like) {
  require_dtype(name, t, like.dtype);
}

// x [..., columns] as rows of one of the three float dtypes on the host.
inline Matrix float_rows(const char* name, const Tensor& t) {
  require_float(name, t);
  require_device(name, t, kHost);
  const Matrix m = rows_of(name, t);
  // more than the tensor's own bytes: kernels count in padded rows
  check_bytes(name, {m.rows, m.stride > m.columns ? m.stride : m.columns, 4});
  return m;
}

// A dense [..., columns] of so many rows, to be written.
inline void* dense_rows(const char* name, const Tensor& t, Dtype dtype, int64_t rows, int64_t columns) {
  require_dtype(name, t, dtype);
  require_device(name, t, kHost);
  Matrix m;
  if (!is_dense(t) || !fold_rows(t, m) || m.rows != rows || m.columns != columns)
    refuse(name, "of shape " + shape_of(t) + " and strides " + text_of(t.strides, t.dims),
           std::to_string(rows) + " dense rows of " + std::to_string(columns));
  return t.data;
}

// A dense [rows, columns] of any of the three float dtypes, which it tells.
inline const void* float_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                                Dtype& dtype) {
  require_float(name, t);
  require_device(name, t, kHost);
  dtype = t.dtype;
  return dense<const void>(name, t, t.dtype, {rows, columns});
}

inline float* host_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  require_device(name, t, kHost);
  return dense<float>(name, t, Dtype::kFloat32, shape);
}

inline int64_t check_rank(int64_t rank) {
  if (rank <= 0 || rank > kMaxRank) refuse("rank", std::to_string(rank), "1 to " + std::to_string(kMaxRank));
  return rank;
}

// bias [n] of a dtype, or null for None.
inline const void* bias_of(py::handle bias, Dtype dtype, int64_t n) {
  if (bias.is_none()) return nullptr;
  const Tensor t = read("bias", bias);
  require_device("bias", t, kHost);
  return dense<const void>("bias", t, dtype, {n});
}

inline const float* out_scale_of(py::handle out_scale, int64_t n) {
  return out_scale.is_none() ? nullptr : host_floats("out_scale", read("out_scale", out_scale), {n});
}

// Of a product with W, all but bias, adapter and out. x: of the forward, or the gradient of what it gave.
LowbitLinearArgs lowbit_linear_args(const char* name, const Tensor& x, const LowBitMatrix& w, bool gradient);

}  // namespace bitfuse
