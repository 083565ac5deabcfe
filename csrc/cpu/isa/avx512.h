// AVX-512 (F, BW, DQ, VL): 16 lanes.
#pragma once

#include <immintrin.h>

#include "cpu/isa/scalar.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kLanes = 16;
using Vf = __m512;
using Vi = __m512i;

BITFUSE_INLINE Vf zero() { return _mm512_setzero_ps(); }
BITFUSE_INLINE Vf set1(float a) { return _mm512_set1_ps(a); }
BITFUSE_INLINE Vf load(const float* p) { return _mm512_loadu_ps(p); }
BITFUSE_INLINE void store(float* p, Vf a) { _mm512_storeu_ps(p, a); }
BITFUSE_INLINE Vf add(Vf a, Vf b) { return _mm512_add_ps(a, b); }
BITFUSE_INLINE Vf sub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
BITFUSE_INLINE Vf mul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
BITFUSE_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }

BITFUSE_INLINE Vi load_dwords(const void* p) { return _mm512_loadu_si512(p); }
BITFUSE_INLINE void store_dwords(void* p, Vi a) { _mm512_storeu_si512(p, a); }
template <int Bits>
BITFUSE_INLINE Vi shift_right(Vi a) {
  return Bits == 0 ? a : _mm512_srli_epi32(a, Bits);
}
BITFUSE_INLINE Vf as_float(Vi a) { return _mm512_castsi512_ps(a); }
BITFUSE_INLINE Vi as_dwords(Vf a) { return _mm512_castps_si512(a); }
BITFUSE_INLINE Vf permute(Vf a, Vi index) { return _mm512_permutexvar_ps(index, a); }

struct Table16 {
  Vf values;
  explicit Table16(const float* p) : values(_mm512_loadu_ps(p)) {}
  BITFUSE_INLINE Vf operator[](Vi code) const { return _mm512_permutexvar_ps(code, values); }
  BITFUSE_INLINE void subtract(float zero) { values = sub(values, set1(zero)); }
};

// The byte lands in the mantissa of 2^23, whose
// last place is 1, so c - zero is exact: one and-or and one subtraction instead of and, convert, subtract.
template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero) {
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // (a & b) | c
  Vi bits = _mm512_ternarylogic_epi32(shift_right<8 * Byte>(a), _mm512_set1_epi32(0xff),
                                      _mm512_set1_epi32(0x4b000000), kAndOr);
  return sub(as_float(bits), add(zero, set1(8388608.0f)));
}

// e4m3fn as fp16: sign, the exponent's 4 bits one place lower, 3 of mantissa. It reads 2^-8 too small, and
// fp16 conversion reaches e4m3's subnormals as normal numbers, whatever DAZ says.
template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a) {
  Vi top = Byte == 0 ? _mm512_slli_epi32(a, 8) : shift_right<8 * (Byte > 0 ? Byte - 1 : 0)>(a);
  __m256i half = _mm512_cvtepi32_epi16(_mm512_srai_epi16(top, 1));
  half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return mul(_mm512_cvtph_ps(half), set1(kE4m3Unit));
}
template <int Step>
BITFUSE_INLINE Vf bytes_e4m3(Vi a) {
  Vi half = _mm512_and_si512(_mm512_srai_epi16(Step % 2 ? a : _mm512_slli_epi16(a, 8), 1),
                             _mm512_set1_epi16(static_cast<short>(0xbf80)));
  return _mm512_cvtph_ps(Step < 2 ? _mm512_castsi512_si256(half) : _mm512_extracti64x4_epi64(half, 1));
}
BITFUSE_INLINE __mmask64 nan_bytes(Vi a) {
  const Vi ones = _mm512_set1_epi8(-1);
  return _mm512_cmpeq_epi8_mask(_mm512_or_si512(a, _mm512_set1_epi8(static_cast<char>(0x80))), ones);
}
BITFUSE_INLINE bool any_nan(Vi a) { return nan_bytes(a) != 0; }
BITFUSE_INLINE Vf nan_lanes(Vi a) {
  Vi bytes = _mm512_maskz_set1_epi8(nan_bytes(a), -1);
  return as_float(_mm512_maskz_set1_epi32(_mm512_test_epi32_mask(bytes, bytes), 0x7fc00000));
}

BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p) {
  int32_t low, high;
  std::memcpy(&low, p, 4);
  std::memcpy(&high, p + 4, 4);
  Vi both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  return _mm512_srlv_epi32(both, _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0));
}
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 3 bytes: 12 of them go to each quarter of the vector, and from there bytes 0 1 1 2 to a dword.
template <int Bytes>
BITFUSE_INLINE Vi load_halves(const void* p) {
  if constexpr (Bytes == 2) return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  const Vi quarters = _mm512_set_epi32(11, 11, 10, 9, 8, 8, 7, 6, 5, 5, 4, 3, 2, 2, 1, 0);
  const Vi bytes = _mm512_broadcast_i32x4(_mm_set_epi8(11, 10, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1, 0));
  const Vi all = _mm512_permutexvar_epi32(quarters, _mm512_maskz_loadu_epi32(0xfff, p));
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(all, bytes), _mm512_set1_epi32(4 << 16));
}
BITFUSE_INLINE Vf set_halves(float low, float high) {
  return _mm512_mask_mov_ps(set1(low), 0xff00, set1(high));
}

BITFUSE_INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
BITFUSE_INLINE Vf load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BITFUSE_INLINE Vf load_bfloat(const uint16_t* p) {
  return as_float(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
BITFUSE_INLINE void store_half(uint16_t* p, Vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
BITFUSE_INLINE void store_bfloat(uint16_t* p, Vf a) {
  Vi u = as_dwords(a);
  Vi odd = _mm512_and_si512(shift_right<16>(u), _mm512_set1_epi32(1));
  Vi rounded = shift_right<16>(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

BITFUSE_INLINE Vi load_bytes(const void* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8((uint64_t(1) << bytes) - 1, p);
}
BITFUSE_INLINE Vf load_first(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
BITFUSE_INLINE Vf load_half_first(const uint16_t* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
}
BITFUSE_INLINE Vf load_bfloat_first(const uint16_t* p, int count) {
  const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) { return _mm512_mullo_epi32(a, b); }
BITFUSE_INLINE Vi and_dwords(Vi a, Vi b) { return _mm512_and_si512(a, b); }
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b) { return _mm512_xor_si512(a, b); }
BITFUSE_INLINE Vi lane_numbers() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(a, b), value);
}

BITFUSE_INLINE Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
BITFUSE_INLINE Vf square_root(Vf a) { return _mm512_sqrt_ps(a); }
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return _mm512_min_ps(a, b); }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return _mm512_max_ps(a, b); }
BITFUSE_INLINE Vf absolute(Vf a) { return _mm512_abs_ps(a); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) {
  return _mm512_mask_mov_ps(a, _mm512_movepi32_mask(as_dwords(sign)), b);
}
template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a) {
  return _mm512_slli_epi32(a, Bits);
}
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n) { return _mm512_scalef_ps(p, n); }

BITFUSE_INLINE float sum(Vf a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

BITFUSE_INLINE float largest_lane(Vf a) { return _mm512_reduce_max_ps(a); }

BITFUSE_INLINE Vf lane_sums(Vf (&a)[kLanes]) {
  Vf b[8], c[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    b[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = add(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
               _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
}

BITFUSE_INLINE void transpose(Vi (&a)[16]) {
  Vi b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
}

}  // namespace bitfuse::BITFUSE_ISA
