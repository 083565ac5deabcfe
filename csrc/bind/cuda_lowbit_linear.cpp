// lowbit_linear, and lora_linear, which is the same kernel with an adapter to ride along.
#include "bind/cuda.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {
namespace {

uintptr_t scale_alignment(ScaleType type) {
  switch (type) {
    case ScaleType::Float32:
      return 4;
    case ScaleType::Float16:
    case ScaleType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

LowbitLinearPlan plan(int64_t m, int64_t n, int64_t k, int code, bool nested, int multiprocessors,
                      int shared_per_block, int shared_per_multiprocessor, int capability, bool adapter) {
  require(m <= LowbitLinearMaxTokens, "m", m, "at most 64");
  require(multiprocessors > 0, "multiprocessors", multiprocessors, "a positive number");
  return plan_lowbit_linear(
      size(m, "m"), size(n, "n"), size(k, "k", 8), choice<Code>(code, 4, "code"), nested,
      {multiprocessors, shared_per_block, shared_per_multiprocessor, capability}, adapter);
}

struct Call {
  LowbitLinearArgs args;
  Float type;
  Code code;
};

Call make_call(uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t scale_scales,
               uintptr_t scale_offset, uintptr_t nested_levels, uintptr_t pairs, uintptr_t bias, uintptr_t y,
               uintptr_t partial, uintptr_t counters, int64_t x_stride, int64_t qweight_stride,
               int64_t scales_stride, int64_t zeros_stride, int64_t m, int64_t n, int64_t k,
               int64_t group_size, int zero_point, int scale_type, int type, int code,
               const LowbitLinearPlan& plan, int device) {
  Call call{};
  LowbitLinearArgs& a = call.args;
  call.type = choice<Float>(type, 2, "type");
  call.code = choice<Code>(code, 4, "code");
  a.scale_type = choice<ScaleType>(scale_type, 5, "scale_type");
  const bool nested = a.scale_type == ScaleType::Nested;
  const int bits = call.code == Code::Int4 || call.code == Code::Codebook4 ? 4 : 8;
  a.m = size(m, "m"), a.n = size(n, "n"), a.k = size(k, "k", 8);
  require(m <= 8 * plan.token_tiles, "m", m, "what the plan was made for");
  a.group_size = size(group_size, "group_size", group_size == k ? 8 : 32);
  require(k % group_size == 0, "group_size", group_size, "a divisor of k");
  a.groups = a.k / a.group_size;
  a.x = address<const void>("x", x, 16);
  a.qweight = address<const unsigned char>("qweight", qweight, 4);
  a.scales = address<const void>("scales", scales, scale_alignment(a.scale_type));
  a.zeros = address<const unsigned char>("zeros", zeros, 1, false);
  if (nested) {
    a.scale_scales = address<const float>("scale_scales", scale_scales, 4);
    a.scale_offset = address<const float>("scale_offset", scale_offset, 4);
    a.nested_levels = address<const float>("nested_levels", nested_levels, 4);
    require(scales_stride == a.groups, "scales_stride", scales_stride,
            "the number of groups, with nested scales");
  }
  if (call.code == Code::Codebook4) a.pairs = address<const void>("pairs", pairs, 16);
  a.bias = address<const void>("bias", bias, 2, false);
  a.y = address<void>("y", y, 4);
  if (plan.splits > 1) {
    a.partial = address<float>("partial", partial, 8);
    a.counters = address<unsigned>("counters", counters, 4);
  }
  // a row's stride is not read where there is one row
  require(m == 1 || (x_stride >= k && x_stride % 8 == 0), "x_stride", x_stride, "a multiple of 8, k or more");
  require(qweight_stride >= k * bits / 8 && qweight_stride % 4 == 0, "qweight_stride", qweight_stride,
          "a multiple of 4, a row or more");
  a.x_stride = m == 1 ? 0 : x_stride;
  a.qweight_stride = qweight_stride;
  const int64_t most = std::numeric_limits<int>::max() / (n + 7);
  require(scales_stride >= a.groups && scales_stride <= most, "scales_stride", scales_stride,
          "the number of groups or more, and n + 7 times it below 2**31");
  a.scales_stride = static_cast<int>(scales_stride);
  a.last_scale = (a.n - 1) * a.scales_stride + a.groups - 1;
  if (a.zeros != nullptr) {
    require(zeros_stride >= a.groups && zeros_stride <= most, "zeros_stride", zeros_stride,
            "the number of groups or more, and n + 7 times it below 2**31");
    a.zeros_stride = static_cast<int>(zeros_stride);
    a.last_zero = (a.n - 1) * a.zeros_stride + a.groups - 1;
  }
  require(zero_point >= 0 && zero_point < 1 << bits, "zero_point", zero_point, "a code");
  a.zero_point = zero_point;
  require(device >= 0, "device", device, "a device's number");
  return call;
}

void run(uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t scale_scales,
         uintptr_t scale_offset, uintptr_t nested_levels, uintptr_t pairs, uintptr_t bias, uintptr_t y,
         uintptr_t partial, uintptr_t counters, int64_t x_stride, int64_t qweight_stride,
         int64_t scales_stride, int64_t zeros_stride, int64_t m, int64_t n, int64_t k, int64_t group_size,
         int zero_point, int scale_type, int type, int code, const LowbitLinearPlan& plan, int device,
         uintptr_t stream) {
  const Call call =
      make_call(x, qweight, scales, zeros, scale_scales, scale_offset, nested_levels, pairs, bias, y, partial,
                counters, x_stride, qweight_stride, scales_stride, zeros_stride, m, n, k, group_size,
                zero_point, scale_type, type, code, plan, device);
  py::gil_scoped_release released;
  lowbit_linear(call.args, plan, call.type, call.code, device, stream);
}

void run_lora(uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t scale_scales,
              uintptr_t scale_offset, uintptr_t nested_levels, uintptr_t pairs, uintptr_t bias, uintptr_t y,
              uintptr_t partial, uintptr_t counters, int64_t x_stride, int64_t qweight_stride,
              int64_t scales_stride, int64_t zeros_stride, int64_t m, int64_t n, int64_t k,
              int64_t group_size, int zero_point, int scale_type, int type, int code,
              const LowbitLinearPlan& plan, int device, uintptr_t stream, uintptr_t out_scale,
              const Adapters* adapters) {
  Call call = make_call(x, qweight, scales, zeros, scale_scales, scale_offset, nested_levels, pairs, bias, y,
                        partial, counters, x_stride, qweight_stride, scales_stride, zeros_stride, m, n, k,
                        group_size, zero_point, scale_type, type, code, plan, device);
  call.args.out_scale = address<const float>("out_scale", out_scale, 4, false);
  const int64_t blocks = static_cast<int64_t>(plan.tiles) * plan.splits;
  require(adapters == nullptr || adapters->participants <= blocks, "participants",
          adapters == nullptr ? 0 : adapters->participants,
          "at most the plan's " + std::to_string(blocks) + " blocks");
  py::gil_scoped_release released;
  lowbit_linear(call.args, plan, call.type, call.code, device, stream, adapters);
}

}  // namespace

void bind_lowbit_linear(py::module_& module) {
  module.attr("LOWBIT_LINEAR_MAX_TOKENS") = LowbitLinearMaxTokens;
  py::class_<LowbitLinearPlan>(module, "LowbitLinearPlan", py::module_local())
      .def_readonly("token_tiles", &LowbitLinearPlan::token_tiles)
      .def_readonly("log_warps_n", &LowbitLinearPlan::log_warps_n)
      .def_readonly("splits", &LowbitLinearPlan::splits)
      .def_readonly("log_panel", &LowbitLinearPlan::log_panel)
      .def_readonly("panel_buffers", &LowbitLinearPlan::panel_buffers)
      .def_readonly("shared_bytes", &LowbitLinearPlan::shared_bytes)
      .def_readonly("tiles", &LowbitLinearPlan::tiles);
  module.def("plan_lowbit_linear", &plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("code"),
             py::arg("nested"), py::arg("multiprocessors"), py::arg("shared_per_block"),
             py::arg("shared_per_multiprocessor"), py::arg("capability"), py::arg("adapter") = false);
  module.def("lowbit_linear", &run);
  module.def("lora_linear", &run_lora, "As lowbit_linear, then out_scale and the adapters that ride along.");
}

}  // namespace bitfuse
