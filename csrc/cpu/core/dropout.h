// Which elements survive dropout: `keep` of python/bitfuse/core/dropout.py, 32 bits hashed from a seed, a row
// and a column, compared with a threshold.
#pragma once

#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {

// The two words of a row that all its elements need.
struct DropoutRow {
  uint32_t first, second;

  DropoutRow(uint64_t seed, uint32_t row)
      : first(mix(row + uint32_t(seed))), second(mix(first ^ uint32_t(seed >> 32) ^ 0x9e3779b9u)) {}

  static constexpr uint32_t kFirst = 0x7feb352d, kSecond = 0x846ca68b;

 private:
  static BITFUSE_INLINE uint32_t mix(uint32_t v) {
    v = (v ^ v >> 16) * kFirst;
    v = (v ^ v >> 15) * kSecond;
    return v ^ v >> 16;
  }
};

// An element survives if its bits are at least these.
inline uint32_t dropout_threshold(double p) {
  const double words = __builtin_nearbyint(p * 4294967296.0);
  return words >= 4294967295.0 ? 0xffffffffu : uint32_t(words);
}

BITFUSE_INLINE Vi dropout_bits(Vi column, Vi first, Vi second) {
  Vi v = xor_dwords(column, first);
  v = mul_dwords(xor_dwords(v, shift_right<16>(v)), set1_dwords(DropoutRow::kFirst));
  v = mul_dwords(xor_dwords(xor_dwords(v, shift_right<15>(v)), second), set1_dwords(DropoutRow::kSecond));
  return xor_dwords(v, shift_right<16>(v));
}

}  // namespace bitfuse::BITFUSE_ISA
