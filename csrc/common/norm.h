// The problem of the norm family: what rms_norm, layer_norm and their gradients are handed.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace bitfuse {

// s = x + residual, rounded to its dtype; z = s, less its mean where it is centered; r = 1 / sqrt(mean(z^2) +
// eps); out = z r (weight + offset) + bias.
//
// Gradients, of out's and s's: with g = grad (weight + offset),
//   dx = r (g - mean(g) - z r^2 mean(g z)) + grad_sum, without mean(g) where it is not centered,
//   d_weight = sum over rows of grad z r, d_bias = sum over rows of grad.
struct NormArgs {
  bool centered;  // layer_norm
  Dtype dtype;    // of x, residual, grad, grad_sum and what is like them
  Dtype weight_dtype, bias_dtype;
  int64_t rows, columns;
  float eps, offset;
  const void* x;  // [rows, columns]; of gradients: s
  const void* residual = nullptr;
  const void* weight;          // [columns]
  const void* bias = nullptr;  // [columns], or null
  int64_t x_stride, residual_stride = 0;
  void *out, *sum = nullptr;  // dense [rows, columns]; sum is s where there is a residual

  const void *grad = nullptr, *grad_sum = nullptr;  // null: forward; grad_sum: null for zeros
  int64_t grad_stride = 0, grad_sum_stride = 0;
  void* dx = nullptr;        // dense [rows, columns]
  void* d_weight = nullptr;  // [columns] of weight_dtype, or null where nobody asks
  void* d_bias = nullptr;    // [columns] of bias_dtype, or null
};

}  // namespace bitfuse
