// Barriers in shared memory that count arrivals and bytes of bulk copies (mbarrier, compute capability 9.0),
// named barriers, and a ring of stages that a producer fills and consumers empty.
//
// A phase of an mbarrier ends when all arrivals and all announced bytes are there; who waits names the parity
// of the phase. What was written before an arrival can be read after the wait.
#pragma once

#include <cstdint>

#include "cuda/ptx/async_copy.cuh"

namespace bitfuse {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Initialised barriers can be seen by bulk copies; the block's threads need a barrier besides.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Waits for the end of the phase of this parity. On a new barrier the phase of parity 1 is said to be over.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Named barriers, 1 to 15: `threads` is of those that wait and those that only arrive.
template <int Threads>
__device__ __forceinline__ void named_barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void named_barrier_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}

// A place in a ring of Stages stages, each with two mbarriers, 8 bytes apart: full, then empty.
template <int Stages>
class Ring {
 public:
  __device__ explicit Ring(uint32_t barriers) : barriers_(barriers) {}
  static constexpr int Bytes = 16 * Stages;  // of the barriers

  __device__ void init(int fillers, int emptiers) const {
    for (int stage = 0; stage < Stages; ++stage) {
      mbarrier_init(barriers_ + 16 * stage, fillers);
      mbarrier_init(barriers_ + 16 * stage + 8, emptiers);
    }
  }
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t full() const { return barriers_ + 16 * stage_; }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void wait_full() const { mbarrier_wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty(), parity_ ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++stage_ == Stages) stage_ = 0, parity_ ^= 1;
  }

 private:
  uint32_t barriers_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace bitfuse
