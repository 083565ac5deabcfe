#include "bind/cpu_linear.h"
#include "cpu/linear/lora_linear.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {
namespace {

// What rides along a product with W, [n, k]. forward: h is written; gradient: h is s dY B, and b is not read.
Adapter make_adapter(const AdapterTensors& given, int64_t rows, int64_t n, int64_t k, bool gradient) {
  Adapter adapter;
  adapter.rank = check_rank(given.a.dims == 2 ? given.a.shape[0] : 0);
  adapter.a = float_matrix("a", given.a, adapter.rank, k, adapter.a_dtype);
  if (!gradient) {
    if (!given.has_b) refuse("b", "None", "a tensor");
    adapter.b = float_matrix("b", given.b, n, adapter.rank, adapter.b_dtype);
  }
  adapter.scale = static_cast<float>(given.scale);
  adapter.h = host_floats("h", given.h, {rows, adapter.rank});
  adapter.dropout = given.dropout;
  return adapter;
}

void lora_linear(py::handle x, py::handle weight, const AdapterTensors* adapter, py::handle bias,
                 py::handle out_scale, py::handle out) {
  const LowBitMatrix w = read_host_matrix(weight);
  LowbitLinearArgs args = lowbit_linear_args("x", read("x", x), w, false);
  args.bias = bias_of(bias, args.dtype, w.n);
  args.out_scale = out_scale_of(out_scale, w.n);
  args.out = dense_rows("out", read("out", out), args.dtype, args.rows, w.n);
  Adapter rides;
  if (adapter) {
    rides = make_adapter(*adapter, args.rows, w.n, w.k, false);
    args.adapter = &rides;
  }
  if (args.rows == 0 || w.n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear)(args);
}

void lora_linear_grad_x(py::handle grad, py::handle weight, const AdapterTensors* adapter, py::handle out,
                        bool accumulate) {
  const LowBitMatrix w = read_host_matrix(weight);
  LowbitLinearArgs args = lowbit_linear_args("grad", read("grad", grad), w, true);
  args.out = dense_rows("out", read("out", out), args.dtype, args.rows, w.k);
  args.accumulate = accumulate;
  Adapter rides;
  if (adapter) {
    rides = make_adapter(*adapter, args.rows, w.n, w.k, true);
    args.adapter = &rides;
  }
  if (args.rows == 0 || w.n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear_grad_x)(args);
}

LoraShrinkArgs shrink_args(py::handle x, const AdapterTensors& adapter) {
  const Matrix m = float_rows("x", read("x", x));
  LoraShrinkArgs args{};
  args.x = m.data;
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.row_stride = m.stride;
  args.depth = m.columns;
  args.adapter = make_adapter(adapter, m.rows, 0, m.columns, true);
  return args;
}

// P is [outs, rank] when transposed, else [rank, outs].
LoraExpandArgs expand_args(py::handle out, py::handle t, py::handle p, bool transposed, double scale,
                           const Dropout& dropout) {
  LoraExpandArgs args{};
  const Tensor to = read("out", out), from = read("t", t);
  require_float("out", to);
  const Matrix m = rows_of("out", to);
  args.dtype = to.dtype;
  args.rows = m.rows;
  args.outs = m.columns;
  args.rank = check_rank(from.dims == 2 ? from.shape[1] : 0);
  args.out = dense_rows("out", to, to.dtype, m.rows, m.columns);
  args.base = args.out;
  args.base_stride = m.columns;
  args.t = host_floats("t", from, {m.rows, args.rank});
  args.transposed = transposed;
  args.p = float_matrix("p", read("p", p), transposed ? m.columns : args.rank,
                        transposed ? args.rank : m.columns, args.p_dtype);
  args.scale = static_cast<float>(scale);
  args.dropout = dropout;
  args.bias_dtype = to.dtype;
  return args;
}

void lora_shrink(py::handle x, const AdapterTensors& adapter) {
  const LoraShrinkArgs args = shrink_args(x, adapter);
  if (args.rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_shrink)(args);
}

void lora_expand(py::handle out, py::handle t, py::handle p, bool transposed, double scale,
                 const Dropout& dropout, py::handle out_scale, py::handle bias) {
  LoraExpandArgs args = expand_args(out, t, p, transposed, scale, dropout);
  args.out_scale = out_scale_of(out_scale, args.outs);
  args.bias = bias_of(bias, args.dtype, args.outs);
  if (args.rows == 0 || args.outs == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_expand)(args);
}

// A bias of any of the three float dtypes, or null.
const void* own_bias(const char* name, py::handle bias, int64_t n, Dtype& dtype) {
  dtype = Dtype::kFloat32;
  if (bias.is_none()) return nullptr;
  const Tensor t = read(name, bias);
  require_float(name, t);
  require_device(name, t, kHost);
  dtype = t.dtype;
  return dense<const void>(name, t, t.dtype, {n});
}

void bottleneck_adapter(py::handle x, py::handle down, py::handle down_bias, Activation activation,
                        py::handle up, py::handle up_bias, bool residual, py::handle h, py::handle t,
                        py::handle out) {
  BottleneckArgs args{};
  args.down = shrink_args(x, {read("down", down), {}, read("h", h), false, 1, {}});
  const int64_t rank = args.down.adapter.rank;
  args.bias = own_bias("down_bias", down_bias, rank, args.bias_dtype);
  args.activation = activation;
  args.t = host_floats("t", read("t", t), {args.down.rows, rank});
  args.up = expand_args(out, t, up, true, 1, {});
  require(args.up.rank == rank, "t", args.up.rank, "as many columns as h");
  require(args.up.rows == args.down.rows, "out", args.up.rows, "as many rows as x");
  require_dtype("out", read("out", out), args.down.dtype);
  args.up.bias = own_bias("up_bias", up_bias, args.up.outs, args.up.bias_dtype);
  if (residual && args.up.outs != args.down.depth)
    refuse("outs", std::to_string(args.up.outs), "depth = " + std::to_string(args.down.depth) + " to add x");
  args.up.base = residual ? args.down.x : nullptr;
  args.up.base_stride = args.down.row_stride;
  if (args.down.rows == 0 || args.up.outs == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(bottleneck_adapter)(args);
}

void lora_times(py::handle y, py::handle b, double scale, py::handle out) {
  const Matrix m = float_rows("y", read("y", y));
  const Tensor matrix = read("b", b);
  LoraTimesArgs args{};
  args.y = m.data;
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.row_stride = m.stride;
  require(m.columns > 0, "depth", m.columns, "1 or more");
  args.depth = m.columns;
  args.rank = check_rank(matrix.dims == 2 ? matrix.shape[1] : 0);
  args.b = float_matrix("b", matrix, args.depth, args.rank, args.b_dtype);
  args.scale = static_cast<float>(scale);
  args.out = host_floats("out", read("out", out), {args.rows, args.rank});
  if (args.rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_times)(args);
}

void lora_outer(py::handle t, py::handle x, const Dropout& dropout, double scale, py::handle out,
                bool transposed) {
  const Matrix m = float_rows("x", read("x", x));
  const Tensor left = read("t", t), to = read("out", out);
  LoraOuterArgs args{};
  args.x = m.data;
  args.dtype = m.dtype;
  args.rows = m.rows;
  args.row_stride = m.stride;
  args.columns = m.columns;
  args.rank = check_rank(left.dims == 2 ? left.shape[1] : 0);
  args.t = host_floats("t", left, {m.rows, args.rank});
  args.dropout = dropout;
  args.scale = static_cast<float>(scale);
  args.transposed = transposed;
  args.out = const_cast<void*>(float_matrix("out", to, transposed ? m.columns : args.rank,
                                            transposed ? args.rank : m.columns, args.out_dtype));
  if (args.columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_outer)(args);
}

// The fields of LoraArgs (python/bitfuse/ops/linear/lora_args.py), in its order.
struct ProjectionFields {
  PyObject *weight, *lora_A, *lora_B, *scaling, *scale_by, *bias, *out_scale, *seed;
  static constexpr const char* kNames[] = {"weight",   "lora_A", "lora_B",    "scaling",
                                           "scale_by", "bias",   "out_scale", "seed"};
  static constexpr Py_ssize_t kCount = std::size(kNames);

  bool of(PyObject* projection) {
    if (!PyTuple_Check(projection) || PyTuple_GET_SIZE(projection) != kCount) return false;
    PyObject** fields[] = {&weight, &lora_A, &lora_B, &scaling, &scale_by, &bias, &out_scale, &seed};
    for (Py_ssize_t i = 0; i < kCount; ++i) *fields[i] = PyTuple_GET_ITEM(projection, i);
    return true;
  }
};

// The output and h of one projection; false where something is not plain.
bool project(py::handle x, const Tensor& layout, py::handle projection, py::object& y, py::object& h) {
  ProjectionFields p;
  WeightFields fields;
  if (!p.of(projection.ptr()) || p.scale_by != Py_None || !PyFloat_Check(p.scaling)) return false;
  const WeightFormat* format = plain_weight(p.weight, fields);
  if (!format || !is_readable(p.lora_A) || !is_readable(p.lora_B) || !is_readable_or_none(p.bias) ||
      !is_readable_or_none(p.out_scale))
    return false;
  const LowBitMatrix w = make_host_matrix(read_parts(fields), *format);
  if (w.n == 0 || layout.shape[layout.dims - 1] != w.k) return false;
  LowbitLinearArgs args = lowbit_linear_args("x", layout, w, false);
  args.bias = bias_of(p.bias, args.dtype, w.n);
  args.out_scale = out_scale_of(p.out_scale, w.n);
  AdapterTensors adapter{
      read("lora_A", p.lora_A), read("lora_B", p.lora_B), {}, true, PyFloat_AS_DOUBLE(p.scaling), {}};
  if (adapter.a.dims != 2) return false;
  h = new_floats(x, args.rows, adapter.a.shape[0]);
  adapter.h = read("h", h);
  const Adapter rides = make_adapter(adapter, args.rows, w.n, w.k, false);
  args.adapter = &rides;
  y = new_rows(x, layout, w.n);
  args.out = dense_rows("out", read("out", y), args.dtype, args.rows, w.n);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear)(args);
  return true;
}

// lora_linear from the check to the outputs in one call, for arguments that are plain in every respect and without
// dropout; None for all others, whoever is to serve them or to say what is wrong.
py::object lora_linear_direct(py::handle x, const py::tuple& projections, double dropout_p) {
  try {
    Tensor layout;
    if (dropout_p != 0 || !plain_rows(x, layout)) return py::none();
    const size_t count = projections.size();
    py::list made(2 * count);
    for (size_t i = 0; i < count; ++i) {
      py::object y, h;
      if (!project(x, layout, projections[i], y, h)) return py::none();
      made[i] = y;
      made[count + i] = h;
    }
    return made;
  } catch (const py::builtin_exception&) {  // what a check has refused: the op's own says it better
  } catch (const py::error_already_set&) {
  }
  return py::none();
}

}  // namespace

void bind_lora_linear(py::module_& module) {
  py::class_<Dropout>(module, "Dropout", py::module_local(),
                      "Elements of x that are dropped, as bitfuse.core.dropout says.")
      .def(py::init([](double p, int64_t seed) {
             if (!(p >= 0 && p < 1)) refuse("dropout_p", std::to_string(p), "0 <= dropout_p < 1");
             return Dropout{p, static_cast<uint64_t>(seed)};
           }),
           py::arg("p") = 0.0, py::arg("seed") = 0);
  py::class_<AdapterTensors>(module, "Adapter", py::module_local(),
                             "What rides along a product with W: h = drop(x) a^T is written, and scale * h "
                             "b^T added. In a gradient, "
                             "without b, h is read, and drop'(h a) added. It does not keep its tensors.")
      .def(py::init([](py::handle a, py::handle h, py::handle b, double scale, const Dropout& dropout) {
             const bool has_b = !b.is_none();
             return AdapterTensors{read("a", a), has_b ? read("b", b) : Tensor{}, read("h", h), has_b, scale,
                                   dropout};
           }),
           py::arg("a"), py::arg("h"), py::arg("b") = py::none(), py::arg("scale") = 1.0,
           py::arg("dropout") = Dropout{});
  module.def("lora_linear", lora_linear, py::arg("x"), py::arg("weight"), py::arg("adapter").none(true),
             py::arg("bias"), py::arg("out_scale"), py::arg("out"));
  module.def("lora_linear_grad_x", lora_linear_grad_x, py::arg("grad"), py::arg("weight"),
             py::arg("adapter").none(true), py::arg("out"), py::arg("accumulate"));
  module.attr("PROJECTION_FIELDS") = py::tuple(py::cast(
      std::vector<std::string>(std::begin(ProjectionFields::kNames), std::end(ProjectionFields::kNames))));
  module.def("lora_linear_direct", lora_linear_direct, py::arg("x"), py::arg("projections"),
             py::arg("dropout_p"),
             "The outputs, then every h, for arguments that are plain in every respect, else None.");
  module.def("lora_shrink", lora_shrink, py::arg("x"), py::arg("adapter"));
  module.def("lora_expand", lora_expand, py::arg("out"), py::arg("t"), py::arg("p"), py::arg("transposed"),
             py::arg("scale") = 1.0, py::arg("dropout") = Dropout{}, py::arg("out_scale") = py::none(),
             py::arg("bias") = py::none());
  module.def("bottleneck_adapter", bottleneck_adapter, py::arg("x"), py::arg("down"), py::arg("down_bias"),
             py::arg("activation"), py::arg("up"), py::arg("up_bias"), py::arg("residual"), py::arg("h"),
             py::arg("t"), py::arg("out"));
  module.def("lora_times", lora_times, py::arg("y"), py::arg("b"), py::arg("scale"), py::arg("out"));
  module.def("lora_outer", lora_outer, py::arg("t"), py::arg("x"), py::arg("dropout"), py::arg("scale"),
             py::arg("out"), py::arg("transposed"));
}

}  // namespace bitfuse
