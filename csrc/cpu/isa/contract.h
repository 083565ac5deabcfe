// What an instruction set gives to the kernels: each function's meaning is the same at every level, in kLanes
// lanes.
//
// Every csrc/cpu/*.cpp is compiled once a level (levels.h), with BITFUSE_ISA its name: the header of that
// name gives the types and defines the functions that are declared here; fallbacks.h has some of them in
// terms of others. All of it lies in the level's namespace and is inlined, so that no function of a wide
// level can be picked by the linker for a narrow one. No other folder names an instruction.
//
//     kLanes     floats, or dwords, in a vector
//     Vf, Vi     a vector of floats; of dwords, or of words where a function says so
//     Table16    sixteen floats at p: table[codes] looks them up by the low 4 bits of each dword, whatever
//                the bits above say; subtract(zero) takes a number from all of them
//
// A lane is "first", "low", where its address is low. Rounding is to nearest, ties to even; fma rounds once
// where the machine can. A NaN stays one; which one is not said. tests/cpu/isa_contract.cpp checks each
// function against plain C++.
#pragma once

#include "cpu/isa/scalar.h"

#if !defined(BITFUSE_ISA)
#error "compile with -DBITFUSE_ISA= and a level of cpu/isa/levels.h"
#endif

// of this folder: "avx2.h" at the level avx2
#define BITFUSE_STRING(text) #text
#define BITFUSE_HEADER(level) BITFUSE_STRING(level.h)
#include BITFUSE_HEADER(BITFUSE_ISA)
#undef BITFUSE_HEADER
#undef BITFUSE_STRING

#if !defined(BITFUSE_PAIRS)
#define BITFUSE_PAIRS 0  // 1 where the second half of this file is there too
#endif

namespace bitfuse::BITFUSE_ISA {

// Floats.

BITFUSE_INLINE Vf zero();
BITFUSE_INLINE Vf set1(float a);
BITFUSE_INLINE Vf load(const float* p);
BITFUSE_INLINE void store(float* p, Vf a);
BITFUSE_INLINE Vf add(Vf a, Vf b);
BITFUSE_INLINE Vf sub(Vf a, Vf b);
BITFUSE_INLINE Vf mul(Vf a, Vf b);
BITFUSE_INLINE Vf fma(Vf a, Vf b, Vf c);  // a * b + c
BITFUSE_INLINE Vf div(Vf a, Vf b);
BITFUSE_INLINE Vf square_root(Vf a);
// The smaller and the larger; b where either is NaN.
BITFUSE_INLINE Vf minimum(Vf a, Vf b);
BITFUSE_INLINE Vf maximum(Vf a, Vf b);
BITFUSE_INLINE Vf absolute(Vf a);
// a in the lanes where sign has none, b where it is negative (-0 is).
BITFUSE_INLINE Vf by_sign(Vf sign, Vf a, Vf b);
// p * 2^n, rounded once, for p from 1/2 to 2 and whole n from -2^22 to 2^22; to 0 and to infinity too.
BITFUSE_INLINE Vf scale_by_power(Vf p, Vf n);
// low in the first 8 lanes, high in the others.
BITFUSE_INLINE Vf set_halves(float low, float high);
// Lane i of the result is lane index[i] of a.
BITFUSE_INLINE Vf permute(Vf a, Vi index);
// The sum of all lanes: halves of the vector are added until one lane is left.
BITFUSE_INLINE float sum(Vf a);
// Lane i of the result: the sum of a[i].
BITFUSE_INLINE Vf lane_sums(Vf (&a)[kLanes]);
// Of lanes that are no NaN.
BITFUSE_INLINE float largest_lane(Vf a);

// Dwords.

BITFUSE_INLINE Vi set1_dwords(uint32_t a);
BITFUSE_INLINE Vi load_dwords(const void* p);
BITFUSE_INLINE void store_dwords(void* p, Vi a);
// The first `bytes` < 4 * kLanes at p, then zeros: nothing past them is touched.
BITFUSE_INLINE Vi load_bytes(const void* p, int64_t bytes);
BITFUSE_INLINE Vi add_dwords(Vi a, Vi b);
BITFUSE_INLINE Vi mul_dwords(Vi a, Vi b);  // the low 32 bits
BITFUSE_INLINE Vi and_dwords(Vi a, Vi b);
BITFUSE_INLINE Vi xor_dwords(Vi a, Vi b);
template <int Bits>
BITFUSE_INLINE Vi shift_left(Vi a);
template <int Bits>
BITFUSE_INLINE Vi shift_right(Vi a);  // zeros come in; 0 to 31 bits
BITFUSE_INLINE Vi lane_numbers();     // 0, 1, 2, ...
// The same bits.
BITFUSE_INLINE Vf as_float(Vi a);
BITFUSE_INLINE Vi as_dwords(Vf a);
// value where a >= b as unsigned numbers, 0 elsewhere.
BITFUSE_INLINE Vf where_at_least(Vi a, Vi b, Vf value);
// a[i] lane j <- a[j] lane i.
BITFUSE_INLINE void transpose(Vi (&a)[kLanes]);

// From and to 16 bits.

BITFUSE_INLINE float half_to_float(uint16_t h);
BITFUSE_INLINE float bfloat_to_float(uint16_t h);
BITFUSE_INLINE Vf load_half(const uint16_t* p);
BITFUSE_INLINE Vf load_bfloat(const uint16_t* p);
BITFUSE_INLINE void store_half(uint16_t* p, Vf a);
BITFUSE_INLINE void store_bfloat(uint16_t* p, Vf a);
// The first `count` < kLanes elements at p, then zeros: nothing past them is touched.
BITFUSE_INLINE Vf load_first(const float* p, int count);
BITFUSE_INLINE Vf load_half_first(const uint16_t* p, int count);
BITFUSE_INLINE Vf load_bfloat_first(const uint16_t* p, int count);

// Codes.

// Dword i of the result holds 4-bit code i of the kLanes / 2 bytes at p in its low 4 bits.
BITFUSE_INLINE Vi spread_nibbles(const uint8_t* p);
// Dword i of the result is byte i at p.
BITFUSE_INLINE Vi spread_bytes(const uint8_t* p);
// Dword i of the result holds the Bytes bytes from p + Bytes * i on: the first half of their bits in its low
// word, the other half in its high word, each from the word's lowest bit on; some are above. Bytes is 2 or 3.
template <int Bytes>
BITFUSE_INLINE Vi load_halves(const void* p);
// Byte `Byte` of each dword, as a float less zero, a whole number.
template <int Byte>
BITFUSE_INLINE Vf byte_less(Vi a, Vf zero);
// The e4m3fn number of byte `Byte` of each dword. Codes 0x7f and 0xff, which are NaN, come out as some number
// of their sign: who decodes asks nan_lanes.
template <int Byte>
BITFUSE_INLINE Vf byte_e4m3(Vi a);
// The number of byte `Step % 2 + 2 * i + Step / 2 * 2 * kLanes` in lane i, over kE4m3Unit: the order that
// costs least. Step: 0 to 3.
template <int Step>
BITFUSE_INLINE Vf bytes_e4m3(Vi a);
// Whether any byte is an e4m3fn NaN.
BITFUSE_INLINE bool any_nan(Vi a);
// NaN in the lanes whose dword has such a byte, 0 in the others.
BITFUSE_INLINE Vf nan_lanes(Vi a);

#if BITFUSE_PAIRS

// Where the machine multiplies pairs of 16 bits, in 16 lanes. A word is half a dword, the first the low one;
// word j of a vector is in dword j / 2.

// Lane i: sum + the products of a's and b's bfloat16, two to a dword, in float32; subnormals are 0.
BITFUSE_INLINE Vf dot_pairs(Vf sum, Vi a, Vi b);
// Lane i: sum + the products of a's and b's int16, two to a dword.
BITFUSE_INLINE Vi dot_words(Vi sum, Vi a, Vi b);

// Lanes i of low and of high as the low and the high word of dword i, in bfloat16: `exact` where all of them
// are one (no other bit of them is set), else rounded.
BITFUSE_INLINE Vi pair_of_exact(Vf low, Vf high);
BITFUSE_INLINE Vi pair_of_rounded(Vf low, Vf high);
// Words 0 to 15: low's lanes in bfloat16, rounded; 16 to 31: high's.
BITFUSE_INLINE Vi bfloats_of(Vf low, Vf high);
// E4m3Pairs().pair<Byte>(a): bytes Byte and Byte + 2 of each dword, from e4m3fn to a pair of bfloat16; Byte
// is 0 or 1. NaN as in byte_e4m3.

BITFUSE_INLINE Vf to_floats(Vi a);
BITFUSE_INLINE Vi to_nearest(Vf a);
// a less the nearest whole number.
BITFUSE_INLINE Vf less_nearest(Vf a);
// Words 0 to 15: the whole numbers nearest to low's lanes; 16 to 31: to high's; at most 32767 in magnitude.
BITFUSE_INLINE Vi words_to_nearest(Vf low, Vf high);
// The whole number a, 0 to 32767, in both words of its dword.
BITFUSE_INLINE Vi in_both_words(Vf a);
// The larger of |a| and |b|; of lanes that are no NaN.
BITFUSE_INLINE Vf larger_magnitude(Vf a, Vf b);
// Lane i: the largest of the `size` floats from p + i * size on. size: 1, 2, 4, 8 or 16.
BITFUSE_INLINE Vf group_maxima(const float* p, int64_t size);
// Lane i of the result: the sum of a[i].
BITFUSE_INLINE Vi lane_sums(Vi (&a)[kLanes]);

BITFUSE_INLINE Vi or_dwords(Vi a, Vi b);
// b in the last 8 lanes.
BITFUSE_INLINE Vi set_high_half(Vi a, uint32_t b);
BITFUSE_INLINE Vi set1_words(uint16_t a);
BITFUSE_INLINE Vi sub_words(Vi a, Vi b);
template <int Bits>
BITFUSE_INLINE Vi shift_right_words(Vi a);  // zeros come in

// Lane i of the result is lane index[i] of a and then b, by the low 5 bits.
BITFUSE_INLINE Vf permute(Vf a, Vf b, Vi index);
// Lanes 0 to 7 of a and b, or 8 to 15, by turns.
BITFUSE_INLINE Vf interleave_low(Vf a, Vf b);
BITFUSE_INLINE Vf interleave_high(Vf a, Vf b);
// Word i of the result is word index[i] of a, by the low 5 bits of that word.
BITFUSE_INLINE Vi permute_words(Vi a, Vi index);
// Words 0, 2, ... or 1, 3, ... of a and then b.
BITFUSE_INLINE Vi even_words(Vi a, Vi b);
BITFUSE_INLINE Vi odd_words(Vi a, Vi b);
// Word i of the result is byte i of the 32 at p; of the first `bytes` < 32, then zeros.
BITFUSE_INLINE Vi spread_bytes_to_words(const void* p);
BITFUSE_INLINE Vi spread_bytes_to_words_first(const void* p, int64_t bytes);
// Dword i: word i of the 16 at a, then of those at b. `mask` has a bit for each of the 32 bytes that is
// there.
BITFUSE_INLINE Vi load_interleaved_words(const void* a, const void* b, uint32_t mask);

#endif

}  // namespace bitfuse::BITFUSE_ISA
