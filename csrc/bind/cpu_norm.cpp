#include "bind/cpu_linear.h"
#include "cpu/norm/norm.h"

namespace bitfuse {
namespace {

// A row [columns] of any of the three float dtypes.
const void* parameter(const char* name, py::handle object, int64_t columns, Dtype& dtype) {
  const Tensor t = read(name, object);
  require_float(name, t);
  require_device(name, t, kHost);
  dtype = t.dtype;
  return dense<const void>(name, t, t.dtype, {columns});
}

// Rows like x's, and their stride.
const void* like(const char* name, py::handle object, const Matrix& x, int64_t& stride) {
  const Tensor t = read(name, object);
  require_dtype(name, t, x.dtype);
  const Matrix m = float_rows(name, t);
  if (m.rows != x.rows || m.columns != x.columns)
    refuse(name, "of shape " + shape_of(t), std::to_string(x.rows) + " rows of " + std::to_string(x.columns));
  stride = m.stride;
  return m.data;
}

NormArgs norm_args(const char* name, py::handle x, py::handle weight, double eps, double offset,
                   bool centered, Matrix& m) {
  m = float_rows(name, read(name, x));
  NormArgs args{};
  args.centered = centered;
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.columns = m.columns;
  check_bytes(name, {m.rows, m.columns, 8});  // 8: threads are counted by multiply-adds
  check_bytes(name, {m.columns, 64, 4});      // gradients of the weight in parts
  args.eps = static_cast<float>(eps);
  args.offset = static_cast<float>(offset);
  args.x = m.data;
  args.x_stride = m.stride;
  args.weight = parameter("weight", weight, m.columns, args.weight_dtype);
  return args;
}

void* rows_like(const char* name, py::handle out, const NormArgs& args) {
  return dense_rows(name, read(name, out), args.dtype, args.rows, args.columns);
}

void norm(py::handle x, py::handle weight, py::handle bias, py::handle residual, py::handle out,
          py::handle sum, double eps, double offset, bool centered) {
  Matrix m;
  NormArgs args = norm_args("x", x, weight, eps, offset, centered, m);
  if (!bias.is_none()) args.bias = parameter("bias", bias, m.columns, args.bias_dtype);
  if (!residual.is_none()) {
    args.residual = like("residual", residual, m, args.residual_stride);
    args.sum = rows_like("sum", sum, args);
  }
  args.out = rows_like("out", out, args);
  if (args.rows == 0 || args.columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(norm)(args);
}

void norm_backward(py::handle grad, py::handle grad_sum, py::handle x, py::handle weight, py::handle dx,
                   py::handle d_weight, py::handle d_bias, double eps, double offset, bool centered) {
  Matrix m;
  NormArgs args = norm_args("x", x, weight, eps, offset, centered, m);
  args.grad = like("grad", grad, m, args.grad_stride);
  if (!grad_sum.is_none()) args.grad_sum = like("grad_sum", grad_sum, m, args.grad_sum_stride);
  args.dx = rows_like("dx", dx, args);
  Dtype dtype;
  if (!d_weight.is_none()) {
    args.d_weight = const_cast<void*>(parameter("d_weight", d_weight, m.columns, dtype));
    if (dtype != args.weight_dtype)
      refuse("d_weight", std::string("of dtype ") + name_of(dtype), name_of(args.weight_dtype));
  }
  if (!d_bias.is_none())
    args.d_bias = const_cast<void*>(parameter("d_bias", d_bias, m.columns, args.bias_dtype));
  if (args.columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(norm_backward)(args);
}

}  // namespace

void bind_norm(py::module_& module) {
  module.def("norm", norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
             py::arg("out"), py::arg("sum"), py::arg("eps"), py::arg("offset"), py::arg("centered"));
  module.def("norm_backward", norm_backward, py::arg("grad"), py::arg("grad_sum"), py::arg("x"),
             py::arg("weight"), py::arg("dx"), py::arg("d_weight"), py::arg("d_bias"), py::arg("eps"),
             py::arg("offset"), py::arg("centered"));
}

}  // namespace bitfuse
