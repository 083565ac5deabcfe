// How rows of a KV cache lie in shared memory and become operands of mma.m16n8k16.
//
// Rows are units of 16 bytes, unit u of row r at u ^ (r % 8) (of shorter rows: within 128 bytes), so that
// neither copies nor ldmatrix meet a bank twice. Of K, ldmatrix gives lane (g, t) bytes 4t..4t+3 of a unit of
// row g: 2, 4 or 8 channels, the order of k inside a step being free. Of V, ldmatrix.trans gives it bytes 2g
// and 2g+1 of rows 2t and 2t+1: 1, 2 or 4 channels of a pair of tokens, the order of n being free too.
//
// Integer codes become float16 in two instructions a pair: the bits of two codes are put where float16 has
// the lowest bits of its mantissa, which makes subnormal numbers of them, and one multiply-add with scale and
// offset rounds once.
#pragma once

#include <cuda_runtime.h>

#include "cuda/linear/dequant.cuh"
#include "cuda/ptx/async_copy.cuh"

namespace bitfuse::decode {

constexpr int Warps = 4;
constexpr int Threads = 32 * Warps;
constexpr int RowTile = 16;
constexpr int TailStages = 2;
constexpr float Log2E = 1.4426950408889634f;
constexpr unsigned AllLanes = ~0u;

// How rows of a cache become operands. PerUnit: channels of 16 bytes.
template <typename T, int D>
struct Dense {
  using Operand = T;
  static constexpr int Dim = D, Tokens = 16, PerUnit = 8, Bits = 16;
  static constexpr bool Converts = false, Grouped = false;
};

template <int CodeBits, bool HasScales, int D>
struct Codes {
  using Operand = __half;
  static constexpr int Dim = D, Tokens = 32, PerUnit = 128 / CodeBits, Bits = CodeBits;
  static constexpr bool Converts = true, Grouped = HasScales;
};

// Bytes of a stage.
template <class R>
struct Stage {
  static constexpr int Units = R::Dim / R::PerUnit;  // of a row
  static constexpr int TileBytes = R::Tokens * Units * 16;
  static constexpr int V = TileBytes, KScales = 2 * TileBytes;
  static constexpr int KScaleBytes = R::Grouped ? R::Dim * 2 : 0;  // and as many of offsets
  static constexpr int VScales = KScales + 2 * KScaleBytes;
  static constexpr int VScaleBytes = R::Grouped ? R::Dim / 64 * R::Tokens * 4 : 0;
  static constexpr int Bytes = VScales + 2 * VScaleBytes;
};

template <int Dim>
constexpr int SumPitch = Dim + 4;  // floats
// What a warp leaves at the end: maximum and sum of each row, then O [8 or 16][SumPitch].
constexpr int StateBytes = RowTile * 8;
template <int Dim>
__host__ __device__ constexpr int sum_bytes(int rows) {
  return StateBytes + rows * SumPitch<Dim> * 4;
}
template <int Dim>
constexpr int QueryPitch = Dim + 8;  // 16-bit numbers
template <int Dim>
constexpr int QueryBytes = RowTile * QueryPitch<Dim> * 2 + RowTile * 4;
constexpr int MostStages = 6;
constexpr int MaskBytes = 128;  // of each warp and stage, which of its tokens are there
static_assert(Warps * MostStages * 4 <= MaskBytes);
// Shared memory: masks, queries (when they have been read: weights of the sums), a region for each warp.
template <int Dim>
constexpr int RegionsAt = (MaskBytes + QueryBytes<Dim> + 127) / 128 * 128;
// What the walk over a tail needs, beside the sums that a walk over codes has left.
template <int Dim>
constexpr int TailBytes = TailStages * 2 * Dense<__half, Dim>::Tokens * Dim * 2;

// What the place of a unit in its row is xored with. Of a sum of rows that share no bits it is the xor of
// theirs.
template <int Units>
__host__ __device__ constexpr int swizzle(int row) {
  return Units >= 8 ? row & 7 : row / (8 / Units) & (Units - 1);
}

// Where unit `unit` of row `row` is, in bytes.
template <int Units>
__device__ __forceinline__ int place(int row, int unit) {
  return 16 * (row * Units + (unit ^ swizzle<Units>(row)));
}

// The place `units` units further in the same row; `units` and the first unit share no bits.
__device__ __forceinline__ uint32_t further(uint32_t at, int units) {
  return (at ^ (16 * units & 127)) + (16 * units & ~127);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// 16 bytes past L1 that no one reads again, without the rest of their line, which another head's block asks
// for.
__device__ __forceinline__ void cp_async_16_once(uint32_t to, const void* from, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// floor(log2(x)) of x > 0; -127 of 0, 128 where x is not finite.
__device__ __forceinline__ int exponent_of(float x) {
  return static_cast<int>(__float_as_uint(x) >> 23) - 127;
}
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float((e + 127) << 23); }
// Twice 2^e as float16, e from -14 to 15.
__device__ __forceinline__ uint32_t half_powers(int e) { return ((e + 15) << 10) * 0x10001u; }

__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
// NaN is larger than all.
__device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// What scales and offsets of codes are multiplied by. Codes stand in float16's mantissas as c 2^-Point; times
// scale 2^up, plus offset 2^(up - Point), one is its value times 2^(up - Point). The largest `up` with which
// nothing overflows leaves values just below 2^-1; where some are 1 or more, 15 is enough for 14 bits of the
// largest.
template <int Bits>
struct Powers {
  static constexpr int Point = Bits == 8 ? 24 : 20;
  static constexpr int Most = 30, LeastOfHalf = -14;
  int up;

  // From bounds of magnitudes, two of each lane.
  __device__ __forceinline__ static Powers of(uint32_t bounds) {
    const unsigned most = __reduce_max_sync(AllLanes, max(bounds >> 16, bounds & 0xffff));
    // what float16 has no room for is still below 65504 (2^Bits)
    const int exponent = most >= 0x7c00 ? 16 + Bits : static_cast<int>(most >> 10) - 15;
    const int up = Point - 2 - exponent;
    return {min(up, exponent >= 0 ? 15 : Most)};
  }
  // What products are to be multiplied by.
  __device__ __forceinline__ float unit() const { return power_of_two(Point - up); }
  // To two scales and two offsets. A power that float16 has not comes in two parts.
  __device__ __forceinline__ void apply(uint32_t& scales, uint32_t& offsets) const {
    const int of_scale = min(up, 15), of_offset = max(up - Point, LeastOfHalf);
    scales = mul2(scales, half_powers(of_scale));
    offsets = mul2(offsets, half_powers(of_offset));
    if (up > 15 || up - Point < LeastOfHalf) {
      scales = mul2(scales, half_powers(up - of_scale));
      offsets = mul2(offsets, half_powers(up - Point - of_offset));
    }
  }
};

// Of two scales and two offsets: what their codes' magnitudes are bounded by.
template <int Bits>
__device__ __forceinline__ uint32_t bounds_of(uint32_t scales, uint32_t offsets) {
  return fma2<__half>(scales, Bits == 8 ? 0x5bf85bf8 : 0x4b804b80, offsets & 0x7fff7fff);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr float Fp8Unit = 1.0f;
#else
constexpr float Fp8Unit = 256.0f;
#endif

// 4 codes of e4m3 as pairs (0, 1) and (2, 3), or of V (0, 2) and (1, 3); times 2^-8 where there is no
// instruction for it.
template <bool OfV>
__device__ __forceinline__ void pairs_of_fp8(uint32_t word, uint32_t (&pairs)[2]) {
  if constexpr (OfV) word = __byte_perm(word, 0, 0x3120);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  pairs[0] = Fp8<__half>::convert_pair(word, false);
  pairs[1] = Fp8<__half>::convert_pair(word, true);
#else
  // exponent and mantissa at the bottom of float16's exponent and the top of its mantissa; the code of NaN
  // comes out as 480, one bit from a NaN
  const uint32_t nans = ((word & 0x7f7f7f7f) + 0x01010101) & 0x80808080;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t spread = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
    const uint32_t of_nan = __byte_perm(nans, 0, i == 0 ? 0x1404 : 0x3424);
    pairs[i] = (spread & 0x80008000) | ((spread >> 1) & 0x3f803f80) | of_nan >> 1;
  }
#endif
}

// Integer codes as they stand in float16's mantissa: 4 of 8 bits in pairs as above, at its bottom; 8 of 4
// bits in pairs (i, i + 4), above 4 bits of 0.
template <int Bits, bool OfV>
__device__ __forceinline__ void pairs_of_codes(uint32_t word, uint32_t (&pairs)[16 / Bits]) {
  if constexpr (Bits == 8) {
    pairs[0] = OfV ? word & 0x00ff00ff : __byte_perm(word, 0, 0x4140);
    pairs[1] = __byte_perm(word, 0, OfV ? 0x4341 : 0x4342);
  } else {
    pairs[0] = word << 4 & 0x00f000f0;
#pragma unroll
    for (int i = 1; i < 4; ++i) pairs[i] = word >> 4 * (i - 1) & 0x00f000f0;
  }
}

}  // namespace bitfuse::decode
