// bitfuse._cpu: addresses and sizes in, nothing out. Checks what a wrong integer could break, picks the
// level.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/lowbit_linear.h"

namespace py = pybind11;

namespace bitfuse {
namespace {

struct Level {
  const char* name;
  bool supported;
  void (*lowbit_linear)(const LinearCall&);
  void (*lowbit_linear_grad_x)(const LinearCall&);
};

#if defined(__x86_64__)
#define BITFUSE_SUPPORTS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define BITFUSE_SUPPORTS(feature) false
#endif

// The widest level that this machine runs, or the one that BITFUSE_CPU_ISA names.
Level pick_level() {
  const bool avx2 = BITFUSE_SUPPORTS("avx2") && BITFUSE_SUPPORTS("fma") && BITFUSE_SUPPORTS("f16c");
  const bool avx512 = avx2 && BITFUSE_SUPPORTS("avx512f") && BITFUSE_SUPPORTS("avx512bw") &&
                      BITFUSE_SUPPORTS("avx512dq") && BITFUSE_SUPPORTS("avx512vl");
  const bool avx512bf16 = avx512 && BITFUSE_SUPPORTS("avx512vnni") && BITFUSE_SUPPORTS("avx512bf16");
  const Level levels[] = {
#if defined(__x86_64__)
      {"avx512bf16", avx512bf16, avx512bf16::lowbit_linear, avx512bf16::lowbit_linear_grad_x},
      {"avx512", avx512, avx512::lowbit_linear, avx512::lowbit_linear_grad_x},
      {"avx2", avx2, avx2::lowbit_linear, avx2::lowbit_linear_grad_x},
#endif
      {"portable", true, portable::lowbit_linear, portable::lowbit_linear_grad_x},
  };
  const char* asked = std::getenv("BITFUSE_CPU_ISA");
  for (const Level& level : levels) {
    if (!asked || !*asked) {
      if (level.supported) return level;
    } else if (level.name == std::string(asked)) {
      if (level.supported) return level;
      throw py::value_error(std::string("BITFUSE_CPU_ISA is '") + asked +
                            "', which this machine does not support");
    }
  }
  throw py::value_error(std::string("BITFUSE_CPU_ISA is '") + asked +
                        "', expected one of portable, avx2, avx512, avx512bf16");
}

Level& level() {
  static Level picked = pick_level();
  return picked;
}

[[noreturn]] void refuse(const char* name, const std::string& value, const std::string& expected) {
  throw py::value_error(std::string(name) + " is " + value + ", expected " + expected);
}

// The address of an array; one that holds nothing may be null.
template <class T>
T* address(const char* name, uintptr_t value, uintptr_t alignment, bool needed = true) {
  if (needed && !value) refuse(name, "null", "an address");
  if (value % alignment) refuse(name, std::to_string(value), "a multiple of " + std::to_string(alignment));
  return reinterpret_cast<T*>(value);
}

// The bytes of an array must be countable in 63 bits.
void check_bytes(const char* name, std::initializer_list<int64_t> factors) {
  int64_t bytes = 1;
  for (int64_t f : factors)
    if (__builtin_mul_overflow(bytes, f, &bytes))
      refuse(name, "larger than memory", "sizes whose product is below 2^63");
}

LinearCall make_call(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                     uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                     uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                     int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t bias, uintptr_t out,
                     bool gradient) {
  if (dtype < 0 || dtype > 2)
    refuse("dtype", std::to_string(dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  if (scale_kind < 0 || scale_kind > 4) refuse("scale_kind", std::to_string(scale_kind), "0 to 4");
  if (code_kind < 0 || code_kind > 2) refuse("code_kind", std::to_string(code_kind), "0 to 2");
  if (rows < 0) refuse("rows", std::to_string(rows), "0 or more");
  if (row_stride < 0) refuse("row_stride", std::to_string(row_stride), "0 or more");
  if (n < 0 || n % 8) refuse("n", std::to_string(n), "a multiple of 8");
  if (k <= 0 || k % 8) refuse("k", std::to_string(k), "a positive multiple of 8");
  if (group_size <= 0 || group_size % 8 || k % group_size)
    refuse("group_size", std::to_string(group_size), "a multiple of 8 that divides k = " + std::to_string(k));
  const int64_t size = dtype == 0 ? 4 : 2, depth = gradient ? n : k, outs = gradient ? k : n;
  const bool nested = scale_kind == 3, table = scale_kind >= 3, nibbles = code_kind == 0;
  check_bytes("x", {rows, row_stride > depth ? row_stride : depth, size});
  check_bytes("out", {rows, outs, size});
  check_bytes("rows", {rows > 0 ? rows : 1, n > 0 ? n : 1, k});
  check_bytes("codes", {n, k, 4});

  LinearCall call;
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

void lowbit_linear(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                   uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                   uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                   int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t bias, uintptr_t out) {
  const LinearCall call =
      make_call(x, dtype, rows, row_stride, codes, scales, scale_kind, zeros, scale_table, scale_scales,
                scale_offset, values, code_kind, zero_point, n, k, group_size, bias, out, false);
  if (rows == 0 || n == 0) return;
  py::gil_scoped_release release;
  level().lowbit_linear(call);
}

void lowbit_linear_grad_x(uintptr_t grad, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                          uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                          uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                          int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t out) {
  const LinearCall call =
      make_call(grad, dtype, rows, row_stride, codes, scales, scale_kind, zeros, scale_table, scale_scales,
                scale_offset, values, code_kind, zero_point, n, k, group_size, 0, out, true);
  if (rows == 0 || n == 0) return;  // with n = 0 the caller's out is all zeros
  py::gil_scoped_release release;
  level().lowbit_linear_grad_x(call);
}

}  // namespace
}  // namespace bitfuse

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "C++ kernels of bitfuse on the CPU. Arguments are addresses (Tensor.data_ptr()), sizes and strides.";
  // A function and not an attribute: what it raises for a bad BITFUSE_CPU_ISA stays a ValueError, where an
  // exception of the module's own initialisation would become an ImportError. bitfuse asks as it is imported.
  m.def("isa", [] { return bitfuse::level().name; }, "The instruction-set level in use.");
  m.def("lowbit_linear", bitfuse::lowbit_linear);
  m.def("lowbit_linear_grad_x", bitfuse::lowbit_linear_grad_x);
}
