#include "bind/cpu_calls.h"

namespace bitfuse {

LowbitLinearArgs make_linear_call(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                                  uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                                  uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values,
                                  int code_kind, int zero_point, int64_t n, int64_t k, int64_t group_size,
                                  uintptr_t bias, uintptr_t out, bool gradient) {
  if (dtype < 0 || dtype > 2)
    refuse("dtype", std::to_string(dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  if (scale_kind < 0 || scale_kind > 4) refuse("scale_kind", std::to_string(scale_kind), "0 to 4");
  if (code_kind < 0 || code_kind > 3) refuse("code_kind", std::to_string(code_kind), "0 to 3");
  if (rows < 0) refuse("rows", std::to_string(rows), "0 or more");
  if (row_stride < 0) refuse("row_stride", std::to_string(row_stride), "0 or more");
  if (n < 0) refuse("n", std::to_string(n), "0 or more");
  if (k <= 0 || k % 8) refuse("k", std::to_string(k), "a positive multiple of 8");
  if (group_size <= 0 || group_size % 8 || k % group_size)
    refuse("group_size", std::to_string(group_size), "a multiple of 8 that divides k = " + std::to_string(k));
  const int64_t size = dtype == 0 ? 4 : 2, depth = gradient ? n : k, outs = gradient ? k : n;
  const bool nested = scale_kind == 3, table = scale_kind >= 3, nibbles = code_kind < 2;
  check_bytes("x", {rows, row_stride > depth ? row_stride : depth, size});
  check_bytes("out", {rows, outs, size});
  check_bytes("rows", {rows > 0 ? rows : 1, n > 0 ? n : 1, k});
  check_bytes("codes", {n, k, 4});

  LowbitLinearArgs call;
  call.dtype = static_cast<Dtype>(dtype);
  call.rows = rows;
  call.row_stride = row_stride;
  const bool any = rows > 0 && n > 0;
  call.x = address<const void>("x", x, size, any);
  call.bias = address<const void>("bias", bias, size, false);
  call.out = address<void>("out", out, size, any);
  LowBitMatrix& w = call.w;
  w.n = n;
  w.k = k;
  w.group_size = group_size;
  w.code_kind = static_cast<CodeKind>(code_kind);
  w.scale_kind = static_cast<ScaleKind>(scale_kind);
  w.zero_point = zero_point;
  w.codes = address<const uint8_t>("codes", codes, 1, any);
  w.scales = address<const void>("scales", scales, table ? 1 : scale_kind == 0 ? 4 : 2, any);
  w.zeros = address<const uint8_t>("zeros", zeros, 1, false);
  w.values = address<const float>("values", values, 4, any && nibbles);
  w.scale_table = address<const float>("scale_table", scale_table, 4, any && table);
  w.scale_scales = address<const float>("scale_scales", scale_scales, 4, any && nested);
  const float* offset = address<const float>("scale_offset", scale_offset, 4, any && nested);
  w.scale_offset = offset ? *offset : 0;
  w.scale_factor = scale_kind == 4 && w.scale_scales ? *w.scale_scales : 1;
  return call;
}

namespace {

void lowbit_linear(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                   uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                   uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                   int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t bias, uintptr_t out) {
  const LowbitLinearArgs call = make_linear_call(x, dtype, rows, row_stride, codes, scales, scale_kind, zeros,
                                                 scale_table, scale_scales, scale_offset, values, code_kind,
                                                 zero_point, n, k, group_size, bias, out, false);
  if (rows == 0 || n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear)(call);
}

void lowbit_linear_grad_x(uintptr_t grad, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                          uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                          uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                          int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t out) {
  const LowbitLinearArgs call = make_linear_call(grad, dtype, rows, row_stride, codes, scales, scale_kind,
                                                 zeros, scale_table, scale_scales, scale_offset, values,
                                                 code_kind, zero_point, n, k, group_size, 0, out, true);
  if (rows == 0 || n == 0) return;  // with n = 0 the caller's out is all zeros
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear_grad_x)(call);
}

}  // namespace

void bind_lowbit_linear(py::module_& module) {
  module.def("lowbit_linear", lowbit_linear);
  module.def("lowbit_linear_grad_x", lowbit_linear_grad_x);
}

}  // namespace bitfuse
