// NEON of 64-bit ARM: 4 lanes.
#pragma once

#include <arm_neon.h>

#include "cpu/isa/scalar.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kLanes = 4;
using Vf = float32x4_t;
using Vi = int32x4_t;

BITFUSE_INLINE Vf zero() { return vdupq_n_f32(0); }
BITFUSE_INLINE Vf set1(float a) { return vdupq_n_f32(a); }
BITFUSE_INLINE Vf load(const float* p) { return vld1q_f32(p); }
BITFUSE_INLINE void store(float* p, Vf a) { vst1q_f32(p, a); }
BITFUSE_INLINE Vf add(Vf a, Vf b) { return vaddq_f32(a, b); }
BITFUSE_INLINE Vf sub(Vf a, Vf b) { return vsubq_f32(a, b); }
BITFUSE_INLINE Vf mul(Vf a, Vf b) { return vmulq_f32(a, b); }
BITFUSE_INLINE Vf fma(Vf a, Vf b, Vf c) { return vfmaq_f32(c, a, b); }

BITFUSE_INLINE Vi load_dwords(const void* p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
BITFUSE_INLINE void store_dwords(void* p, Vi a) {
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a));
}
BITFUSE_INLINE Vf as_float(Vi a) { return vreinterpretq_f32_s32(a); }
BITFUSE_INLINE Vi as_dwords(Vf a) { return vreinterpretq_s32_f32(a); }
BITFUSE_INLINE uint32x4_t as_unsigned(Vi a) { return vreinterpretq_u32_s32(a); }
BITFUSE_INLINE Vi as_signed(uint32x4_t a) { return vreinterpretq_s32_u32(a); }

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return as_signed(vdupq_n_u32(a)); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) { return vaddq_s32(a, b); }
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) { return vmulq_s32(a, b); }
BITFUSE_INLINE Vi and_dwords(Vi a, Vi b) { return vandq_s32(a, b); }
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b) { return veorq_s32(a, b); }
template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a) {
  return vshlq_n_s32(a, Bits);
}
template <int Bits>
BITFUSE_INLINE Vi shift_right(Vi a) {
  if constexpr (Bits == 0)
    return a;
  else
    return as_signed(vshrq_n_u32(as_unsigned(a), Bits));
}
BITFUSE_INLINE Vi lane_numbers() { return Vi{0, 1, 2, 3}; }
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value) {
  return as_float(vandq_s32(as_dwords(value), as_signed(vcgeq_u32(as_unsigned(a), as_unsigned(b)))));
}

// The bytes of the dwords `index` of a table of bytes: 4 index + 0, 1, 2, 3. What index has above its low
// bits must be gone.
BITFUSE_INLINE uint8x16_t bytes_of_dwords(Vi index) {
  return vreinterpretq_u8_s32(vaddq_s32(vmulq_s32(index, set1_dwords(0x04040404)), set1_dwords(0x03020100)));
}
BITFUSE_INLINE Vf permute(Vf a, Vi index) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), bytes_of_dwords(index)));
}

// tbl looks up 64 bytes, which are sixteen floats.
struct Table16 {
  uint8x16x4_t values;
  explicit Table16(const float* p) {
    for (int i = 0; i < 4; ++i) values.val[i] = vreinterpretq_u8_f32(load(p + 4 * i));
  }
  BITFUSE_INLINE Vf operator[](Vi code) const {
    return vreinterpretq_f32_u8(vqtbl4q_u8(values, bytes_of_dwords(vandq_s32(code, set1_dwords(15)))));
  }
  BITFUSE_INLINE void subtract(float zero) {
    for (uint8x16_t& v : values.val) v = vreinterpretq_u8_f32(sub(vreinterpretq_f32_u8(v), set1(zero)));
  }
};

template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero) {
  return sub(vcvtq_f32_s32(vandq_s32(shift_right<8 * Byte>(a), set1_dwords(0xff))), zero);
}

// e4m3fn as fp16, as in avx512.h: words with the code in their high byte.
BITFUSE_INLINE Vf words_e4m3(int16x4_t words) {
  const int16x4_t half = vand_s16(vshr_n_s16(words, 1), vdup_n_s16(static_cast<int16_t>(0xbf80)));
  return vcvt_f32_f16(vreinterpret_f16_s16(half));
}
template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a) {
  const Vi high = shift_left<24 - 8 * Byte>(a);
  return mul(words_e4m3(vshrn_n_s32(high, 16)), set1(kE4m3Unit));
}
template <int Step>
BITFUSE_INLINE Vf bytes_e4m3(Vi a) {
  int16x8_t words = vreinterpretq_s16_s32(a);
  if constexpr (Step % 2 == 0) words = vshlq_n_s16(words, 8);
  return words_e4m3(Step < 2 ? vget_low_s16(words) : vget_high_s16(words));
}
BITFUSE_INLINE uint8x16_t nan_bytes(Vi a) {
  return vceqq_u8(vorrq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(0x80)), vdupq_n_u8(0xff));
}
BITFUSE_INLINE bool any_nan(Vi a) { return vmaxvq_u8(nan_bytes(a)) != 0; }
BITFUSE_INLINE Vf nan_lanes(Vi a) {
  const uint32x4_t bytes = vreinterpretq_u32_u8(nan_bytes(a));
  return vreinterpretq_f32_u32(vandq_u32(vtstq_u32(bytes, bytes), vdupq_n_u32(0x7fc00000)));
}

BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p) { return Vi{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}; }
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p) { return Vi{p[0], p[1], p[2], p[3]}; }
template <int Bytes>
BITFUSE_INLINE Vi load_halves(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  if constexpr (Bytes == 2) return vreinterpretq_s32_u16(vmovl_u8(vld1_u8(at)));
  uint32_t last;
  std::memcpy(&last, at + 8, 4);
  const uint8x16_t bytes = vcombine_u8(vld1_u8(at), vreinterpret_u8_u32(vdup_n_u32(last)));
  const uint8x16_t order = {0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11};
  const int16x8_t shifts = {0, -4, 0, -4, 0, -4, 0, -4};
  return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(bytes, order)), shifts));
}
BITFUSE_INLINE Vf set_halves(float low, float) { return set1(low); }

BITFUSE_INLINE float half_to_float(uint16_t h) {
  __fp16 half;
  std::memcpy(&half, &h, 2);
  return half;
}
BITFUSE_INLINE Vf load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
BITFUSE_INLINE Vf load_bfloat(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
BITFUSE_INLINE void store_half(uint16_t* p, Vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
BITFUSE_INLINE void store_bfloat(uint16_t* p, Vf a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000)), 16));
}

BITFUSE_INLINE Vf div(Vf a, Vf b) { return vdivq_f32(a, b); }
BITFUSE_INLINE Vf square_root(Vf a) { return vsqrtq_f32(a); }
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
BITFUSE_INLINE Vf absolute(Vf a) { return vabsq_f32(a); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) { return vbslq_f32(vcltzq_s32(as_dwords(sign)), b, a); }

BITFUSE_INLINE float sum(Vf a) {
  const float32x2_t half = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
}

BITFUSE_INLINE void transpose(Vi (&a)[4]) {
  const int32x4x2_t low = vtrnq_s32(a[0], a[1]), high = vtrnq_s32(a[2], a[3]);
  for (int i = 0; i < 2; ++i) {
    a[i] = vcombine_s32(vget_low_s32(low.val[i]), vget_low_s32(high.val[i]));
    a[i + 2] = vcombine_s32(vget_high_s32(low.val[i]), vget_high_s32(high.val[i]));
  }
}

}  // namespace bitfuse::BITFUSE_ISA

#include "cpu/isa/fallbacks.h"
