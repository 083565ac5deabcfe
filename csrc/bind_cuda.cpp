// Python binding of the CUDA kernels: addresses, sizes, strides and a stream as integers.
//
// What a wrong integer could break is checked here, and raises ValueError with the argument's name; shapes
// and dtypes were checked by the op. The GIL is released while a kernel is queued.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/lowbit_linear.h"

namespace py = pybind11;

namespace bitfuse {
namespace {

using Address = std::uintptr_t;

void require(bool condition, const char* name, int64_t value, const char* expected) {
  if (!condition) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
  }
}

int size(int64_t value, const char* name, int multiple = 1) {
  require(value > 0 && value <= std::numeric_limits<int>::max(), name, value, "1 to 2**31 - 1");
  require(value % multiple == 0, name, value, multiple == 8 ? "a multiple of 8" : "a multiple of 32");
  return static_cast<int>(value);
}

template <typename T>
T* pointer(Address address, const char* name, unsigned alignment) {
  require(address != 0, name, 0, "an address");
  if (address % alignment != 0) {
    throw py::value_error(std::string(name) + " is at an address that is no multiple of " +
                          std::to_string(alignment));
  }
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* optional_pointer(Address address, const char* name, unsigned alignment) {
  return address == 0 ? nullptr : pointer<T>(address, name, alignment);
}

template <typename E>
E choice(int value, int count, const char* name) {
  require(value >= 0 && value < count, name, value, ("0 to " + std::to_string(count - 1)).c_str());
  return static_cast<E>(value);
}

unsigned scale_alignment(ScaleType type) {
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

py::tuple device(int index) {
  const DeviceInfo info = device_info(index);
  return py::make_tuple(info.multiprocessors, info.shared_per_block, info.shared_per_multiprocessor,
                        info.capability);
}

LowbitLinearPlan plan(int64_t m, int64_t n, int64_t k, int code, bool nested, int multiprocessors,
                      int shared_per_block, int shared_per_multiprocessor, int capability) {
  require(m <= LowbitLinearMaxTokens, "m", m, "at most 64");
  require(multiprocessors > 0, "multiprocessors", multiprocessors, "a positive number");
  return plan_lowbit_linear(size(m, "m"), size(n, "n", 8), size(k, "k", 8), choice<Code>(code, 4, "code"),
                            nested,
                            {multiprocessors, shared_per_block, shared_per_multiprocessor, capability});
}

void run(Address x, Address qweight, Address scales, Address zeros, Address scale_scales,
         Address scale_offset, Address nested_levels, Address pairs, Address bias, Address y, Address partial,
         Address counters, int64_t x_stride, int64_t qweight_stride, int64_t scales_stride,
         int64_t zeros_stride, int64_t m, int64_t n, int64_t k, int64_t group_size, int zero_point,
         int scale_type, int type, int code, const LowbitLinearPlan& plan, int device, Address stream) {
  LowbitLinearArgs a{};
  const Float float_type = choice<Float>(type, 2, "type");
  const Code format = choice<Code>(code, 4, "code");
  a.scale_type = choice<ScaleType>(scale_type, 5, "scale_type");
  const bool nested = a.scale_type == ScaleType::Nested;
  const int bits = format == Code::Int4 || format == Code::Codebook4 ? 4 : 8;
  a.m = size(m, "m"), a.n = size(n, "n", 8), a.k = size(k, "k", 8);
  require(m <= 8 * plan.token_tiles, "m", m, "what the plan was made for");
  a.group_size = size(group_size, "group_size", group_size == k ? 8 : 32);
  require(k % group_size == 0, "group_size", group_size, "a divisor of k");
  a.groups = a.k / a.group_size;
  a.x = pointer<const void>(x, "x", 16);
  a.qweight = pointer<const unsigned char>(qweight, "qweight", 4);
  a.scales = pointer<const void>(scales, "scales", scale_alignment(a.scale_type));
  a.zeros = optional_pointer<const unsigned char>(zeros, "zeros", 1);
  if (nested) {
    a.scale_scales = pointer<const float>(scale_scales, "scale_scales", 4);
    a.scale_offset = pointer<const float>(scale_offset, "scale_offset", 4);
    a.nested_levels = pointer<const float>(nested_levels, "nested_levels", 4);
    require(scales_stride == a.groups, "scales_stride", scales_stride,
            "the number of groups, with nested scales");
  }
  if (format == Code::Codebook4) a.pairs = pointer<const void>(pairs, "pairs", 16);
  a.bias = optional_pointer<const void>(bias, "bias", 2);
  a.y = pointer<void>(y, "y", 4);
  if (plan.splits > 1) {
    a.partial = pointer<float>(partial, "partial", 8);
    a.counters = pointer<unsigned>(counters, "counters", 4);
  }
  // a row's stride is not read where there is one row
  require(m == 1 || (x_stride >= k && x_stride % 8 == 0), "x_stride", x_stride, "a multiple of 8, k or more");
  require(qweight_stride >= k * bits / 8 && qweight_stride % 4 == 0, "qweight_stride", qweight_stride,
          "a multiple of 4, a row or more");
  a.x_stride = m == 1 ? 0 : x_stride;
  a.qweight_stride = qweight_stride;
  const int64_t most = std::numeric_limits<int>::max() / n;
  require(scales_stride >= a.groups && scales_stride <= most, "scales_stride", scales_stride,
          "the number of groups or more, and n times it below 2**31");
  a.scales_stride = static_cast<int>(scales_stride);
  if (a.zeros != nullptr) {
    require(zeros_stride >= a.groups && zeros_stride <= most, "zeros_stride", zeros_stride,
            "the number of groups or more, and n times it below 2**31");
    a.zeros_stride = static_cast<int>(zeros_stride);
  }
  require(zero_point >= 0 && zero_point < 1 << bits, "zero_point", zero_point, "a code");
  a.zero_point = zero_point;
  require(device >= 0, "device", device, "a device's number");
  py::gil_scoped_release released;
  lowbit_linear(a, plan, float_type, format, device, stream);
}

}  // namespace
}  // namespace bitfuse

PYBIND11_MODULE(_cuda, module) {
  using namespace bitfuse;
  module.doc() = "CUDA kernels of bitfuse: addresses, sizes and a stream in, nothing out.";
  module.attr("LOWBIT_LINEAR_MAX_TOKENS") = LowbitLinearMaxTokens;

  module.def(
      "architectures", [] { return BITFUSE_CUDA_ARCHITECTURES; },
      "What the kernels are compiled for: sm_ machine code, compute_ PTX for the driver to compile.");
  module.def("device_info", &device, py::arg("index"),
             "Multiprocessors, bytes of shared memory of a block and of a multiprocessor, compute capability "
             "as 90.");

  py::class_<LowbitLinearPlan>(module, "LowbitLinearPlan")
      .def_readonly("token_tiles", &LowbitLinearPlan::token_tiles)
      .def_readonly("log_warps_n", &LowbitLinearPlan::log_warps_n)
      .def_readonly("splits", &LowbitLinearPlan::splits)
      .def_readonly("log_panel", &LowbitLinearPlan::log_panel)
      .def_readonly("panel_buffers", &LowbitLinearPlan::panel_buffers)
      .def_readonly("shared_bytes", &LowbitLinearPlan::shared_bytes)
      .def_readonly("tiles", &LowbitLinearPlan::tiles);
  module.def("plan_lowbit_linear", &plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("code"),
             py::arg("nested"), py::arg("multiprocessors"), py::arg("shared_per_block"),
             py::arg("shared_per_multiprocessor"), py::arg("capability"));
  module.def("lowbit_linear", &run);
}
