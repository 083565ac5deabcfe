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

// lowbit_linear from the check to the output in one call, for arguments that are plain in every respect; None
// for all others, whoever is to serve them or to say what is wrong.
py::object lowbit_linear_direct(py::handle x, py::handle weight, py::handle bias) {
  try {
    WeightFields fields;
    Tensor layout;
    const WeightFormat* format = plain_weight(weight, fields);
    if (!format || !is_readable_or_none(bias) || !plain_rows(x, layout)) return py::none();
    const LowBitMatrix w = make_host_matrix(read_parts(fields), *format);
    if (w.n == 0 || layout.shape[layout.dims - 1] != w.k) return py::none();
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
