// From codes to pairs of 16-bit floats in registers.
//
// A format is a struct of
//   Bits            of a code
//   TableBytes      of shared memory that `fill_table` writes once a block
//   HasNan          true when dequant8 flags codes that are NaN instead of giving a NaN
//   HasOffset       true when w = code * scale - offset: the zero point is 0
//   Zero, zero(z)   what a zero point becomes once a group
//   dequant8(words, zero, flags, pairs)
//                   8 consecutive codes of a row, low bits first, to 4 pairs in the row's order: value minus
//                   zero point, without the scale
// Integers and minifloats come out exactly; the levels of a codebook are rounded to T (see Codebook4).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace bitfuse {

template <typename T>
constexpr bool IsHalf = std::is_same_v<T, __half>;

// (word & Mask) | Bits in one instruction.
template <uint32_t Mask, uint32_t Bits>
__device__ __forceinline__ uint32_t and_or(uint32_t word) {
  constexpr uint32_t Truth = (0xf0 & 0xcc) | 0xaa;
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(word), "n"(Mask), "n"(Bits), "n"(Truth));
  return out;
}

// a * b + c on two numbers of T, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  if constexpr (IsHalf<T>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  }
  return out;
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (IsHalf<T>) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
}

// Two neighbouring numbers, or the first of them; `even`: at an even place of rows of even length, so in one
// word.
template <typename T>
__device__ __forceinline__ void store_two(T* at, float2 values, bool two, bool even) {
  const uint32_t words = pack2<T>(values.x, values.y);
  if (even) {
    *reinterpret_cast<uint32_t*>(at) = words;
  } else {
    unsigned short* const halves = reinterpret_cast<unsigned short*>(at);
    halves[0] = static_cast<unsigned short>(words);
    if (two) halves[1] = static_cast<unsigned short>(words >> 16);
  }
}

struct NoTable {
  static constexpr int TableBytes = 0;
  static constexpr bool HasNan = false;
  static constexpr bool HasOffset = false;
  static constexpr bool PairsApart = false;
};

// 4-bit integers. The code becomes the low bits of the mantissa of a power of two whose unit is 1. Two codes
// whose places in their word are 16 bits apart make a pair without a byte being moved, so x takes that order:
// see order_like_pairs.
template <typename T>
struct Int4 : NoTable {
  static constexpr int Bits = 4;
  static constexpr bool PairsApart = true;
  // float16 has room for the codes at bits 4 to 7, as 1024 + 16 code, which a multiplication by 1/16 brings
  // down to 64 + code; bfloat16 has not, there every pair is shifted down first.
  struct Zero {
    uint32_t low, high;
  };

  __device__ explicit Int4(const unsigned char*, int) {}

  __device__ static Zero zero(uint32_t z) {
    const float unit = IsHalf<T> ? 1024.0f : 128.0f;
    return {pack2<T>(-unit - z, -unit - z), IsHalf<T> ? pack2<T>(-64.0f - z, -64.0f - z) : 0};
  }

  // Pair i holds codes i and i + 4.
  __device__ static void dequant8(const uint32_t (&words)[1], Zero zero, uint32_t&, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (IsHalf<T>) {
        const uint32_t word = words[0] >> (i / 2 * 8);
        pairs[i] = i % 2 == 0 ? fma2<T>(and_or<0x000f000f, 0x64006400>(word), 0x3c003c00, zero.low)
                              : fma2<T>(and_or<0x00f000f0, 0x64006400>(word), 0x2c002c00, zero.high);
      } else {
        pairs[i] = fma2<T>(and_or<0x000f000f, 0x43004300>(words[0] >> 4 * i), 0x3f803f80, zero.low);
      }
    }
  }
};

// Eight numbers in the order of Int4's pairs: 0 4 1 5 2 6 3 7.
__device__ __forceinline__ uint4 order_like_pairs(uint4 x) {
  return {__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
          __byte_perm(x.y, x.w, 0x7632)};
}

// 4-bit codes of any 16 levels, by a table of the two levels of all 256 bytes, one copy for each lane, so
// that no two lanes meet in a bank. The caller's table has an entry for each byte and lane % 4, which lets it
// round a level up in some places and down in others: its mean is then the level itself, and no error adds up
// over k.
template <typename T>
struct Codebook4 {
  static constexpr int Bits = 4;
  static constexpr int TableBytes = 256 * 32 * 4;
  static constexpr bool HasNan = false;
  static constexpr bool HasOffset = false;
  static constexpr bool PairsApart = false;
  struct Zero {};

  const unsigned char* table;
  uint32_t lane_offset;

  __device__ explicit Codebook4(const unsigned char* table, int lane) : table(table), lane_offset(4 * lane) {}

  __device__ static Zero zero(uint32_t) { return {}; }

  // From pairs [256][4] in global memory. The caller synchronises.
  __device__ static void fill_table(unsigned char* table, const uint4* pairs, int thread, int threads) {
    for (int byte = thread; byte < 256; byte += threads) {
      const uint4 quad = __ldg(pairs + byte);
#pragma unroll
      for (int i = 0; i < 8; ++i) reinterpret_cast<uint4*>(table)[8 * byte + ((i + byte) & 7)] = quad;
    }
  }

  __device__ void dequant8(const uint32_t (&words)[1], Zero, uint32_t&, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte_at = i == 0 ? words[0] << 7 : words[0] >> (8 * i - 7);
      pairs[i] = *reinterpret_cast<const uint32_t*>(table + ((byte_at & 0x7f80) | lane_offset));
    }
  }
};

// 8-bit integers.
template <typename T>
struct Int8 : NoTable {
  static constexpr int Bits = 8;
  using Zero = std::conditional_t<IsHalf<T>, uint32_t, float>;

  __device__ explicit Int8(const unsigned char*, int) {}

  // bfloat16 has too short a mantissa for 1 + 8 bits: there the code goes through float32, as 2^23 + code.
  __device__ static Zero zero(uint32_t z) {
    if constexpr (IsHalf<T>) {
      return pack2<T>(-1024.0f - z, -1024.0f - z);
    } else {
      return -8388608.0f - z;
    }
  }

  __device__ static void dequant8(const uint32_t (&words)[2], Zero zero, uint32_t&, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[i / 2], first = 2 * (i % 2);
      if constexpr (IsHalf<T>) {
        pairs[i] = fma2<T>(__byte_perm(word, 0x64646464, 0x4140 + 0x0202 * (i % 2)), 0x3c003c00, zero);
      } else {
        const float low = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7540 + first));
        const float high = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7541 + first));
        pairs[i] = pack2<T>(low + zero, high + zero);
      }
    }
  }
};

// The same with float offsets: kernels of their own, so that the others pay nothing for them.
template <typename T>
struct Int4Offset : Int4<T> {
  static constexpr bool HasOffset = true;
  using Int4<T>::Int4;
};

template <typename T>
struct Int8Offset : Int8<T> {
  static constexpr bool HasOffset = true;
  using Int8<T>::Int8;
};

// FP8 e4m3fn. Its exponent and mantissa, put at the bottom of T's exponent and the top of its mantissa, are
// the value times a power of two, subnormal codes included. The code 0x7f (NaN) comes out as 480 that way and
// is flagged.
template <typename T>
struct Fp8 : NoTable {
  static constexpr int Bits = 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  static constexpr bool Converts = IsHalf<T>;  // by an instruction, NaN and all
#else
  static constexpr bool Converts = false;
#endif
  static constexpr bool HasNan = !Converts;
  struct Zero {};

  __device__ explicit Fp8(const unsigned char*, int) {}

  __device__ static Zero zero(uint32_t) { return {}; }

  __device__ static uint32_t convert_pair(uint32_t word, bool upper) {
    uint32_t out;
    const uint16_t codes = static_cast<uint16_t>(upper ? word >> 16 : word);
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(codes));
    return out;
  }

  // flags collects, in bit 7 of each byte, the codes whose magnitude is 0x7f.
  __device__ static void dequant8(const uint32_t (&words)[2], Zero, uint32_t& flags, uint32_t (&pairs)[4]) {
    if constexpr (HasNan) {
#pragma unroll
      for (int i = 0; i < 2; ++i) flags |= (words[i] & 0x7f7f7f7f) + 0x01010101;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[i / 2];
      if constexpr (Converts) {
        pairs[i] = convert_pair(word, i % 2);
      } else {
        // each code in the high byte of its half
        const uint32_t spread = __byte_perm(word, 0, 0x1404 + 0x2020 * (i % 2));
        if constexpr (IsHalf<T>) {
          const uint32_t bits = (spread & 0x80008000) | ((spread >> 1) & 0x3f803f80);
          pairs[i] = fma2<T>(bits, 0x5c005c00, 0x80008000);  // times 2^8; -0 keeps a zero's sign
        } else {
          const uint32_t bits = (spread & 0x80008000) | ((spread >> 4) & 0x07f007f0);
          pairs[i] = fma2<T>(bits, 0x7b807b80, 0x80008000);  // times 2^120
        }
      }
    }
  }
};

}  // namespace bitfuse
