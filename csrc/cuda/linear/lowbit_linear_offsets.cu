// lowbit_linear and lora_linear of weights with float offsets, w = code * scale - offset, of 4 and 8 bits.
#include "cuda/linear/lowbit_linear.cuh"

namespace bitfuse {
namespace {

template <bool Adapter, typename T>
constexpr std::array<std::array<KernelFunction, 4>, 2> by_bits() {
  return {by_tokens<Adapter, T, Int4Offset>(), by_tokens<Adapter, T, Int8Offset>()};
}

template <bool Adapter>
constexpr std::array<std::array<std::array<KernelFunction, 4>, 2>, 2> of_both() {
  return {by_bits<Adapter, __half>(), by_bits<Adapter, __nv_bfloat16>()};
}

}  // namespace

const OffsetTable OffsetKernels = {of_both<false>(), of_both<true>()};

}  // namespace bitfuse
