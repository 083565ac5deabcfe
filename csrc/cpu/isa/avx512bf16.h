// AVX-512 with BF16 and VNNI: what avx512.h has, and products of pairs of bfloat16 and of words.
#pragma once

#include "cpu/isa/avx512.h"

#define BITFUSE_PAIRS 1

namespace bitfuse::BITFUSE_ISA {

BITFUSE_INLINE Vi or_dwords(Vi a, Vi b) { return _mm512_or_si512(a, b); }
BITFUSE_INLINE Vi set1_words(uint16_t a) { return _mm512_set1_epi16(static_cast<short>(a)); }
BITFUSE_INLINE Vi sub_words(Vi a, Vi b) { return _mm512_sub_epi16(a, b); }
template <int Bits>
BITFUSE_INLINE Vi shift_right_words(Vi a) {
  return _mm512_srli_epi16(a, Bits);
}
BITFUSE_INLINE Vi set_high_half(Vi a, uint32_t b) {
  return _mm512_mask_set1_epi32(a, 0xff00, static_cast<int>(b));
}

BITFUSE_INLINE Vf to_floats(Vi a) { return _mm512_cvtepi32_ps(a); }
BITFUSE_INLINE Vi to_nearest(Vf a) { return _mm512_cvtps_epi32(a); }
BITFUSE_INLINE Vf less_nearest(Vf a) { return _mm512_reduce_ps(a, 0); }
BITFUSE_INLINE Vi words_to_nearest(Vf low, Vf high) {
  const Vi order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);  // packing goes by quarters of a vector
  return _mm512_permutexvar_epi64(order,
                                  _mm512_packs_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high)));
}
BITFUSE_INLINE Vi in_both_words(Vf a) {
  const Vi whole = _mm512_cvttps_epi32(a);
  return _mm512_or_si512(whole, _mm512_slli_epi32(whole, 16));
}
BITFUSE_INLINE Vf larger_magnitude(Vf a, Vf b) { return _mm512_range_ps(a, b, 0xb); }

BITFUSE_INLINE Vf permute(Vf a, Vf b, Vi index) { return _mm512_permutex2var_ps(a, index, b); }
BITFUSE_INLINE Vf interleave_low(Vf a, Vf b) {
  return permute(a, b, _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0));
}
BITFUSE_INLINE Vf interleave_high(Vf a, Vf b) {
  return permute(a, b, _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8));
}
BITFUSE_INLINE Vi permute_words(Vi a, Vi index) { return _mm512_permutexvar_epi16(index, a); }
BITFUSE_INLINE Vi even_words(Vi a, Vi b) {
  alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                     22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                     44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  return _mm512_permutex2var_epi16(a, load_dwords(kEven), b);
}
BITFUSE_INLINE Vi odd_words(Vi a, Vi b) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, load_dwords(kOdd), b);
}

BITFUSE_INLINE Vi spread_bytes_to_words(const void* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
BITFUSE_INLINE Vi spread_bytes_to_words_first(const void* p, int64_t bytes) {
  return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((uint32_t(1) << bytes) - 1, p));
}
BITFUSE_INLINE Vi load_interleaved_words(const void* a, const void* b, uint32_t mask) {
  const Vi order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                    6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const Vi low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, a));
  const Vi high = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, b));
  return _mm512_permutex2var_epi16(low, order, high);
}

BITFUSE_INLINE Vi bfloats_of(Vf low, Vf high) { return (Vi)_mm512_cvtne2ps_pbh(high, low); }
BITFUSE_INLINE Vi pair_of_exact(Vf low, Vf high) {
  return _mm512_or_si512(shift_right<16>(as_dwords(low)), as_dwords(high));
}
BITFUSE_INLINE Vi pair_of_rounded(Vf low, Vf high) {
  const Vi interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, bfloats_of(low, high));
}
BITFUSE_INLINE Vf dot_pairs(Vf sum, Vi a, Vi b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// By hand: of the intrinsic GCC 12 copies every accumulator before and after.
BITFUSE_INLINE Vi dot_words(Vi sum, Vi a, Vi b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
}

// In words: sign, exponent and mantissa go to their places by an arithmetic shift and one addition to the
// exponent; the eight subnormals are looked up.
struct E4m3Pairs {
  Vi subnormals;

  E4m3Pairs() {
    alignas(64) uint16_t words[32] = {};
    for (int i = 0; i < 8; ++i) {
      float v = float(i) * 0.001953125f;  // 2^-9
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      words[i] = uint16_t(bits >> 16);
    }
    subnormals = load_dwords(words);
  }
  template <int Byte>
  BITFUSE_INLINE Vi pair(Vi a) const {
    constexpr int kOrAnd = 0xf0 | (0xcc & 0xaa);  // a | (b & c)
    const Vi top = Byte == 0 ? _mm512_slli_epi16(a, 8) : a;
    const Vi bits =
        _mm512_and_si512(_mm512_srai_epi16(top, 4), _mm512_set1_epi16(static_cast<short>(0x87f0)));
    const __mmask32 subnormal = _mm512_testn_epi16_mask(bits, _mm512_set1_epi16(0x0780));
    const Vi normal = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
    const Vi value = _mm512_mask_permutexvar_epi16(normal, subnormal, _mm512_srli_epi16(bits, 4), subnormals);
    return _mm512_ternarylogic_epi32(value, bits, _mm512_set1_epi16(static_cast<short>(0x8000)), kOrAnd);
  }
};

BITFUSE_INLINE Vi lane_sums(Vi (&a)[kLanes]) {
  Vi b[8], c[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    b[i] = add_dwords(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                      _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    c[i] = add_dwords(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]),
                      _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = add_dwords(_mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0x88),
                      _mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return add_dwords(_mm512_shuffle_i32x4(b[0], b[1], 0x88), _mm512_shuffle_i32x4(b[0], b[1], 0xdd));
}

BITFUSE_INLINE Vf group_maxima(const float* from, int64_t size) {
  if (size == 1) return load(from);
  if (size == 2) {
    const Vi even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const Vi odd = add_dwords(even, set1_dwords(1));
    const Vf a = load(from), b = load(from + 16);
    return maximum(permute(a, b, even), permute(a, b, odd));
  }
  Vf part[4];  // 4 groups of 4
  for (int i = 0; i < 4; ++i, from += 4 * size) {
    if (size == 4) {
      part[i] = load(from);
      continue;
    }
    Vf half[2];  // 2 groups of 8
    for (int j = 0; j < 2; ++j) {
      const Vf a = load(from + 2 * size * j);
      if (size == 8) {
        half[j] = a;
      } else {
        const Vf b = load(from + 2 * size * j + 16);
        half[j] = maximum(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
      }
    }
    part[i] =
        maximum(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  }
  const Vf x = maximum(_mm512_unpacklo_ps(part[0], part[1]), _mm512_unpackhi_ps(part[0], part[1]));
  const Vf y = maximum(_mm512_unpacklo_ps(part[2], part[3]), _mm512_unpackhi_ps(part[2], part[3]));
  const __m512d z = _mm512_castps_pd(x), w = _mm512_castps_pd(y);
  const Vf low = _mm512_castpd_ps(_mm512_unpacklo_pd(z, w)),
           high = _mm512_castpd_ps(_mm512_unpackhi_pd(z, w));
  const Vi order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(order, maximum(low, high));
}

}  // namespace bitfuse::BITFUSE_ISA
