// Copies from global to shared memory that run while the thread goes on (cp.async, compute capability 8.0).
//
// A thread commits its copies in groups and waits for all but its latest groups; its own copies are then
// visible to itself, and to others after a barrier that both pass. A copy of nothing (`valid` false) writes
// zeros and reads nothing.
#pragma once

#include <cstdint>

namespace bitfuse {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The L2 policy of bytes that are read once: they go first when room is needed, so activations and scales
// stay.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes past L1. The 128-byte line that they lie in is brought to L2 whole: a neighbour asks for the rest
// of it.
__device__ __forceinline__ void cp_async_16_stream(uint32_t to, const void* from, bool valid,
                                                   uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// 16 bytes that other blocks read too.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// 4 bytes, for rows that do not start at a multiple of 16.
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's groups, the latest ones, are still on their way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace bitfuse
