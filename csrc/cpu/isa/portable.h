// GCC's vector extension, 4 lanes: any machine.
#pragma once

#include <cmath>

#include "cpu/isa/scalar.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kLanes = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef int32_t Vi __attribute__((vector_size(16)));
typedef uint32_t Vu __attribute__((vector_size(16)));

BITFUSE_INLINE Vf zero() { return Vf{}; }
BITFUSE_INLINE Vf set1(float a) { return Vf{a, a, a, a}; }
BITFUSE_INLINE Vf load(const float* p) {
  Vf a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
BITFUSE_INLINE void store(float* p, Vf a) { std::memcpy(p, &a, sizeof a); }
BITFUSE_INLINE Vf add(Vf a, Vf b) { return a + b; }
BITFUSE_INLINE Vf sub(Vf a, Vf b) { return a - b; }
BITFUSE_INLINE Vf mul(Vf a, Vf b) { return a * b; }
BITFUSE_INLINE Vf fma(Vf a, Vf b, Vf c) { return a * b + c; }

BITFUSE_INLINE Vi load_dwords(const void* p) {
  Vi a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
BITFUSE_INLINE void store_dwords(void* p, Vi a) { std::memcpy(p, &a, sizeof a); }
template <int Bits>
BITFUSE_INLINE Vi shift_right(Vi a) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) >> Bits);
}
BITFUSE_INLINE Vf as_float(Vi a) { return reinterpret_cast<Vf>(a); }
BITFUSE_INLINE Vi as_dwords(Vf a) { return reinterpret_cast<Vi>(a); }
BITFUSE_INLINE Vf permute(Vf a, Vi index) { return __builtin_shuffle(a, index); }

struct Table16 {
  float values[16];
  explicit Table16(const float* p) { std::memcpy(values, p, sizeof values); }
  BITFUSE_INLINE Vf operator[](Vi code) const {
    return Vf{values[code[0] & 15], values[code[1] & 15], values[code[2] & 15], values[code[3] & 15]};
  }
  BITFUSE_INLINE void subtract(float zero) {
    for (float& v : values) v -= zero;
  }
};

template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero) {
  return __builtin_convertvector(shift_right<8 * Byte>(a) & 0xff, Vf) - zero;
}

template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a) {
  Vi code = shift_right<8 * Byte>(a);
  Vi magnitude = code & 0x7f;
  Vf normal = as_float((magnitude << 20) + (120 << 23));
  Vf subnormal = __builtin_convertvector(magnitude, Vf) * 0.001953125f;  // 2^-9
  Vi bits = magnitude < 8 ? as_dwords(subnormal) : as_dwords(normal);
  return as_float(bits | (code & 0x80) << 24);
}
template <int Step>
BITFUSE_INLINE Vf bytes_e4m3(Vi a) {
  uint8_t bytes[16];
  store_dwords(bytes, a);
  const uint8_t* at = bytes + Step % 2 + Step / 2 * 8;
  return byte_e4m3<0>(Vi{at[0], at[2], at[4], at[6]}) * (1 / kE4m3Unit);
}
BITFUSE_INLINE Vf nan_lanes(Vi a) {
  Vi some = (a & 0x7f) == 0x7f;
  some |= (a & 0x7f00) == 0x7f00;
  some |= (a & 0x7f0000) == 0x7f0000;
  some |= (a & 0x7f000000) == 0x7f000000;
  return as_float(some & 0x7fc00000);
}
BITFUSE_INLINE bool any_nan(Vi a) {
  Vi some = as_dwords(nan_lanes(a));
  return (some[0] | some[1] | some[2] | some[3]) != 0;
}

BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p) { return Vi{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}; }
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p) { return Vi{p[0], p[1], p[2], p[3]}; }
template <int Bytes>
BITFUSE_INLINE Vi load_halves(const void* p) {
  constexpr int kHalf = 4 * Bytes;
  Vi a;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const uint8_t*>(p) + Bytes * i, Bytes);
    a[i] = int32_t((bits & ((1u << kHalf) - 1)) | bits >> kHalf << 16);
  }
  return a;
}
BITFUSE_INLINE Vf set_halves(float low, float) { return set1(low); }

BITFUSE_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float f;
  if (magnitude < 0x400) {
    f = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  } else {
    uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? (255u - 31) << 23 : (127u - 15) << 23);
    std::memcpy(&f, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
BITFUSE_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: the last place is 2^-24, that of 0.5
    float a;
    std::memcpy(&a, &magnitude, 4);
    a += 0.5f;
    std::memcpy(&magnitude, &a, 4);
    return uint16_t(sign | (magnitude - 0x3f000000));
  }
  magnitude += 0xfff + (magnitude >> 13 & 1) - ((127u - 15) << 23);
  return uint16_t(sign | magnitude >> 13);
}
BITFUSE_INLINE Vf load_half(const uint16_t* p) {
  return Vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
BITFUSE_INLINE Vf load_bfloat(const uint16_t* p) { return as_float(Vi{p[0], p[1], p[2], p[3]} << 16); }
BITFUSE_INLINE void store_half(uint16_t* p, Vf a) {
  for (int i = 0; i < 4; ++i) p[i] = float_to_half(a[i]);
}
BITFUSE_INLINE void store_bfloat(uint16_t* p, Vf a) {
  Vi u = as_dwords(a);
  Vi rounded = shift_right<16>(u + (shift_right<16>(u) & 1) + 0x7fff);
  rounded = a != a ? Vi{} + 0x7fc0 : rounded;
  for (int i = 0; i < 4; ++i) p[i] = uint16_t(rounded[i]);
}

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return Vi{} + static_cast<int32_t>(a); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) + reinterpret_cast<Vu>(b));
}
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) * reinterpret_cast<Vu>(b));
}
BITFUSE_INLINE Vi and_dwords(Vi a, Vi b) { return a & b; }
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b) { return a ^ b; }
BITFUSE_INLINE Vi lane_numbers() { return Vi{0, 1, 2, 3}; }
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value) {
  return as_float(as_dwords(value) &
                  reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) >= reinterpret_cast<Vu>(b)));
}

template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a) {
  return a << Bits;
}
BITFUSE_INLINE Vf div(Vf a, Vf b) { return a / b; }
BITFUSE_INLINE Vf square_root(Vf a) {
  return Vf{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])};
}
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return a < b ? a : b; }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return a > b ? a : b; }
BITFUSE_INLINE Vf absolute(Vf a) { return as_float(as_dwords(a) & 0x7fffffff); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) { return as_dwords(sign) < 0 ? b : a; }
BITFUSE_INLINE float sum(Vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }

BITFUSE_INLINE void transpose(Vi (&a)[4]) {
  Vi low01 = __builtin_shuffle(a[0], a[1], Vi{0, 4, 1, 5}),
     high01 = __builtin_shuffle(a[0], a[1], Vi{2, 6, 3, 7});
  Vi low23 = __builtin_shuffle(a[2], a[3], Vi{0, 4, 1, 5}),
     high23 = __builtin_shuffle(a[2], a[3], Vi{2, 6, 3, 7});
  a[0] = __builtin_shuffle(low01, low23, Vi{0, 1, 4, 5});
  a[1] = __builtin_shuffle(low01, low23, Vi{2, 3, 6, 7});
  a[2] = __builtin_shuffle(high01, high23, Vi{0, 1, 4, 5});
  a[3] = __builtin_shuffle(high01, high23, Vi{2, 3, 6, 7});
}

}  // namespace bitfuse::BITFUSE_ISA

#include "cpu/isa/fallbacks.h"
