// What a few-bit code is worth, a vector of codes at a time.
//
// Codes are read a chunk to a lane: Chunk<Bits>, a row a width, says how many codes and bytes that is and how
// they come to lie in a dword. A code type says what they are worth: code J of each chunk (J < kCodes), the
// J-th in k order, is value<J>(dwords, zero), less the zero point, in every lane. Where W is decoded once for
// many rows of x, narrow codes are widened to 4 bits first, so that only few_rows.h is compiled for each width.
#pragma once

#include "cpu/isa/contract.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse::BITFUSE_ISA {

// kCodes codes of Bits bits are the kBytes bytes of a chunk; a group is whole chunks. load: those from p on, a
// chunk to a dword; its low word has the first half of them and its high word the others, code J at bit
// kBit<J>, and what is not a code's is not said. natural: kLanes codes that lie one after the other at p, each
// in the low bits of its dword.
template <int Bits>
struct Chunk {
  static constexpr int kBits = Bits, kCodes = 8, kBytes = Bits;
  static BITFUSE_INLINE Vi load(const uint8_t* p) { return load_halves<Bits>(p); }
};
template <>
struct Chunk<4> {
  static constexpr int kBits = 4, kCodes = 8, kBytes = 4;
  static BITFUSE_INLINE Vi load(const uint8_t* p) { return load_dwords(p); }
  static BITFUSE_INLINE Vi natural(const uint8_t* p) { return spread_nibbles(p); }
};
template <>
struct Chunk<8> {
  static constexpr int kBits = 8, kCodes = 4, kBytes = 4;
  static BITFUSE_INLINE Vi load(const uint8_t* p) { return load_dwords(p); }
  static BITFUSE_INLINE Vi natural(const uint8_t* p) { return spread_bytes(p); }
};

// A chunk of narrower codes in the form of Chunk<4>.
template <int Bits>
struct WidenedChunk {
  static constexpr int kBytes = Bits;
  static BITFUSE_INLINE Vi load(const uint8_t* p) {
    constexpr uint32_t kCode = ((1u << Bits) - 1) * 0x10001;
    const Vi narrow = Chunk<Bits>::load(p);
    const Vi a = and_dwords(narrow, set1_dwords(kCode));
    const Vi b = and_dwords(shift_left<4 - Bits>(narrow), set1_dwords(kCode << 4));
    const Vi c = and_dwords(shift_left<2 * (4 - Bits)>(narrow), set1_dwords(kCode << 8));
    const Vi d = and_dwords(shift_left<3 * (4 - Bits)>(narrow), set1_dwords(kCode << 12));
    return xor_dwords(xor_dwords(a, b), xor_dwords(c, d));
  }
};
// f(chunk) with what reads codes of so many bits in the form of Code's own.
template <class Code, class F>
BITFUSE_INLINE void with_chunk(int bits, F f) {
  if constexpr (Code::kBits == 4) {
    if (bits == 3) return f(WidenedChunk<3>{});
    if (bits == 2) return f(WidenedChunk<2>{});
  }
  f(Chunk<Code::kBits>{});
}

template <class Code>
BITFUSE_INLINE constexpr int64_t code_bytes(int64_t codes) {
  return codes * Code::kBits / 8;
}

// The first `count` < kLanes chunks at p, then zeros: nothing past them is touched.
template <class Chunk>
BITFUSE_INLINE Vi load_chunks(const uint8_t* p, int64_t count) {
  if constexpr (Chunk::kBytes == 4) {
    return load_bytes(p, 4 * count);
  } else {
    uint8_t buffer[kLanes * Chunk::kBytes] = {};
    std::memcpy(buffer, p, size_t(count * Chunk::kBytes));
    return Chunk::load(buffer);
  }
}

// Where code J begins in a dword.
template <class Code, int J>
constexpr int kBit = J / (Code::kCodes / 2) * 16 + J % (Code::kCodes / 2) * Code::kBits;

// Any format below 8 bits: w.values of 4 bits, of which a code is the low ones. Integer formats are the table
// 0, 1, ... less their zero point.
template <int Bits, bool Zeros>
struct TableCode : Chunk<Bits> {
  static constexpr bool kZeros = Zeros, kNans = false;
  static constexpr bool kFloatsInTiles = true, kPairsInTiles = true;
  Table16 table;

  explicit TableCode(const LowBitMatrix& w) : table(w.values) {
    if (!Zeros) table.subtract(float(w.zero_point));
  }
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf zero) const {
    Vf v = table[shift_right<kBit<Chunk<Bits>, J>>(dwords)];
    return Zeros ? sub(v, zero) : v;
  }
};

// Unsigned 8-bit integers; without stored zero points `zero` is the format's own in every lane.
template <bool Zeros>
struct ByteCode : Chunk<8> {
  static constexpr bool kZeros = Zeros, kNans = false;
  static constexpr bool kFloatsInTiles = true, kPairsInTiles = false;
  Vf zero_point;

  explicit ByteCode(const LowBitMatrix& w) : zero_point(set1(float(w.zero_point))) {}
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf zero) const {
    return byte_less<J>(dwords, Zeros ? zero : zero_point);
  }
};

// FP8. Its NaN costs nothing in value(): who decodes adds nan_lanes where kNans says that there can be some.
struct E4m3Code : Chunk<8> {
  static constexpr bool kZeros = false, kNans = true;
  static constexpr bool kFloatsInTiles = false, kPairsInTiles = false;

  explicit E4m3Code(const LowBitMatrix&) {}
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf) const {
    return byte_e4m3<J>(dwords);
  }
};

// Calls f(code) with the code type of a matrix, that of 4 bits for narrower ones.
template <class F>
void with_code(const LowBitMatrix& w, F f) {
  const bool zeros = w.zeros || w.offsets;
  if (w.code_kind == CodeKind::kE4m3) return f(E4m3Code(w));
  if (bits_of(w.code_kind) == 8) return zeros ? f(ByteCode<true>(w)) : f(ByteCode<false>(w));
  return zeros ? f(TableCode<4, true>(w)) : f(TableCode<4, false>(w));
}

// f(constant<0>), ..., f(constant<Count - 1>), unrolled.
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <int Count, int I = 0, class F>
BITFUSE_INLINE void unrolled(F&& f) {
  if constexpr (I < Count) {
    f(Constant<I>{});
    unrolled<Count, I + 1>(f);
  }
}

#if BITFUSE_PAIRS

// Pairs of codes as pairs of bfloat16, the operand of vdpbf16ps: dword lane i holds code J in its low word
// and code J + kCodes / 2 in its high word. That order costs nothing here (one shift serves both words)
// and x is put into it once a call.
//
// Where every value is a bfloat16 (integers to 8 bits, FP8), the pair is exact and the scale is left to the
// accumulators; else (NF4) the scale is folded in float32 and the product rounded, as in a dense bfloat16
// weight.

template <class Code>
struct ExactPairs {
  Code code;
  explicit ExactPairs(const LowBitMatrix& w) : code(w) {}
  template <int J>
  BITFUSE_INLINE Vi pair(Vi dwords, Vf zero) const {
    return pair_of_exact(code.template value<J>(dwords, zero),
                         code.template value<J + Code::kCodes / 2>(dwords, zero));
  }
};

// vpermw looks up 32 words by 5 bits. With the values again and again in the table the bits above a code, the
// next one's, do not matter: a shift and a permute make 32 weights. With zero points the five bits are code -
// zero, two's complement, and the table holds -16..15.
template <int Bits, bool Zeros>
struct ExactPairs<TableCode<Bits, Zeros>> {
  Vi table;

  explicit ExactPairs(const LowBitMatrix& w) {
    alignas(64) uint16_t words[32];
    for (int i = 0; i < 32; ++i) {
      float v = Zeros ? float(i < 16 ? i : i - 32) : w.values[i & 15] - float(w.zero_point);
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      words[i] = uint16_t(bits >> 16);
    }
    table = load_dwords(words);
  }
  template <int J>
  BITFUSE_INLINE Vi pair(Vi dwords, Vf zero) const {
    Vi index = shift_right<Bits * J>(dwords);
    if constexpr (Zeros)
      index = sub_words(and_dwords(index, set1_dwords(((1u << Bits) - 1) * 0x10001)), in_both_words(zero));
    return permute_words(table, index);
  }
};

template <>
struct ExactPairs<E4m3Code> {
  E4m3Pairs pairs;
  explicit ExactPairs(const LowBitMatrix&) {}
  template <int J>
  BITFUSE_INLINE Vi pair(Vi dwords, Vf) const {
    return pairs.pair<J>(dwords);
  }
};

// Of a value less the format's zero point, or any whole one.
inline bool values_are_bfloat16(const LowBitMatrix& w) {
  if (bits_of(w.code_kind) == 8) return true;
  for (int i = 0; i < 16; ++i) {
    float v = w.values[i] - float(w.zero_point);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (bits & 0xffff) return false;
  }
  return true;
}

#endif

// How x meets a decoded vector: one step takes one code of each dword (two, as pairs), and a dword has kSteps
// of them.
//
// Offsets: weight has none in it. What is left of one beside the format's zero point is times the sum of x
// taken off.
template <class CodeType, bool Offsets = false>
struct FloatSteps {
  using Code = CodeType;
  using Element = float;  // of x, kSteps to a dword of codes
  using Vector = Vf;
  static constexpr int kSteps = Code::kCodes;
  static constexpr float kUnit = 1;  // sums of weight * x times this are the product
  static constexpr bool kOffsets = Offsets;
  Code code;
  explicit FloatSteps(const LowBitMatrix& w) : code(w) {}
  static constexpr int column(int step, int lane) {
    return lane * Code::kCodes + step;
  }  // of a block's codes
  template <int J>
  BITFUSE_INLINE Vf weight(Vi dwords, Vf zero) const {
    return code.template value<J>(dwords, zero);
  }
  static BITFUSE_INLINE Vf load_x(const float* x) { return load(x); }
  static BITFUSE_INLINE Vf broadcast(const float* x) { return set1(*x); }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vf weight, Vf x) { return fma(weight, x, sum); }
};

// FP8 in the order that costs least, where all lanes of a block share a scale.
struct E4m3ByteSteps : FloatSteps<E4m3Code> {
  using FloatSteps<E4m3Code>::FloatSteps;
  static constexpr float kUnit = kE4m3Unit;
  static constexpr int column(int step, int lane) { return step % 2 + 2 * lane + step / 2 * 2 * kLanes; }
  template <int J>
  BITFUSE_INLINE Vf weight(Vi dwords, Vf) const {
    return bytes_e4m3<J>(dwords);
  }
};

#if BITFUSE_PAIRS
template <class CodeType, bool Offsets = false>
struct PairSteps {
  using Code = CodeType;
  using Element = uint32_t;
  using Vector = Vi;
  static constexpr int kSteps = Code::kCodes / 2;
  static constexpr float kUnit = 1;
  static constexpr bool kOffsets = Offsets;
  ExactPairs<Code> code;
  explicit PairSteps(const LowBitMatrix& w) : code(w) {}
  static constexpr int column(int step, int lane) {
    return lane * Code::kCodes + step;
  }  // and kSteps further
  template <int J>
  BITFUSE_INLINE Vi weight(Vi dwords, Vf zero) const {
    return code.template pair<J>(dwords, zero);
  }
  static BITFUSE_INLINE Vi load_x(const uint32_t* x) { return load_dwords(x); }
  static BITFUSE_INLINE Vi broadcast(const uint32_t* x) { return set1_dwords(*x); }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vi weight, Vi x) { return dot_pairs(sum, weight, x); }
};
#endif

}  // namespace bitfuse::BITFUSE_ISA
