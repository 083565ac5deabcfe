// A few-bit weight from Python: the tensors of a `WeightTensors`, read where they lie at every call, so that
// storage which was swapped under a weight is never missed; and what its format says, which is told once.
#pragma once

#include "bind/tensors.h"
#include "common/lowbit_matrix.h"

namespace bitfuse {

// What kernels must know of a format of python/bitfuse/weights/formats.py. Its tables are tensors of the host
// that the object keeps.
struct WeightFormat {
  CodeKind code_kind;
  int zero_point;        // of its codes where a weight has no zeros
  ScaleKind scale_kind;  // of its scales: kFloat32 says any float dtype, or nested; else kE8m0 or kE4m3
  bool tensor_scale;     // scale_scales is one scale of the whole matrix
  const float* values;   // below 8 bits: of each number of 4 bits, whose low ones are a code; null on a GPU
  const float* levels;   // of a scale that is a byte, nested ones among them: 256; null on a GPU
  py::object kept;       // the tables
};

// The fields of WeightTensors (python/bitfuse/weights/weight.py), in its order.
struct WeightFields {
  PyObject *qweight, *scales, *zeros, *scale_scales, *scale_offset, *format, *group_size, *offsets,
      *scale_rows;
  static constexpr const char* kNames[] = {"qweight", "scales",     "zeros",   "scale_scales", "scale_offset",
                                           "format",  "group_size", "offsets", "scale_rows"};
  static constexpr Py_ssize_t kCount = std::size(kNames);

  // False for anything else.
  bool of(PyObject* weight) {
    if (!PyTuple_Check(weight) || PyTuple_GET_SIZE(weight) != kCount) return false;
    PyObject** fields[] = {&qweight, &scales,     &zeros,   &scale_scales, &scale_offset,
                           &format,  &group_size, &offsets, &scale_rows};
    for (Py_ssize_t i = 0; i < kCount; ++i) *fields[i] = PyTuple_GET_ITEM(weight, i);
    return true;
  }
};

// The formats that a module's kernels read, by name: a dict that Python fills.
inline py::dict& formats() {
  static py::dict* known = new py::dict;
  return *known;
}

// null: not told of
inline const WeightFormat* format_of(PyObject* name) {
  PyObject* found = PyDict_GetItem(formats().ptr(), name);
  return found ? py::handle(found).cast<const WeightFormat*>() : nullptr;
}

// A row's elements are neighbours, and rows do not overlap.
inline bool has_rows(const Tensor& t) {
  return is_dense(t) || (t.strides[1] == 1 && t.strides[0] >= t.shape[1]);
}

// The tensors of a weight, those that there are.
struct WeightParts {
  Tensor qweight, scales, zeros, scale_scales, scale_offset, offsets;
  bool has_zeros = false, has_scale_scales = false, has_scale_offset = false, has_offsets = false;
  int64_t group_size = 0, scale_rows = 1;
};

// The parts of a WeightTensors, or of a plain tuple of the same fields.
inline WeightParts read_parts(const WeightFields& fields) {
  WeightParts p;
  p.qweight = read("qweight", fields.qweight);
  p.scales = read("scales", fields.scales);
  if ((p.has_zeros = fields.zeros != Py_None)) p.zeros = read("zeros", fields.zeros);
  if ((p.has_scale_scales = fields.scale_scales != Py_None))
    p.scale_scales = read("scale_scales", fields.scale_scales);
  if ((p.has_scale_offset = fields.scale_offset != Py_None))
    p.scale_offset = read("scale_offset", fields.scale_offset);
  if ((p.has_offsets = fields.offsets != Py_None)) p.offsets = read("offsets", fields.offsets);
  p.scale_rows = PyLong_AsLongLong(fields.scale_rows);
  if (p.scale_rows == -1 && PyErr_Occurred()) throw py::error_already_set();
  p.group_size = PyLong_AsLongLong(fields.group_size);
  if (p.group_size == -1 && PyErr_Occurred()) throw py::error_already_set();
  return p;
}

// The descriptor of a weight whose parts are on one device. Refuses what a kernel could not read, naming the
// part. rows_apart: rows of codes, scales and zeros may be further from one another than they are long.
inline LowBitMatrix make_matrix(const WeightParts& p, const WeightFormat& format, int device,
                                bool rows_apart) {
  LowBitMatrix w{};
  const Tensor &q = p.qweight, &s = p.scales;
  const bool nested = p.has_scale_offset;
  w.code_kind = format.code_kind;
  w.zero_point = format.zero_point;
  w.values = format.values;
  w.scale_table = format.levels;
  w.group_size = p.group_size;
  auto part = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns, bool apart) {
    require_device(name, t, device);
    if (t.dims != 2 || t.shape[0] != rows || t.shape[1] != columns)
      refuse(name, "of shape " + shape_of(t),
             "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
    if (!(apart ? has_rows(t) : is_dense(t)))
      refuse(name, "of strides " + text_of(t.strides, t.dims), apart ? "dense rows" : "a contiguous tensor");
  };

  if (q.dims != 2) refuse("qweight", "of shape " + shape_of(q), "2 dimensions");
  require_dtype("qweight", q, Dtype::kUint8);
  w.n = q.shape[0];
  require(q.shape[1] > 0 && q.shape[1] <= INT64_MAX / 64, "qweight", q.shape[1], "a countable row");
  w.k = q.shape[1] * 8 / bits_of(w.code_kind);
  require(w.k % 8 == 0, "in_features", w.k, "a multiple of 8");
  check_bytes("qweight", {w.n > 0 ? w.n : 1, w.k, 8});
  if (w.group_size <= 0 || w.group_size % 8 || w.k % w.group_size)
    refuse("group_size", std::to_string(w.group_size),
           "a multiple of 8 that divides in_features = " + std::to_string(w.k));
  const int64_t groups = w.k / w.group_size;
  require(p.scale_rows > 0, "scale_rows", p.scale_rows, "1 or more");
  w.scale_rows = p.scale_rows;
  const int64_t rows = w.n / p.scale_rows + (w.n % p.scale_rows != 0);  // of scales
  part("qweight", q, w.n, q.shape[1], rows_apart);
  w.codes = static_cast<const uint8_t*>(q.data);
  w.codes_stride = w.n > 1 ? q.strides[0] : q.shape[1];

  part("scales", s, rows, groups, rows_apart && !nested);
  w.scales = s.data;
  w.scales_stride = rows > 1 ? s.strides[0] : groups;
  if (format.scale_kind != ScaleKind::kFloat32) {
    const Dtype own = format.scale_kind == ScaleKind::kE8m0 ? Dtype::kE8m0 : Dtype::kE4m3;
    if (nested) refuse("scale_offset", "given", "none, for the format has no place for it");
    if (s.dtype != Dtype::kUint8) require_dtype("scales", s, own);
    w.scale_kind = format.scale_kind;
  } else if (nested) {
    require_dtype("scales", s, Dtype::kUint8);
    w.scale_kind = ScaleKind::kNested;
  } else {
    require_float("scales", s);
    w.scale_kind = static_cast<ScaleKind>(s.dtype);  // the three floats come first in both, in one order
  }
  if (p.has_zeros) {
    if (!facts_of(w.code_kind).whole) refuse("zeros", "given", "none, for the format has no place for it");
    require_dtype("zeros", p.zeros, Dtype::kUint8);
    part("zeros", p.zeros, rows, groups, rows_apart);
    w.zeros = static_cast<const uint8_t*>(p.zeros.data);
    w.zeros_stride = rows > 1 ? p.zeros.strides[0] : groups;
  }
  if (p.has_offsets) {
    if (!facts_of(w.code_kind).whole)
      refuse("offsets", "given", "none, for the format has no place for them");
    if (p.has_zeros) refuse("offsets", "given beside zeros", "one of them");
    require_float("offsets", p.offsets);
    part("offsets", p.offsets, rows, groups, rows_apart);
    w.offsets = p.offsets.data;
    w.offsets_dtype = p.offsets.dtype;
    w.offsets_stride = rows > 1 ? p.offsets.strides[0] : groups;
  }
  if (p.has_scale_scales != (nested || format.tensor_scale))
    refuse("scale_scales", p.has_scale_scales ? "given" : "none", p.has_scale_scales ? "none" : "a tensor");
  if (p.has_scale_scales) {
    const int64_t blocks = nested ? (rows * groups + kNestedBlock - 1) / kNestedBlock : 1;
    require_device("scale_scales", p.scale_scales, device);
    w.scale_scales = dense<const float>("scale_scales", p.scale_scales, Dtype::kFloat32, {blocks});
  }
  if (nested) {
    require_device("scale_offset", p.scale_offset, device);
    w.scale_offset_at = dense<const float>("scale_offset", p.scale_offset, Dtype::kFloat32, {1});
  }
  return w;
}

// For the CPU's kernels: on the host and dense, with the numbers that they take by value.
inline LowBitMatrix make_host_matrix(const WeightParts& p, const WeightFormat& format) {
  LowBitMatrix w = make_matrix(p, format, kHost, false);
  if (bits_of(w.code_kind) < 8 && !w.values) refuse("values", "null", "an address");
  if (w.scale_kind >= ScaleKind::kNested && !w.scale_table) refuse("levels", "null", "an address");
  if (w.scale_offset_at) w.scale_offset = *w.scale_offset_at;
  if (format.tensor_scale && w.scale_scales) w.scale_factor = *w.scale_scales;
  return w;
}

// A weight that an argument is, for the CPU's kernels.
inline LowBitMatrix read_host_matrix(py::handle weight) {
  WeightFields fields;
  if (!fields.of(weight.ptr()))
    throw py::type_error(std::string("weight is a ") + Py_TYPE(weight.ptr())->tp_name +
                         ", expected a WeightTensors");
  const WeightFormat* format = format_of(fields.format);
  if (!format) refuse("format", py::str(fields.format), "one that `formats` has");
  return make_host_matrix(read_parts(fields), *format);
}

inline void bind_weights(py::module_& module) {
  module.attr("WEIGHT_FIELDS") = py::tuple(
      py::cast(std::vector<std::string>(std::begin(WeightFields::kNames), std::end(WeightFields::kNames))));
  module.attr("formats") = formats();
  auto table = [](const char* name, const py::object& given, int64_t count) -> const float* {
    return given.is_none() ? nullptr : dense<const float>(name, read(name, given), Dtype::kFloat32, {count});
  };
  py::class_<WeightFormat>(
      module, "WeightFormat", py::module_local(),
      "What kernels must know of a format, in the dict `formats` by its name. scale_kind: "
      "FLOAT32 for scales of any float dtype, else E8M0 or E4M3; values, float32 [16], and "
      "levels, float32 [256]: of 4 bits, a code being the low ones, and of a scale's byte, on the host.")
      .def(py::init([table](CodeKind code_kind, int zero_point, ScaleKind scale_kind, bool tensor_scale,
                            const py::object& values, const py::object& levels) {
             require(zero_point >= 0 && zero_point < 1 << bits_of(code_kind), "zero_point", zero_point,
                     "a code");
             if (scale_kind != ScaleKind::kFloat32 && scale_kind < ScaleKind::kE8m0)
               refuse("scale_kind", std::to_string(int(scale_kind)), "FLOAT32, E8M0 or E4M3");
             return WeightFormat{code_kind,
                                 zero_point,
                                 scale_kind,
                                 tensor_scale,
                                 table("values", values, 16),
                                 table("levels", levels, 256),
                                 py::make_tuple(values, levels)};
           }),
           py::arg("code_kind"), py::arg("zero_point"), py::arg("scale_kind"), py::arg("tensor_scale"),
           py::arg("values") = py::none(), py::arg("levels") = py::none());
}

}  // namespace bitfuse
