#include "bind/cpu_linear.h"
#include "cpu/linear/gated_activation.h"

namespace bitfuse {
namespace {

// gate and up, and grad where it is not None. Where all are dense they are one long row.
GatedActivationArgs gated_args(Activation activation, py::handle gate, py::handle up, py::handle grad) {
  const Tensor first = read("gate", gate);
  const bool backward = !grad.is_none();
  const Tensor others[] = {read("up", up), backward ? read("grad", grad) : Tensor{}};
  const char* names[] = {"up", "grad"};
  bool dense = is_dense(first);
  for (int i = 0; i <= int(backward); ++i) {
    require_dtype(names[i], others[i], first.dtype);
    require_device(names[i], others[i], kHost);
    if (others[i].dims != first.dims || !std::equal(first.shape, first.shape + first.dims, others[i].shape))
      refuse(names[i], "of shape " + shape_of(others[i]), shape_of(first));
    dense = dense && is_dense(others[i]);
  }
  auto rows = [&](const char* name, const Tensor& t) {
    if (!dense) return float_rows(name, t);
    require_float(name, t);
    require_device(name, t, kHost);
    check_bytes(name, {count_of(t), 4});
    return Matrix{t.data, t.dtype, 1, count_of(t), count_of(t)};
  };
  GatedActivationArgs args{};
  args.activation = activation;
  const Matrix m = rows("gate", first), n = rows("up", others[0]);
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.columns = m.columns;
  args.gate = m.data;
  args.up = n.data;
  args.gate_stride = m.stride;
  args.up_stride = n.stride;
  if (backward) {
    const Matrix g = rows("grad", others[1]);
    args.grad = g.data;
    args.grad_stride = g.stride;
  }
  return args;
}

void* output(const char* name, py::handle out, const GatedActivationArgs& args) {
  const Tensor t = read(name, out);
  require_dtype(name, t, args.dtype);
  require_device(name, t, kHost);
  if (!is_dense(t) || count_of(t) != args.rows * args.columns)
    refuse(name, "of shape " + shape_of(t), "a contiguous tensor like gate");
  return t.data;
}

void run(const GatedActivationArgs& args) {
  if (args.rows == 0 || args.columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(gated_activation)(args);
}

void gated_activation(Activation activation, py::handle gate, py::handle up, py::handle out) {
  GatedActivationArgs args = gated_args(activation, gate, up, py::none());
  args.out = output("out", out, args);
  run(args);
}

void gated_activation_backward(Activation activation, py::handle grad, py::handle gate, py::handle up,
                               py::handle d_gate, py::handle d_up) {
  GatedActivationArgs args = gated_args(activation, gate, up, grad);
  args.d_gate = output("d_gate", d_gate, args);
  args.d_up = output("d_up", d_up, args);
  run(args);
}

}  // namespace

void bind_gated_activation(py::module_& module) {
  module.def("gated_activation", gated_activation, py::arg("activation"), py::arg("gate"), py::arg("up"),
             py::arg("out"));
  module.def("gated_activation_backward", gated_activation_backward, py::arg("activation"), py::arg("grad"),
             py::arg("gate"), py::arg("up"), py::arg("d_gate"), py::arg("d_up"));
}

}  // namespace bitfuse
