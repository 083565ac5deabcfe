#include <cmath>

#include "bind/cpu.h"
#include "bind/tensors.h"
#include "cpu/optim/adamw8bit.h"

namespace bitfuse {
namespace {

// Elements of a dense tensor of any shape.
void* whole(const char* name, const Tensor& t, int64_t count) {
  require_device(name, t, kHost);
  if (!is_dense(t)) refuse(name, "of strides " + text_of(t.strides, t.dims), "a contiguous tensor");
  require(count_of(t) == count, name, count_of(t), std::to_string(count) + " elements");
  return t.data;
}

uint8_t* codes(const char* name, const Tensor& t, int64_t count) {
  require_dtype(name, t, Dtype::kUint8);
  return static_cast<uint8_t*>(whole(name, t, count));
}

float* scales(const char* name, const Tensor& t, const AdamW8bitArgs& args) {
  require_device(name, t, kHost);
  return dense<float>(name, t, Dtype::kFloat32, {args.count / args.block + (args.count % args.block != 0)});
}

void adamw8bit(py::handle p_, py::handle grad_, py::handle exp_avg, py::handle exp_avg_absmax,
               py::handle exp_avg_sq, py::handle exp_avg_sq_absmax, double lr, double beta1, double beta2,
               double eps, double weight_decay, double step, bool maximize, int64_t block_size) {
  const Tensor p = read("p", p_), grad = read("grad", grad_);
  AdamW8bitArgs args;
  args.count = count_of(p);
  args.block = block_size;
  require_float("p", p);
  require_float("grad", grad);
  require(args.block >= 64 && args.block <= kMaxOptimizerBlock && args.block % 64 == 0, "block_size",
          args.block, "a multiple of 64 up to " + std::to_string(kMaxOptimizerBlock));
  check_bytes("p", {args.count, 8});  // 8: threads are counted by multiply-adds
  args.p_dtype = p.dtype;
  args.g_dtype = grad.dtype;
  args.p = whole("p", p, args.count);
  args.g = whole("grad", grad, args.count);
  args.m = codes("exp_avg", read("exp_avg", exp_avg), args.count);
  args.v = codes("exp_avg_sq", read("exp_avg_sq", exp_avg_sq), args.count);
  args.m_absmax = scales("exp_avg_absmax", read("exp_avg_absmax", exp_avg_absmax), args);
  args.v_absmax = scales("exp_avg_sq_absmax", read("exp_avg_sq_absmax", exp_avg_sq_absmax), args);
  args.beta1 = static_cast<float>(beta1);
  args.beta2 = static_cast<float>(beta2);
  args.rest1 = static_cast<float>(maximize ? beta1 - 1 : 1 - beta1);
  args.rest2 = static_cast<float>(1 - beta2);
  args.eps = static_cast<float>(eps);
  args.decay = static_cast<float>(1 - lr * weight_decay);
  args.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  args.inverse_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  if (args.count == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(adamw8bit)(args);
}

}  // namespace

void bind_adamw8bit(py::module_& module) {
  module.def("adamw8bit", adamw8bit, "One step in place.", py::arg("p"), py::arg("grad"), py::arg("exp_avg"),
             py::arg("exp_avg_absmax"), py::arg("exp_avg_sq"), py::arg("exp_avg_sq_absmax"), py::kw_only(),
             py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
             py::arg("step"), py::arg("maximize"), py::arg("block_size"));
}

}  // namespace bitfuse
