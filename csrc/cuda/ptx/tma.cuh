// Copies of boxes of a tensor to shared memory by the copy engine (TMA, compute capability 9.0).
//
// A tensor map (cuda/core/tensor_map.cuh) says where a tensor lies, its sizes and strides, and the box of it
// that one copy takes. What a box has outside the tensor is zero. Rows of a box are 128 bytes, and lie
// swizzled: of row r, the 16 bytes c are at r * 128 + (c ^ r % 8) * 16, so that neither 8 rows nor 8 columns
// meet in a bank.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace bitfuse {

constexpr int BoxRowBytes = 128;

// Brings a tensor map to the cache where copies look for it. It must lie in a kernel's __grid_constant__
// parameters, or in global memory.
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box that begins at element (c0, c1, c2, c3), the first being the innermost. Its bytes arrive at the
// mbarrier. Shared memory is a multiple of 1024, for the swizzle.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0,
                                         int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Orders this thread's ordinary accesses to shared memory before those of wgmma and of bulk copies.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace bitfuse
