#include "bind/cpu_calls.h"

namespace bitfuse {
namespace {

void gated_activation(int activation, int dtype, int64_t rows, int64_t columns, uintptr_t gate,
                      int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t grad,
                      int64_t grad_stride, uintptr_t out, uintptr_t d_gate, uintptr_t d_up) {
  GatedActivationArgs call{};
  call.activation = make_activation(activation);
  call.dtype = make_dtype("dtype", dtype);
  call.rows = rows;
  call.columns = columns;
  call.gate = matrix<const void>("gate", gate, call.dtype, rows, columns, gate_stride);
  call.up = matrix<const void>("up", up, call.dtype, rows, columns, up_stride);
  call.gate_stride = gate_stride;
  call.up_stride = up_stride;
  if (grad) {
    call.grad = matrix<const void>("grad", grad, call.dtype, rows, columns, grad_stride);
    call.grad_stride = grad_stride;
    call.d_gate = matrix<void>("d_gate", d_gate, call.dtype, rows, columns, columns);
    call.d_up = matrix<void>("d_up", d_up, call.dtype, rows, columns, columns);
  } else {
    call.out = matrix<void>("out", out, call.dtype, rows, columns, columns);
  }
  if (rows == 0 || columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(gated_activation)(call);
}

}  // namespace

void bind_gated_activation(py::module_& module) { module.def("gated_activation", gated_activation); }

}  // namespace bitfuse
