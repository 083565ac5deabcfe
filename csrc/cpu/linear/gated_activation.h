// What the binding hands to gated_activation.
#pragma once

#include "cpu/linear/lowbit_linear.h"

namespace bitfuse {

// As ACTIVATIONS of python/bitfuse/core/activations.py.
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// out = act(gate) * up; with grad: d_gate = grad * up * act'(gate), d_up = grad * act(gate). All are [rows,
// columns] of one dtype; gate, up and grad have a row stride each, the outputs are dense.
struct GatedCall {
  Activation activation;
  Dtype dtype;
  int64_t rows, columns;
  const void *gate, *up, *grad;  // forward: grad is null
  int64_t gate_stride, up_stride, grad_stride;
  void *out, *d_gate, *d_up;
};

#define BITFUSE_DECLARE_LEVEL(level)            \
  namespace level {                             \
  void gated_activation(const GatedCall& call); \
  }
BITFUSE_DECLARE_LEVEL(portable)
BITFUSE_DECLARE_LEVEL(avx2)
BITFUSE_DECLARE_LEVEL(avx512)
BITFUSE_DECLARE_LEVEL(avx512bf16)
#undef BITFUSE_DECLARE_LEVEL

}  // namespace bitfuse
