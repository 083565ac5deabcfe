// The vector type of one ISA level: kLanes floats or dwords, and the few operations that the kernels need.
//
// Every csrc/cpu/*.cpp is compiled once per level; what is here lies in that level's namespace, so no
// function of a wide level can be picked by the linker for a narrow one. Operations have the same meaning at
// every level: Vf holds floats, Vi dwords. The portable level uses GCC's vector extension, 4 lanes, which any
// machine has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(BITFUSE_ISA)
#error "compile with -DBITFUSE_ISA=portable, avx2, avx512 or avx512bf16"
#endif

#define BITFUSE_INLINE inline __attribute__((always_inline))

namespace bitfuse::BITFUSE_ISA {

BITFUSE_INLINE float bfloat_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

#if defined(__AVX512F__)

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
// Lane i of the result is lane index[i] of a.
BITFUSE_INLINE Vf permute(Vf a, Vi index) { return _mm512_permutexvar_ps(index, a); }

// Sixteen floats, looked up by the low 4 bits of each dword; the bits above them are ignored.
struct Table16 {
  Vf values;
  explicit Table16(const float* p) : values(_mm512_loadu_ps(p)) {}
  BITFUSE_INLINE Vf operator[](Vi code) const { return _mm512_permutexvar_ps(code, values); }
  BITFUSE_INLINE void subtract(float zero) { values = sub(values, set1(zero)); }
};

// The code in byte Byte of each dword, as a float less zero. The byte lands in the mantissa of 2^23, whose
// last place is 1, so c - zero is exact: one and-or and one subtraction instead of and, convert, subtract.
template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero) {
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // (a & b) | c
  Vi bits = _mm512_ternarylogic_epi32(shift_right<8 * Byte>(a), _mm512_set1_epi32(0xff),
                                      _mm512_set1_epi32(0x4b000000), kAndOr);
  return sub(as_float(bits), add(zero, set1(8388608.0f)));
}

// e4m3fn as fp16: sign, the exponent's 4 bits one place lower, 3 of mantissa. It reads 2^-8 too small, and
// fp16 conversion reaches e4m3's subnormals as normal numbers, whatever DAZ says. Codes 0x7f and 0xff, which
// are NaN, come out as
// +-480: callers ask `nan_lanes`.
constexpr float kE4m3Unit = 256;

// The number in byte Byte of each dword.
template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a) {
  Vi top = Byte == 0 ? _mm512_slli_epi32(a, 8) : shift_right<8 * (Byte > 0 ? Byte - 1 : 0)>(a);
  __m256i half = _mm512_cvtepi32_epi16(_mm512_srai_epi16(top, 1));
  half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return mul(_mm512_cvtph_ps(half), set1(kE4m3Unit));
}
// The number of byte `Step % 2 + 2 * i + Step / 2 * 2 * kLanes` in lane i, over kE4m3Unit: words need no
// packing.
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
// NaN in the lanes whose dword has a byte that is NaN, 0 in the others.
BITFUSE_INLINE Vf nan_lanes(Vi a) {
  Vi bytes = _mm512_maskz_set1_epi8(nan_bytes(a), -1);
  return as_float(_mm512_maskz_set1_epi32(_mm512_test_epi32_mask(bytes, bytes), 0x7fc00000));
}

// Dword i of the result holds 4-bit code i of the 8 bytes at p in its low 4 bits.
BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p) {
  int32_t low, high;
  std::memcpy(&low, p, 4);
  std::memcpy(&high, p + 4, 4);
  Vi both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  return _mm512_srlv_epi32(both, _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0));
}
// Dword i of the result is byte i at p.
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// low in the first 8 lanes, high in the others.
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

// The first `count` < kLanes elements at p, then zeros: nothing past them is touched.
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
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b) { return _mm512_xor_si512(a, b); }
// 0, 1, 2, ...
BITFUSE_INLINE Vi lane_numbers() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
// value where a >= b as unsigned numbers, 0 elsewhere.
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(a, b), value);
}

BITFUSE_INLINE Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
// The smaller and the larger; b where either is NaN.
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return _mm512_min_ps(a, b); }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return _mm512_max_ps(a, b); }
BITFUSE_INLINE Vf absolute(Vf a) { return _mm512_abs_ps(a); }
// a in the lanes where sign has none, b where it is negative.
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) {
  return _mm512_mask_mov_ps(a, _mm512_movepi32_mask(as_dwords(sign)), b);
}
template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a) {
  return _mm512_slli_epi32(a, Bits);
}
// p * 2^n, for whole n from -2^22 to 2^22; rounded once, to 0 and to infinity too.
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n) { return _mm512_scalef_ps(p, n); }

BITFUSE_INLINE float sum(Vf a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

// a[i] lane j <- a[j] lane i.
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

#elif defined(__AVX2__)

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

constexpr float kE4m3Unit = 256;

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

BITFUSE_INLINE Vf load_first(const float* p, int count) {
  float buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 4);
  return load(buffer);
}
BITFUSE_INLINE Vf load_half_first(const uint16_t* p, int count) {
  uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 2);
  return load_half(buffer);
}
BITFUSE_INLINE Vf load_bfloat_first(const uint16_t* p, int count) {
  uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 2);
  return load_bfloat(buffer);
}

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) { return _mm256_mullo_epi32(a, b); }
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
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return _mm256_min_ps(a, b); }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return _mm256_max_ps(a, b); }
BITFUSE_INLINE Vf absolute(Vf a) { return _mm256_andnot_ps(set1(-0.0f), a); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) { return _mm256_blendv_ps(a, b, sign); }
// 2^n for whole n from -126 to 127: n as the low bits of n + 1.5 * 2^23, moved to the exponent.
BITFUSE_INLINE Vf power_of_two(Vf n) {
  const Vi bits = as_dwords(add(n, set1(12582912.0f)));
  return as_float(add_dwords(shift_left<23>(bits), set1_dwords(0x3f800000)));
}
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n) {
  const Vf magic =
      set1(12582912.0f);  // half of n, a whole number; n is clamped to where both halves are normal
  n = minimum(set1(252), maximum(set1(-252), n));
  const Vf half = sub(add(mul(n, set1(0.5f)), magic), magic);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

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

#else

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

constexpr float kE4m3Unit = 256;

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

BITFUSE_INLINE Vf load_first(const float* p, int count) {
  float buffer[4] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 4);
  return load(buffer);
}
BITFUSE_INLINE Vf load_half_first(const uint16_t* p, int count) {
  uint16_t buffer[4] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 2);
  return load_half(buffer);
}
BITFUSE_INLINE Vf load_bfloat_first(const uint16_t* p, int count) {
  uint16_t buffer[4] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * 2);
  return load_bfloat(buffer);
}

BITFUSE_INLINE Vi set1_dwords(uint32_t a) { return Vi{} + static_cast<int32_t>(a); }
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) + reinterpret_cast<Vu>(b));
}
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b) {
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(a) * reinterpret_cast<Vu>(b));
}
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
BITFUSE_INLINE Vf minimum(Vf a, Vf b) { return a < b ? a : b; }
BITFUSE_INLINE Vf maximum(Vf a, Vf b) { return a > b ? a : b; }
BITFUSE_INLINE Vf absolute(Vf a) { return as_float(as_dwords(a) & 0x7fffffff); }
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b) { return as_dwords(sign) < 0 ? b : a; }
BITFUSE_INLINE Vf power_of_two(Vf n) {
  const Vi bits = as_dwords(add(n, set1(12582912.0f)));
  return as_float(add_dwords(shift_left<23>(bits), set1_dwords(0x3f800000)));
}
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n) {
  const Vf magic =
      set1(12582912.0f);  // half of n, a whole number; n is clamped to where both halves are normal
  n = minimum(set1(252), maximum(set1(-252), n));
  const Vf half = sub(add(mul(n, set1(0.5f)), magic), magic);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

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

#endif

}  // namespace bitfuse::BITFUSE_ISA
