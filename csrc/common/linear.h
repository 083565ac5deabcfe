// The problems of the linear family: what each of its kernels is handed, on the CPU and on a GPU.
#pragma once

#include <cstdint>

#include "common/adapter.h"
#include "common/lowbit_matrix.h"
#include "common/types.h"

namespace bitfuse {

// forward: out[rows, n] = out_scale[n] * (x[rows, k] W^T + the adapter's) + bias[n].
// gradient: out[rows, k] = x[rows, n] W + the adapter's, x being the gradient of what the forward gave.
// x, bias and out have one dtype.
struct LowbitLinearArgs {
  LowBitMatrix w;
  Dtype dtype;
  int64_t rows;                      // tokens
  int64_t row_stride;                // elements from row to row of x
  const void* x;                     // [rows, k]; gradient: [rows, n]
  const void* bias;                  // [n], or null
  void* out;                         // [rows, n]; gradient: [rows, k]; dense
  const Adapter* adapter = nullptr;  // lora_linear's; null: none
  const float* out_scale = nullptr;  // [n], or null for 1
  bool accumulate = false;           // gradient: out += what else it would be
};

// h[rows, rank] = drop(x) A^T.
struct LoraShrinkArgs {
  const void* x;  // [rows, depth]
  Dtype dtype;
  int64_t rows, row_stride, depth;
  Adapter adapter;  // rank, a, h, dropout
};

// out[rows, outs] = (base + scale * drop'(t P)) * out_scale + bias. P is B transposed, [outs, rank], or A,
// [rank, outs].
struct LoraExpandArgs {
  void* out;
  const void* base;     // [rows, outs] of out's dtype, also out itself; or null
  int64_t base_stride;  // elements from row to row
  Dtype dtype;          // of out and base
  int64_t rows, outs, rank;
  const float* t;  // [rows, rank]
  const void* p;
  Dtype p_dtype;
  bool transposed;  // P is B
  float scale;
  Dropout dropout;         // where P is A
  const float* out_scale;  // [outs], or null for 1
  const void* bias;        // [outs], or null
  Dtype bias_dtype;
};

// y = x + t U^T + b with t = act(h) and h = x D^T + c; x is added where up.base is it.
struct BottleneckArgs {
  LoraShrinkArgs down;  // h, to which c is added
  const void* bias;     // c [rank], or null
  Dtype bias_dtype;
  Activation activation;
  float* t;  // [rows, rank]
  LoraExpandArgs up;
};

// out[rows, rank] = scale * y B, for y [rows, depth] and B [depth, rank].
struct LoraTimesArgs {
  const void* y;
  Dtype dtype;
  int64_t rows, row_stride, depth, rank;
  const void* b;
  Dtype b_dtype;
  float scale;
  float* out;
};

// out[rank, columns] = scale * t^T drop(x), or its transpose, for t [rows, rank] and x [rows, columns].
struct LoraOuterArgs {
  const float* t;
  const void* x;
  Dtype dtype;
  int64_t rows, row_stride, columns, rank;
  Dropout dropout;
  float scale;
  void* out;
  Dtype out_dtype;
  bool transposed;
};

// out = act(gate) * up; with grad: d_gate = grad * up * act'(gate), d_up = grad * act(gate). All are [rows,
// columns] of one dtype; gate, up and grad have a row stride each, the outputs are dense.
struct GatedActivationArgs {
  Activation activation;
  Dtype dtype;
  int64_t rows, columns;
  const void *gate, *up, *grad;  // forward: grad is null
  int64_t gate_stride, up_stride, grad_stride;
  void *out, *d_gate, *d_up;
};

}  // namespace bitfuse
