// AVX2 with FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

#include "cpu/isa/scalar.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kLanes = 8;
using Vf = __m256;
using Vi = __m256i;

BITFUSE_INLINE Vf zero() { return _mm256_setzero_ps(); }
BITFUSE_INLINE Vf set1(float a) { return _mm256_set1_ps(a); }
BITFUSE_INLINE Vf load(const float* p) { return _mm256_loadu_ps(p); }
BITFUSE_INLINE void store(float* p, Vf a) { _mm256_storeu_ps(p, a); }
BITFUSE_INLINE Vf add(Vf a, Vf b) { return _mm256_add_ps(a, b); }
BITFUSE_INLINE Vf sub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
BITFUSE_INLINE Vf mul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
BITFUSE_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }

BITFUSE_INLINE Vi load_dwords(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BITFUSE_INLINE void store_dwords(void* p, Vi a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
template <int Bits>
BITFUSE_INLINE Vi shift_right(Vi a) {
  return Bits == 0 ? a : _mm256_srli_epi32(a, Bits);
}
BITFUSE_INLINE Vf as_float(Vi a) { return _mm256_castsi256_ps(a); }
BITFUSE_INLINE Vi as_dwords(Vf a) { return _mm256_castps_si256(a); }
BITFUSE_INLINE Vf permute(Vf a, Vi index) { return _mm256_permutevar8x32_ps(a, index); }

// vpermps ymm looks up 8 floats by 3 bits; bit 3, moved to the sign, picks between two of them.
struct Table16 {
  Vf low, high;
  explicit Table16(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  BITFUSE_INLINE Vf operator[](Vi code) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                            as_float(_mm256_slli_epi32(code, 28)));
  }
  BITFUSE_INLINE void subtract(float zero) { low = sub(low, set1(zero)), high = sub(high, set1(zero)); }
};

template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero) {
  Vi code = _mm256_and_si256(shift_right<8 * Byte>(a), _mm256_set1_epi32(0xff));
  return sub(_mm256_cvtepi32_ps(code), zero);
}

template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a) {
  Vi top = _mm256_slli_epi32(a, 24 - 8 * Byte);
  Vi half = _mm256_srli_epi32(
      _mm256_and_si256(_mm256_srai_epi32(top, 1), _mm256_set1_epi32(static_cast<int>(0xbf800000))), 16);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return mul(_mm256_cvtph_ps(packed), set1(kE4m3Unit));
}
template <int Step>
BITFUSE_INLINE Vf bytes_e4m3(Vi a) {
  Vi half = _mm256_and_si256(_mm256_srai_epi16(Step % 2 ? a : _mm256_slli_epi16(a, 8), 1),
                             _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return _mm256_cvtph_ps(Step < 2 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1));
}
BITFUSE_INLINE Vi nan_bytes(Vi a) {
  return _mm256_cmpeq_epi8(_mm256_or_si256(a, _mm256_set1_epi8(static_cast<char>(0x80))),
                           _mm256_set1_epi8(-1));
}
BITFUSE_INLINE bool any_nan(Vi a) { return _mm256_movemask_epi8(nan_bytes(a)) != 0; }
BITFUSE_INLINE Vf nan_lanes(Vi a) {
  Vi none = _mm256_cmpeq_epi32(nan_bytes(a), _mm256_setzero_si256());
  return as_float(_mm256_andnot_si256(none, _mm256_set1_epi32(0x7fc00000)));
}

BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p) {
  int32_t codes;
  std::memcpy(&codes, p, 4);
  return _mm256_srlv_epi32(_mm256_set1_epi32(codes), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
}
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// 3 bytes: 12 of them go to each half of the vector, and from there bytes 0 1 1 2 to a dword.
template <int Bytes>
BITFUSE_INLINE Vi load_halves(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  if constexpr (Bytes == 2) return _mm256_cvtepu8_epi16(low);
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8));
  const Vi bytes = _mm256_set_epi8(15, 14, 14, 13, 12, 11, 11, 10, 9, 8, 8, 7, 6, 5, 5, 4,  //
                                   11, 10, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1, 0);
  const Vi all = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), bytes);
  return _mm256_blend_epi16(all, _mm256_srli_epi16(all, 4), 0xaa);
}
BITFUSE_INLINE Vf set_halves(float low, float) { return set1(low); }

BITFUSE_INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
BITFUSE_INLINE Vf load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
BITFUSE_INLINE Vf load_bfloat(const uint16_t* p) {
  return as_float(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
BITFUSE_INLINE void store_half(uint16_t* p, Vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
BITFUSE_INLINE void store_bfloat(uint16_t* p, Vf a) {
  Vi u = as_dwords(a);
  Vi odd = _mm256_and_si256(shift_right<16>(u), _mm256_set1_epi32(1));
  Vi rounded = shift_right<16>(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
  rounded =
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), as_dwords(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) { return _mm256_mullo_epi32(a, b); }
BITFUSE_INLINE Vi and_dwords(Vi a, Vi b) { return _mm256_and_si256(a, b); }
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b) { return _mm256_xor_si256(a, b); }
BITFUSE_INLINE Vi lane_numbers() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value) {
  return _mm256_and_ps(as_float(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a)), value);
}

template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a) {
  return _mm256_slli_epi32(a, Bits);
}
BITFUSE_INLINE Vf div(Vf a, Vf b) { return _mm256_div_ps(a, b); }
BITFUSE_INLINE Vf square_root(Vf a) { return _mm256_sqrt_ps(a); }
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return _mm256_min_ps(a, b); }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return _mm256_max_ps(a, b); }
BITFUSE_INLINE Vf absolute(Vf a) { return _mm256_andnot_ps(set1(-0.0f), a); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) { return _mm256_blendv_ps(a, b, sign); }
BITFUSE_INLINE float sum(Vf a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

BITFUSE_INLINE void transpose(Vi (&a)[8]) {
  Vi b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = b[i];
}

}  // namespace bitfuse::BITFUSE_ISA

#include "cpu/isa/fallbacks.h"
