// lowbit_linear, and lora_linear, which is the same kernel with an adapter to ride along.
#include <bit>
#include <cstdio>

#include "bind/cuda_linear.h"

namespace bitfuse {
namespace {

LowbitLinearProblem problem(int64_t m, int64_t n, int64_t k, CodeKind code, bool nested, bool adapter) {
  if (m > kMaxTokens) refuse("m", std::to_string(m), "at most " + std::to_string(kMaxTokens));
  return {size(m, "m"), size(n, "n"), size(k, "k", 8), static_cast<Code>(code), nested, adapter};
}

std::string text_of(const LowbitLinearPlan& p) {
  const LowbitLinearExpected& e = p.expected;
  char text[256];
  std::snprintf(text, sizeof text,
                "%d blocks of %d outputs x %d splits of k, %d panels of %d chunks, %d B shared; %.0f clocks: "
                "memory %.0f, l2 %.0f, issue %.0f, flight %.0f, start %.0f, fixup %.0f",
                p.tiles, LowbitLinearWarpRows << p.log_warps_n, p.splits, p.panel_buffers, 1 << p.log_panel,
                p.shared_bytes, e.clocks(), e.memory, e.l2, e.issue, e.flight, e.start, e.fixup);
  return text;
}

ScaleType scale_type(ScaleKind kind) {
  switch (kind) {
    case ScaleKind::kFloat32:
      return ScaleType::Float32;
    case ScaleKind::kFloat16:
      return ScaleType::Float16;
    case ScaleKind::kBfloat16:
      return ScaleType::BFloat16;
    case ScaleKind::kNested:
      return ScaleType::Nested;
    case ScaleKind::kE8m0:
      return ScaleType::E8M0;
    default:
      refuse("scales", "of dtype float8_e4m3fn", "one that the kernel reads");
  }
}

// The weight, whose rows may be apart.
void set_weight(LowbitLinearArgs& a, py::handle weight, int device) {
  WeightFields fields;
  if (!fields.of(weight.ptr()))
    throw py::type_error(std::string("weight is a ") + Py_TYPE(weight.ptr())->tp_name +
                         ", expected a WeightTensors");
  const WeightFormat* format = format_of(fields.format);
  if (!format) refuse("format", py::str(fields.format), "one that `formats` has");
  const WeightParts parts = read_parts(fields);
  const LowBitMatrix w = make_matrix(parts, *format, device, true);
  if (format->tensor_scale) refuse("scale_scales", "given", "none");
  a.n = size(w.n, "n"), a.k = size(w.k, "k", 8);
  a.group_size = size(w.group_size, "group_size", w.group_size == w.k ? 8 : 32);
  a.groups = a.k / a.group_size;
  a.scale_type = scale_type(w.scale_kind);
  require_aligned("qweight", parts.qweight, 4);
  require(w.codes_stride % 4 == 0, "qweight's stride", w.codes_stride, "a multiple of 4");
  require(w.scale_rows == 1 ||
              (w.scale_rows % LowbitLinearWarpRows == 0 && std::has_single_bit(uint64_t(w.scale_rows))),
          "scale_rows", w.scale_rows, "1, or a power of two from 32 on");
  a.log_scale_rows = std::countr_zero(uint64_t(std::min<int64_t>(w.scale_rows, 1 << 30)));
  const int64_t most = std::numeric_limits<int>::max() / (w.n + 7);
  require(w.scales_stride <= most, "scales' stride", w.scales_stride, "n + 7 times it below 2**31");
  require(w.zeros_stride <= most, "zeros' stride", w.zeros_stride, "n + 7 times it below 2**31");
  require(w.offsets_stride <= most, "offsets' stride", w.offsets_stride, "n + 7 times it below 2**31");
  a.qweight = w.codes;
  a.scales = w.scales;
  a.zeros = w.zeros;
  a.zero_point = w.offsets ? 0 : w.zero_point;
  a.offsets = w.offsets;
  a.offset_type = scale_type(static_cast<ScaleKind>(w.offsets_dtype));  // the floats come first in both
  a.scale_scales = w.scale_scales;
  a.scale_offset = w.scale_offset_at;
  a.qweight_stride = w.codes_stride;
  a.scales_stride = static_cast<int>(w.scales_stride);
  a.zeros_stride = static_cast<int>(w.offsets ? w.offsets_stride : w.zeros_stride);
  const int last_row = (a.n - 1) >> a.log_scale_rows;
  a.last_scale = last_row * a.scales_stride + a.groups - 1;
  a.last_zero = last_row * a.zeros_stride + a.groups - 1;
}

Code code_of(py::handle weight) {
  WeightFields fields;
  fields.of(weight.ptr());
  const CodeKind kind = format_of(fields.format)->code_kind;
  if (kind > CodeKind::kE4m3) refuse("format", py::str(fields.format), "one of 4 or 8 bits");
  return static_cast<Code>(kind);
}

void run(py::handle x, py::handle weight, py::handle bias, py::handle out, const LowbitLinearPlan& plan,
         uintptr_t stream, py::handle nested_levels, py::handle pairs, py::handle partial,
         py::handle counters, int64_t first_counter, py::handle out_scale, const Adapters* adapters) {
  const Tensor from = read("x", x), to = read("out", out);
  const Float type = float_type("x", from.dtype);
  const Matrix rows = aligned_rows("x", from);
  LowbitLinearArgs a{};
  set_weight(a, weight, from.device);
  const Code code = code_of(weight);
  a.m = size(rows.rows, "m");
  require(a.m <= 8 * plan.token_tiles, "m", a.m, "what the plan was made for");
  require(rows.columns == a.k, "x", rows.columns, "as many columns as the weight");
  a.x = rows.data;
  a.x_stride = rows.stride;
  require_dtype("out", to, from.dtype);
  const Matrix into = rows_of("out", to);
  if (!is_dense(to) || into.rows != a.m || into.columns != a.n)
    refuse("out", "of shape " + shape_of(to), std::to_string(a.m) + " dense rows of " + std::to_string(a.n));
  a.y = at_least<void>("out", to, from.dtype, from.device, int64_t{a.m} * a.n, 4);
  if (!bias.is_none()) {
    const Tensor t = read("bias", bias);
    require_device("bias", t, from.device);
    a.bias = dense<const void>("bias", t, from.dtype, {a.n});
  }
  if (!out_scale.is_none()) {
    const Tensor t = read("out_scale", out_scale);
    require_device("out_scale", t, from.device);
    a.out_scale = dense<const float>("out_scale", t, Dtype::kFloat32, {a.n});
  }
  if (a.scale_type == ScaleType::Nested)
    a.nested_levels = at_least<const float>("nested_levels", read("nested_levels", nested_levels),
                                            Dtype::kFloat32, from.device, kNestedLevels, 4);
  if (code == Code::Codebook4)
    a.pairs = at_least<const void>("pairs", read("pairs", pairs), from.dtype, from.device, 256 * 4 * 2, 16);
  if (plan.splits > 1) {
    a.partial = at_least<float>("partial", read("partial", partial), Dtype::kFloat32, from.device,
                                int64_t{plan.splits} * a.m * (a.n + a.n % 2), 8);
    require(first_counter >= 0 && first_counter < int64_t{1} << 31, "first_counter", first_counter,
            "0 to 2**31 - 1");
    a.counters = at_least<unsigned>("counters", read("counters", counters), Dtype::kInt32, from.device,
                                    first_counter + plan.tiles, 4) +
                 first_counter;
  }
  if (adapters) {
    const int64_t blocks = static_cast<int64_t>(plan.tiles) * plan.splits;
    if (adapters->participants > blocks)
      refuse("participants", std::to_string(adapters->participants),
             "at most the plan's " + std::to_string(blocks) + " blocks");
    require(adapters->device == from.device && adapters->rows == a.m, "h", adapters->rows,
            "as many rows as x, on its device");
    require(adapters->k == a.k, "lora_A", adapters->k, "as many columns as x");
    require(adapters->n == a.n, "lora_B", adapters->n, "as many rows as the weight");
  }
  const int device = device_number(from);
  py::gil_scoped_release released;
  lowbit_linear(a, plan, type, code, device, stream, adapters);
}

}  // namespace

void bind_lowbit_linear(py::module_& module) {
  bind_weights(module);
  py::class_<DeviceInfo>(module, "DeviceInfo", py::module_local(),
                         "A GPU as plans see it; shared memory in bytes, compute capability as 90, bytes of "
                         "memory that a multiprocessor is given a clock.")
      .def(py::init([](int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
                       int capability, double memory_bytes) {
             require(multiprocessors > 0, "multiprocessors", multiprocessors, "a positive number");
             if (!(memory_bytes > 0))
               refuse("memory_bytes", std::to_string(memory_bytes), "a positive number");
             return DeviceInfo{multiprocessors, shared_per_block, shared_per_multiprocessor, capability,
                               memory_bytes};
           }),
           py::arg("multiprocessors"), py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"),
           py::arg("capability"), py::arg("memory_bytes"))
      .def_readonly("multiprocessors", &DeviceInfo::multiprocessors)
      .def_readonly("memory_bytes", &DeviceInfo::memory_bytes);
  module.def("device_info", &device_info, py::arg("device"), "The GPU of a number, as CUDA tells it.");
  py::class_<LowbitLinearPlan>(module, "LowbitLinearPlan", py::module_local())
      .def_readonly("token_tiles", &LowbitLinearPlan::token_tiles)
      .def_readonly("log_warps_n", &LowbitLinearPlan::log_warps_n)
      .def_readonly("splits", &LowbitLinearPlan::splits)
      .def_readonly("log_panel", &LowbitLinearPlan::log_panel)
      .def_readonly("panel_buffers", &LowbitLinearPlan::panel_buffers)
      .def_readonly("shared_bytes", &LowbitLinearPlan::shared_bytes)
      .def_readonly("tiles", &LowbitLinearPlan::tiles)
      .def_property_readonly("clocks", [](const LowbitLinearPlan& p) { return p.expected.clocks(); })
      .def("__repr__", [](const LowbitLinearPlan& p) { return text_of(p); });
  module.def(
      "plan_lowbit_linear",
      [](int64_t m, int64_t n, int64_t k, CodeKind code, bool nested, const DeviceInfo& device,
         bool adapter) { return plan_lowbit_linear(problem(m, n, k, code, nested, adapter), device); },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("code"), py::arg("nested"), py::arg("device"),
      py::arg("adapter") = false);
  module.def(
      "lowbit_linear_plans",
      [](int64_t m, int64_t n, int64_t k, CodeKind code, bool nested, const DeviceInfo& device,
         bool adapter) { return lowbit_linear_plans(problem(m, n, k, code, nested, adapter), device); },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("code"), py::arg("nested"), py::arg("device"),
      py::arg("adapter") = false, "All that the kernel can run, the best first by the model.");
  module.def(
      "lowbit_linear", &run, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
      py::arg("plan"), py::arg("stream"), py::kw_only(), py::arg("nested_levels") = py::none(),
      py::arg("pairs") = py::none(), py::arg("partial") = py::none(), py::arg("counters") = py::none(),
      py::arg("first_counter") = 0, py::arg("out_scale") = py::none(),
      py::arg("adapters").none(true) = py::none(),
      "out = x W^T + bias, or out_scale * (x W^T + the adapters') + bias. nested_levels: float32 [256], of "
      "nested scales; pairs, of x's dtype: the two levels of each byte of a codebook; partial and "
      "counters, zero before and after: where the plan splits k.");
}

}  // namespace bitfuse
