// Functions of the contract by means of others, for an instruction set that has nothing better: its header
// includes this one at its end.
#pragma once

#include "cpu/isa/scalar.h"

namespace bitfuse::BITFUSE_ISA {

BITFUSE_INLINE Vi load_bytes(const void* p, int64_t bytes) {
  alignas(4 * kLanes) uint8_t buffer[4 * kLanes] = {};
  std::memcpy(buffer, p, size_t(bytes));
  return load_dwords(buffer);
}

BITFUSE_INLINE Vf load_first(const float* p, int count) {
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(count) * 4);
  return load(buffer);
}
BITFUSE_INLINE Vf load_half_first(const uint16_t* p, int count) {
  uint16_t buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(count) * 2);
  return load_half(buffer);
}
BITFUSE_INLINE Vf load_bfloat_first(const uint16_t* p, int count) {
  uint16_t buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(count) * 2);
  return load_bfloat(buffer);
}

// 2^n for whole n from -126 to 127: n as the low bits of n + 1.5 * 2^23, moved to the exponent.
BITFUSE_INLINE Vf power_of_two(Vf n) {
  const Vi bits = as_dwords(add(n, set1(12582912.0f)));
  return as_float(add_dwords(shift_left<23>(bits), set1_dwords(0x3f800000)));
}
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n) {
  // half of n, a whole number; n is clamped to where both halves are normal
  const Vf magic = set1(12582912.0f);
  n = minimum(set1(252), maximum(set1(-252), n));
  const Vf half = sub(add(mul(n, set1(0.5f)), magic), magic);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

BITFUSE_INLINE Vf lane_sums(Vf (&a)[kLanes]) {
  Vi turned[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) turned[i] = as_dwords(a[i]);
  transpose(turned);
  Vf total = as_float(turned[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kLanes; ++i) total = add(total, as_float(turned[i]));
  return total;
}

BITFUSE_INLINE float largest_lane(Vf a) {
  alignas(4 * kLanes) float lanes[kLanes];
  store(lanes, a);
  float top = lanes[0];
  for (int i = 1; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

}  // namespace bitfuse::BITFUSE_ISA
