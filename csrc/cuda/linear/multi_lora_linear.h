// multi_lora_linear on CUDA: what the binding and the kernel agree on. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

#include "cuda/linear/adapter.h"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {

// x [m, k], y [m, n] contiguous, which is added to. k is a multiple of 8.
struct MultiLoraArgs {
  const void* x;
  void* y;
  int64_t x_stride;
  int m, n, k;
};

// Queues the kernel, `adapters.participants` blocks. Throws std::runtime_error when CUDA refuses it.
void multi_lora_add(const MultiLoraArgs& args, const AdapterArgs& adapters, Float type, int device,
                    std::uintptr_t stream);

}  // namespace bitfuse
