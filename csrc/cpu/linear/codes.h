// What a few-bit code is worth, a vector of codes at a time.
//
// A code type reads dwords of packed codes. Code J of a dword (J < kPerDword) is the J-th in k order, and
// value<J>(dwords, zero) is its value less the zero point, in every lane. `natural` reads codes that lie one
// after the other into lanes one after the other, where value<0> finds them. A new format is one more struct
// like these.
#pragma once

#include "cpu/isa/contract.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse::BITFUSE_ISA {

// Any 4-bit format: 16 values. Integer formats are the table 0..15 less their zero point.
template <bool Zeros>
struct NibbleCode {
  static constexpr int kBits = 4, kPerDword = 8;
  static constexpr bool kZeros = Zeros, kNans = false;
  static constexpr bool kFloatsInTiles = true, kPairsInTiles = true;
  Table16 table;

  explicit NibbleCode(const LowBitMatrix& w) : table(w.values) {
    if (!Zeros) table.subtract(float(w.zero_point));
  }
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf zero) const {
    Vf v = table[shift_right<4 * J>(dwords)];
    return Zeros ? sub(v, zero) : v;
  }
  static BITFUSE_INLINE Vi natural(const uint8_t* p) { return spread_nibbles(p); }
};

// Unsigned 8-bit integers; without stored zero points `zero` is the format's own in every lane.
template <bool Zeros>
struct ByteCode {
  static constexpr int kBits = 8, kPerDword = 4;
  static constexpr bool kZeros = Zeros, kNans = false;
  static constexpr bool kFloatsInTiles = true, kPairsInTiles = false;
  Vf zero_point;

  explicit ByteCode(const LowBitMatrix& w) : zero_point(set1(float(w.zero_point))) {}
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf zero) const {
    return byte_less<J>(dwords, Zeros ? zero : zero_point);
  }
  static BITFUSE_INLINE Vi natural(const uint8_t* p) { return spread_bytes(p); }
};

// FP8. Its NaN costs nothing in value(): who decodes adds nan_lanes where kNans says that there can be some.
struct E4m3Code {
  static constexpr int kBits = 8, kPerDword = 4;
  static constexpr bool kZeros = false, kNans = true;
  static constexpr bool kFloatsInTiles = false, kPairsInTiles = false;

  explicit E4m3Code(const LowBitMatrix&) {}
  template <int J>
  BITFUSE_INLINE Vf value(Vi dwords, Vf) const {
    return byte_e4m3<J>(dwords);
  }
  static BITFUSE_INLINE Vi natural(const uint8_t* p) { return spread_bytes(p); }
};

// Calls f(code) with the code type of a matrix.
template <class F>
void with_code(const LowBitMatrix& w, F f) {
  switch (w.code_kind) {
    case CodeKind::kInt4:
    case CodeKind::kCodebook4:
      return w.zeros || w.offsets ? f(NibbleCode<true>(w)) : f(NibbleCode<false>(w));
    case CodeKind::kInt8:
      return w.zeros ? f(ByteCode<true>(w)) : f(ByteCode<false>(w));
    case CodeKind::kE4m3:
      return f(E4m3Code(w));
  }
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

template <class Code>
BITFUSE_INLINE constexpr int64_t code_bytes(int64_t codes) {
  return codes * Code::kBits / 8;
}

#if BITFUSE_PAIRS

// Pairs of codes as pairs of bfloat16, the operand of vdpbf16ps: dword lane i holds code J in its low word
// and code J + kPerDword / 2 in its high word. That order costs nothing here (one shift serves both words)
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
                         code.template value<J + Code::kPerDword / 2>(dwords, zero));
  }
};

// vpermw looks up 32 words by 5 bits. With the 16 values twice in the table the fifth bit, the next code's
// lowest, does not matter: a shift and a permute make 32 weights. With zero points the five bits are code -
// zero, two's complement, and the table holds -16..15.
template <bool Zeros>
struct ExactPairs<NibbleCode<Zeros>> {
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
    Vi index = shift_right<4 * J>(dwords);
    if constexpr (Zeros) index = sub_words(and_dwords(index, set1_dwords(0x000f000f)), in_both_words(zero));
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

inline bool values_are_bfloat16(const LowBitMatrix& w) {
  if (w.offsets) return false;  // zero points are no integers
  if (bits_of(w.code_kind) != 4) return true;
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
template <class CodeType>
struct FloatSteps {
  using Code = CodeType;
  using Element = float;  // of x, kSteps to a dword of codes
  using Vector = Vf;
  static constexpr int kSteps = Code::kPerDword;
  static constexpr float kUnit = 1;  // sums of weight * x times this are the product
  Code code;
  explicit FloatSteps(const LowBitMatrix& w) : code(w) {}
  static constexpr int column(int step, int lane) {
    return lane * Code::kPerDword + step;
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
template <class CodeType>
struct PairSteps {
  using Code = CodeType;
  using Element = uint32_t;
  using Vector = Vi;
  static constexpr int kSteps = Code::kPerDword / 2;
  static constexpr float kUnit = 1;
  ExactPairs<Code> code;
  explicit PairSteps(const LowBitMatrix& w) : code(w) {}
  static constexpr int column(int step, int lane) {
    return lane * Code::kPerDword + step;
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
