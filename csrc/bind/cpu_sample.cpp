#include "bind/cpu_calls.h"
#include "cpu/sampling/sample.h"

namespace bitfuse {
namespace {

void sample(int64_t rows, int64_t vocabulary, int dtype, uintptr_t logits, int64_t stride, uintptr_t uniforms,
            uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t ids) {
  require(vocabulary >= 1 && vocabulary <= int64_t(1) << 20, "vocabulary", vocabulary, "1 to 2^20");
  SampleCall call{};
  call.rows = rows;
  call.vocabulary = vocabulary;
  call.dtype = make_dtype("dtype", dtype);
  call.logits = matrix<const void>("logits", logits, call.dtype, rows, vocabulary, stride);
  call.stride = stride;
  check_bytes("ids", {rows, 8});
  call.uniforms = address<const double>("uniforms", uniforms, 8, rows > 0);
  call.temperature = address<const double>("temperature", temperature, 8, rows > 0);
  call.top_k = address<const int64_t>("top_k", top_k, 8, rows > 0);
  call.top_p = address<const double>("top_p", top_p, 8, rows > 0);
  call.min_p = address<const double>("min_p", min_p, 8, rows > 0);
  call.ids = address<int64_t>("ids", ids, 8, rows > 0);
  if (rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(sample)(call);
}

}  // namespace

void bind_sample(py::module_& module) { module.def("sample", sample); }

}  // namespace bitfuse
