#include <cmath>

#include "bind/cpu.h"
#include "cpu/optim/adamw8bit.h"

namespace bitfuse {
namespace {

void adamw8bit(uintptr_t p, int p_dtype, uintptr_t g, int g_dtype, uintptr_t m, uintptr_t m_absmax,
               uintptr_t v, uintptr_t v_absmax, int64_t count, int64_t block, double lr, double beta1,
               double beta2, double eps, double weight_decay, double step, bool maximize) {
  const char* dtypes = "0 (float32), 1 (float16) or 2 (bfloat16)";
  require(p_dtype >= 0 && p_dtype <= 2, "p_dtype", p_dtype, dtypes);
  require(g_dtype >= 0 && g_dtype <= 2, "g_dtype", g_dtype, dtypes);
  require(count >= 0, "count", count, "0 or more");
  require(block >= 64 && block <= kMaxOptimizerBlock && block % 64 == 0, "block", block,
          "a multiple of 64 up to " + std::to_string(kMaxOptimizerBlock));
  check_bytes("p", {count, 8});  // 8: threads are counted by multiply-adds

  AdamW8bitCall call;
  const bool any = count > 0;
  call.p_dtype = static_cast<Dtype>(p_dtype);
  call.g_dtype = static_cast<Dtype>(g_dtype);
  call.p = address<void>("p", p, p_dtype == 0 ? 4 : 2, any);
  call.g = address<const void>("g", g, g_dtype == 0 ? 4 : 2, any);
  call.m = address<uint8_t>("m", m, 1, any);
  call.v = address<uint8_t>("v", v, 1, any);
  call.m_absmax = address<float>("m_absmax", m_absmax, 4, any);
  call.v_absmax = address<float>("v_absmax", v_absmax, 4, any);
  call.count = count;
  call.block = block;
  call.beta1 = static_cast<float>(beta1);
  call.beta2 = static_cast<float>(beta2);
  call.rest1 = static_cast<float>(maximize ? beta1 - 1 : 1 - beta1);
  call.rest2 = static_cast<float>(1 - beta2);
  call.eps = static_cast<float>(eps);
  call.decay = static_cast<float>(1 - lr * weight_decay);
  call.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  call.inverse_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  if (!any) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(adamw8bit)(call);
}

}  // namespace

void bind_adamw8bit(py::module_& module) { module.def("adamw8bit", adamw8bit); }

}  // namespace bitfuse
