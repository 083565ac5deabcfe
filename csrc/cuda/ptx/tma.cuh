// Copies of boxes of a tensor to shared memory by the copy engine (TMA, compute capability 9.0).
//
// A tensor map says where a tensor lies, its sizes and strides, and the box of it that one copy takes. What a
// box has outside the tensor is zero. Rows of a box are 128 bytes, and lie swizzled: of row r, the 16 bytes c
// are at r * 128 + (c ^ r % 8) * 16, so that neither 8 rows nor 8 columns meet in a bank.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/core/launch.cuh"

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

// The encoder is the driver's; it is asked for through the runtime, so that nothing is linked to libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
#endif
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

// Of 16-bit elements: sizes[0] columns, neighbours; sizes[i] of the others, strides[i - 1] elements apart. A
// box is of 64 columns and `rows` of the second dimension.
inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* base, const uint64_t (&sizes)[4],
                              const int64_t (&strides)[3], int rows) {
  CUtensorMap map;
  uint64_t bytes[3];
  for (int i = 0; i < 3; ++i) bytes[i] = 2 * static_cast<uint64_t>(strides[i]);
  const uint32_t box[4] = {BoxRowBytes / 2, static_cast<uint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUtensorMapL2promotion promotion =
      sizes[0] > 64 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const CUresult result = tensor_map_encoder()(
      &map, type, 4, const_cast<void*>(base), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled: error " + std::to_string(result) + " for sizes";
    for (uint64_t size : sizes) text += " " + std::to_string(size);
    text += " and strides of";
    for (uint64_t stride : bytes) text += " " + std::to_string(stride);
    throw std::runtime_error(text + " bytes");
  }
  return map;
}

}  // namespace bitfuse
