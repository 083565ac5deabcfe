// How rows of a KV cache become operands: K against queries, V against probabilities.
//
// A reader's block is one vector of memory (64 bytes at 16 lanes; of float16 and bfloat16 floats half of it)
// and gives kWeights vectors of operands. For K, operand J of a block meets `Element`s of the query in the
// order of column(J, lane); for V, it adds to channels channel(J, lane).
//
//     reader            element of q           a block's operands               tokens of V at once
//     DenseFloats<E>    float                  1: the row as floats             1
//     CodeFloats<C>     float                  kCodes: codes as floats       1
//     DensePairs        pair of bfloat16       1: the row                       2
//     CodePairs<C>      pair of bfloat16       kCodes / 2: codes as pairs    2
//
// Pairs of V are of two tokens: words of both rows interleaved, 16 of each (32 bytes), read as blocks are.
// What ends inside a block is read as if zeros followed.
#pragma once

#include "cpu/core/elements.h"
#include "cpu/core/threads.h"
#include "cpu/linear/codes.h"

namespace bitfuse::BITFUSE_ISA {

template <class E>
struct DenseFloats {
  using Raw = Vf;
  using Vector = Vf;
  using Acc = Vf;
  using Element = float;
  using Type = typename E::Type;
  static constexpr bool kPairs = false, kWords = false, kGrouped = false;
  static constexpr int kWeights = 1, kValueWeights = 1;
  static constexpr int64_t kBlock = kLanes, kBlockBytes = kLanes * int64_t(sizeof(Type));

  static constexpr int64_t bytes_of(int64_t channels) { return channels * int64_t(sizeof(Type)); }
  BITFUSE_INLINE Raw load_block(const char* p) const { return E::whole(reinterpret_cast<const Type*>(p)); }
  BITFUSE_INLINE Raw load_part(const char* p, int64_t channels) const {
    return E::some(reinterpret_cast<const Type*>(p), int(channels));
  }
  template <int J>
  BITFUSE_INLINE Vf weight(Raw raw) const {
    return raw;
  }
  static constexpr int column(int, int lane) { return lane; }
  static BITFUSE_INLINE Vf load_q(const float* p) { return load(p); }
  static BITFUSE_INLINE Vf accumulate(Vf acc, Vf w, Vf x) { return fma(w, x, acc); }
  static BITFUSE_INLINE Vf poison(Vf acc, Raw) { return acc; }

  // kLanes channels of V from channel c on; `left` of them are there.
  BITFUSE_INLINE Vf values(const char* row, int64_t c, int64_t left) const {
    const char* p = row + c * int64_t(sizeof(Type));
    return left >= kLanes ? load_block(p) : left > 0 ? load_part(p, left) : zero();
  }
};

// Codes less `middle`: a product of centred codes is small, and loses little when offsets are added to it.
inline LowBitMatrix centred_codes(int middle) {
  static constexpr float kValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  LowBitMatrix w{};
  w.values = kValues;
  w.code_kind = CodeKind::kCodebook4;
  w.zero_point = middle;
  return w;
}

template <class Code>
struct CodeFloats {
  using Raw = Vi;
  using Vector = Vf;
  using Acc = Vf;
  using Element = float;
  static constexpr bool kPairs = false, kWords = false, kGrouped = !Code::kNans;
  static constexpr int kWeights = Code::kCodes, kValueWeights = 1;
  static constexpr int64_t kBlock = kLanes * Code::kCodes, kBlockBytes = 4 * kLanes;
  static constexpr int kMiddle = Code::kNans ? 0 : 1 << (Code::kBits - 1);
  Code code{centred_codes(kMiddle)};

  static constexpr int64_t bytes_of(int64_t channels) { return code_bytes<Code>(channels); }
  BITFUSE_INLINE Raw load_block(const char* p) const { return load_dwords(p); }
  BITFUSE_INLINE Raw load_part(const char* p, int64_t channels) const {
    return load_bytes(p, bytes_of(channels));
  }
  template <int J>
  BITFUSE_INLINE Vf weight(Raw raw) const {
    return code.template value<J>(raw, zero());
  }
  static constexpr int column(int step, int lane) { return lane * Code::kCodes + step; }
  static BITFUSE_INLINE Vf load_q(const float* p) { return load(p); }
  static BITFUSE_INLINE Vf accumulate(Vf acc, Vf w, Vf x) { return fma(w, x, acc); }
  static BITFUSE_INLINE Vf poison(Vf acc, Raw raw) {
    if constexpr (Code::kNans) acc = add(acc, nan_lanes(raw));
    return acc;
  }

  BITFUSE_INLINE Vf values(const char* row, int64_t c, int64_t left) const {
    const auto* p = reinterpret_cast<const uint8_t*>(row) + bytes_of(c);
    if (left <= 0) return zero();
    uint8_t buffer[4 * kLanes] = {};
    if (left < kLanes) {
      std::memcpy(buffer, p, size_t(bytes_of(left)));
      p = buffer;
    }
    const Vi codes = Code::natural(p);
    Vf v = code.template value<0>(codes, zero());
    if constexpr (Code::kNans) v = add(v, nan_lanes(codes));
    return v;
  }
};

#if BITFUSE_PAIRS

// Words of lanes low and high as pairs of bfloat16, rounded.
BITFUSE_INLINE Vi pair_words(Vf low, Vf high) { return pair_of_rounded(low, high); }

// What readers of pairs share. Words: 16-bit units of a row, kWeights elements each.
template <int Weights>
struct PairRows {
  using Raw = Vi;
  using Vector = Vi;
  using Acc = Vf;
  using Element = uint32_t;
  static constexpr bool kPairs = true, kWords = false;
  static constexpr int kWeights = Weights, kValueWeights = Weights;
  static constexpr int64_t kBlock = 2 * kLanes * Weights, kBlockBytes = 64;
  static constexpr int64_t kWordChannels = 16 * Weights;  // of V that 32 bytes of a row hold

  static constexpr int64_t bytes_of(int64_t channels) { return channels * 2 / Weights; }
  BITFUSE_INLINE Raw load_block(const char* p) const { return load_dwords(p); }
  BITFUSE_INLINE Raw load_part(const char* p, int64_t channels) const {
    return load_bytes(p, bytes_of(channels));
  }
  // of the low word; the high one is kWeights further
  static constexpr int column(int step, int lane) { return lane * 2 * Weights + step; }
  static BITFUSE_INLINE Vi load_q(const uint32_t* p) { return load_dwords(p); }
  static BITFUSE_INLINE Vf accumulate(Vf acc, Vi w, Vi x) { return dot_pairs(acc, w, x); }

  static BITFUSE_INLINE Vi interleave(const char* a, const char* b, uint32_t mask) {
    return load_interleaved_words(a, b, mask);
  }
};

struct DensePairs : PairRows<1> {
  static constexpr bool kGrouped = false, kHalves = false, kNans = false;
  template <int J>
  BITFUSE_INLINE Vi weight(Raw raw) const {
    return raw;
  }
  template <int J>
  BITFUSE_INLINE Vi value_weight(Raw raw) const {
    return raw;
  }
  static BITFUSE_INLINE Vf poison(Vf acc, Raw) { return acc; }
};

struct Fp8Pairs : PairRows<2> {
  using Code = E4m3Code;
  static constexpr bool kGrouped = false, kHalves = false, kNans = true;
  ExactPairs<Code> pairs{centred_codes(0)};
  template <int J>
  BITFUSE_INLINE Vi weight(Raw raw) const {
    return pairs.template pair<J>(raw, zero());
  }
  template <int J>
  BITFUSE_INLINE Vi value_weight(Raw raw) const {
    return weight<J>(raw);
  }
  static BITFUSE_INLINE Vf poison(Vf acc, Raw raw) {
    if (any_nan(raw)) [[unlikely]]
      acc = add(acc, nan_lanes(raw));
    return acc;
  }
};

// Codes of int8 and int4 as they are, in words, against int16.
template <int Bits>
struct CodeWords {
  using Raw = Vi;
  using Vector = Vi;
  using Acc = Vi;
  using Element = uint32_t;
  static constexpr bool kPairs = true, kWords = true, kGrouped = true, kNans = false;
  // V's channels share scales in groups of 32: the lanes of a vector of int4 are of two groups
  static constexpr bool kHalves = Bits == 4;
  static constexpr int kWeights = 8 / Bits, kValueWeights = 16 / Bits, kMiddle = 0;
  static constexpr int64_t kBlock = 32 * kWeights, kBlockBytes = 32;
  static constexpr int64_t kWordChannels = 16 * kValueWeights;
  static constexpr float kMean =
      float(1 << Bits) / 2;  // of codes: what is lost of a product is taken so often

  static constexpr int64_t bytes_of(int64_t channels) { return channels * Bits / 8; }
  BITFUSE_INLINE Raw load_block(const char* p) const { return spread_bytes_to_words(p); }
  BITFUSE_INLINE Raw load_part(const char* p, int64_t channels) const {
    return spread_bytes_to_words_first(p, bytes_of(channels));
  }
  template <int J>
  BITFUSE_INLINE Vi weight(Raw raw) const {
    if constexpr (Bits == 8) return raw;
    return J ? shift_right_words<4>(raw) : and_dwords(raw, set1_words(15));
  }
  static BITFUSE_INLINE Vi load_q(const uint32_t* p) { return load_dwords(p); }
  static BITFUSE_INLINE Vi accumulate(Vi acc, Vi w, Vi x) { return dot_words(acc, w, x); }
  static BITFUSE_INLINE Vi poison(Vi acc, Raw) { return acc; }

  // Products [kBlock] times factor, magnitudes up to 32767, as words in the order of the columns. Returns
  // lost + what their rounding took.
  static BITFUSE_INLINE Vf put_q(const float* products, Vf factor, uint32_t* to, Vf lost) {
    Vi words[kWeights];
#pragma GCC unroll 2
    for (int i = 0; i < kWeights; ++i) {
      const int at = 32 * i;
      const Vf x = mul(load(products + at), factor), y = mul(load(products + at + 16), factor);
      lost = add(lost, add(less_nearest(x), less_nearest(y)));
      words[i] = words_to_nearest(x, y);
    }
    if constexpr (Bits == 8) {
      store_dwords(to, words[0]);
      return lost;
    }
    store_dwords(to, even_words(words[0], words[kWeights - 1]));
    store_dwords(to + 16, odd_words(words[0], words[kWeights - 1]));
    return lost;
  }

  // Operand J of interleaved words of V.
  template <int J>
  BITFUSE_INLINE Vi value_weight(Raw raw) const {
    if constexpr (J == kValueWeights - 1) return shift_right_words<16 - Bits>(raw);
    return and_dwords(shift_right<Bits * J>(raw), set1_words((1 << Bits) - 1));
  }
  static BITFUSE_INLINE Vi interleave(const char* a, const char* b, uint32_t mask) {
    return PairRows<1>::interleave(a, b, mask);
  }
};

#endif

}  // namespace bitfuse::BITFUSE_ISA
