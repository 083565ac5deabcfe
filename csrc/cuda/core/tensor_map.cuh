// Tensor maps, made on the host: what the copy engine knows of a tensor (cuda/ptx/tma.cuh).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/core/launch.cuh"
#include "cuda/ptx/tma.cuh"

namespace bitfuse {

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
