#include "bind/cpu_linear.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

LowbitLinearArgs lowbit_linear_args(const char* name, const Tensor& x, const LowBitMatrix& w, bool gradient) {
  const Matrix m = float_rows(name, x);
  const int64_t depth = gradient ? w.n : w.k;
  if (m.columns != depth)
    refuse(name, "of shape " + shape_of(x), "the last dimension to be " + std::to_string(depth));
  check_bytes("rows", {m.rows > 0 ? m.rows : 1, w.n > 0 ? w.n : 1, w.k});
  LowbitLinearArgs args;
  args.w = w;
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.row_stride = m.stride;
  args.x = m.data;
  args.bias = nullptr;
  return args;
}

namespace {

void lowbit_linear(py::handle x, py::handle weight, py::handle bias, py::handle out) {
  const LowBitMatrix w = read_host_matrix(weight);
  LowbitLinearArgs args = lowbit_linear_args("x", read("x", x), w, false);
  args.bias = bias_of(bias, args.dtype, w.n);
  args.out = dense_rows("out", read("out", out), args.dtype, args.rows, w.n);
  if (args.rows == 0 || w.n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear)(args);
}

void lowbit_linear_grad_x(py::handle grad, py::handle weight, py::handle out) {
  const LowBitMatrix w = read_host_matrix(weight);
  LowbitLinearArgs args = lowbit_linear_args("grad", read("grad", grad), w, true);
  args.out = dense_rows("out", read("out", out), args.dtype, args.rows, w.k);
  if (args.rows == 0 || w.n == 0) return;  // with n = 0 the caller's out is all zeros
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear_grad_x)(args);
}

// Whether an object is a tensor that can be read as it is: of torch's own classes, and no negated view, whose
// memory has the other sign.
bool is_readable(py::handle object) {
  if (!is_plain(object.ptr())) return false;
  PyObject* negated = PyObject_CallMethodNoArgs(object.ptr(), torch().is_neg);
  if (!negated) throw py::error_already_set();
  Py_DECREF(negated);
  return negated == Py_False;
}

// A new tensor [..., columns] of x's dtype and device, as x.new_empty makes it.
py::object new_rows(py::handle x, const Tensor& layout, int64_t columns) {
  PyObject* arguments[kMaxDims + 1] = {x.ptr()};
  for (int i = 0; i < layout.dims; ++i)
    arguments[i + 1] = PyLong_FromLongLong(i + 1 < layout.dims ? layout.shape[i] : columns);
  PyObject* made = PyObject_VectorcallMethod(torch().new_empty, arguments, size_t(layout.dims) + 1, nullptr);
  for (int i = 0; i < layout.dims; ++i) Py_XDECREF(arguments[i + 1]);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// lowbit_linear from the check to the output in one call, for arguments that are plain in every respect; None
// for all others, whoever is to serve them or to say what is wrong.
py::object lowbit_linear_direct(py::handle x, py::handle weight, py::handle bias) {
  try {
    WeightFields fields;
    if (!fields.of(weight.ptr()) || !is_readable(x)) return py::none();
    if (!is_plain(fields.qweight) || !is_plain(fields.scales)) return py::none();
    for (PyObject* part : {fields.zeros, fields.scale_scales, fields.scale_offset})
      if (part != Py_None && !is_plain(part)) return py::none();
    if (!bias.is_none() && !is_readable(bias)) return py::none();
    const WeightFormat* format = format_of(fields.format);
    Tensor layout;
    if (!format || !layout_of(x.ptr(), layout)) {
      PyErr_Clear();
      return py::none();
    }
    if (!is_float(layout.dtype) || layout.device != kHost || layout.dims < 1) return py::none();
    const LowBitMatrix w = make_host_matrix(read_parts(fields), *format);
    Matrix m;
    if (!fold_rows(layout, m) || m.columns != w.k || m.rows == 0 || w.n == 0) return py::none();
    check_layout("x", layout);
    LowbitLinearArgs args = lowbit_linear_args("x", layout, w, false);
    args.bias = bias_of(bias, args.dtype, w.n);
    py::object out = new_rows(x, layout, w.n);
    args.out = dense_rows("out", read("out", out), args.dtype, args.rows, w.n);
    py::gil_scoped_release release;
    BITFUSE_OF_LEVEL(lowbit_linear)(args);
    return out;
  } catch (const py::builtin_exception&) {  // what a check has refused: the op's own says it better
  } catch (const py::error_already_set&) {
  }
  return py::none();
}

}  // namespace

void bind_lowbit_linear(py::module_& module) {
  bind_weights(module);
  module.def("lowbit_linear", lowbit_linear, py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("out"));
  module.def("lowbit_linear_grad_x", lowbit_linear_grad_x, py::arg("grad"), py::arg("weight"),
             py::arg("out"));
  module.def("lowbit_linear_direct", lowbit_linear_direct, py::arg("x"), py::arg("weight"), py::arg("bias"),
             "The output for arguments that are plain in every respect, else None.");
}

}  // namespace bitfuse
