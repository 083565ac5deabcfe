// Programmatic dependent launch (compute capability 9.0): a kernel that starts while the one before it ends.
// Before 9.0 these are nothing: a kernel starts when the one before it has ended.
#pragma once

#include <cstdint>

namespace bitfuse {

// Until the kernels before this one have ended and what they wrote is there. Every thread that reads or
// writes what another kernel writes or reads has to come here first.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start where there is room, once all blocks of this one have come here. After
// `wait_for_previous` alone: then whoever has started knows that all but the kernel right before it have
// ended.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks L2 for `bytes`, a multiple of 16, at a multiple of 16. It is a hint to the one copy that all kernels
// see: nothing is read before its time, whoever may still be writing there.
__device__ __forceinline__ void prefetch_early(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

}  // namespace bitfuse
