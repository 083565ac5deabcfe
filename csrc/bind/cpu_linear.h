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

// What a direct call needs: one that does all of an op in C++, for arguments that are plain in every respect.

// Whether an object is a tensor that can be read as it is: of torch's own classes, and no negated view, whose
// memory has the other sign.
inline bool is_readable(py::handle object) {
  if (!is_plain(object.ptr())) return false;
  PyObject* negated = PyObject_CallMethodNoArgs(object.ptr(), torch().is_neg);
  if (!negated) throw py::error_already_set();
  Py_DECREF(negated);
  return negated == Py_False;
}

// A new tensor [..., columns] of x's dtype and device, as x.new_empty makes it.
inline py::object new_rows(py::handle x, const Tensor& layout, int64_t columns) {
  PyObject* arguments[kMaxDims + 1] = {x.ptr()};
  for (int i = 0; i < layout.dims; ++i)
    arguments[i + 1] = PyLong_FromLongLong(i + 1 < layout.dims ? layout.shape[i] : columns);
  PyObject* made = PyObject_VectorcallMethod(torch().new_empty, arguments, size_t(layout.dims) + 1, nullptr);
  for (int i = 0; i < layout.dims; ++i) Py_XDECREF(arguments[i + 1]);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// A new float32 tensor [rows, columns] on x's device.
inline py::object new_floats(py::handle x, int64_t rows, int64_t columns) {
  const py::int_ sizes[] = {rows, columns};
  PyObject* arguments[] = {x.ptr(), sizes[0].ptr(), sizes[1].ptr(), torch().float32};
  PyObject* made = PyObject_VectorcallMethod(torch().new_empty, arguments, 3, torch().dtype_only);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

inline bool is_readable_or_none(py::handle object) { return object.is_none() || is_readable(object); }

// Float rows of the host that can be read as they are, one at least.
inline bool plain_rows(py::handle x, Tensor& layout) {
  if (!is_readable(x)) return false;
  if (!layout_of(x.ptr(), layout)) {
    PyErr_Clear();
    return false;
  }
  if (!is_float(layout.dtype) || layout.device != kHost || layout.dims < 1) return false;
  Matrix m;
  if (!fold_rows(layout, m) || m.rows == 0) return false;
  check_layout("x", layout);
  return true;
}

// The format of a weight whose tensors are torch's own; null for another.
inline const WeightFormat* plain_weight(py::handle weight, WeightFields& fields) {
  if (!fields.of(weight.ptr()) || !is_plain(fields.qweight) || !is_plain(fields.scales)) return nullptr;
  for (PyObject* part : {fields.zeros, fields.scale_scales, fields.scale_offset, fields.offsets})
    if (part != Py_None && !is_plain(part)) return nullptr;
  return format_of(fields.format);
}

}  // namespace bitfuse
