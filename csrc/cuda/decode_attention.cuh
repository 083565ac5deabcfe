// decode_attention: a few queries of each sequence against its cache.
//
// Bound: the bytes of K and V, each read once. The rows of a tile are the queries of a kv head (its query
// heads times the query tokens), 16 of them, so that K and V meet all of them when they are read.
//
// Work. A unit is a tile of tokens for each of the block's 4 warps. The units of all (sequence, kv head, row
// tile) lie in one line, and each block takes an equal stretch of it, however long the sequences are: blocks
// read the lengths and work out their stretch themselves, the host knows only shapes. A stretch is walked row
// by row of that line; where it has part of a row, the outputs go to memory in float32, and the last block to
// come adds up the parts in the order of the blocks: the same bits every time.
//
// A warp has its own tiles and its own ring of stages in shared memory: no barrier in the loop, one warp's
// waits are filled by the others. Stage: K [Tokens][Dim], V [Tokens][Dim], then K's scales and offsets [Dim]
// and V's [words][Tokens] where the cache has codes. Rows are units of 16 bytes, unit u of row r at u ^ (r %
// 8) (of shorter rows: within 128 bytes), so that neither copies nor ldmatrix meet a bank twice.
//
//     S = Q K^T    Q is the A operand of mma.m16n8k16, in registers (Dim 256: read again each time); lane (g,
//                  t) has, of each 16 bytes of K row g, bytes 4t..4t+3: 2, 4 or 8 channels, in which order
//                  Q's fragments are made
//     softmax      of rows g and g + 8, tokens 2t, 2t+1 of each 8; the running maximum in log2 units
//     O += P V     P is S's registers; ldmatrix.trans gives lane (g, t) of each 16 bytes of V rows 2t, 2t+1
//                  bytes 2g, 2g+1: 1, 2 or 4 channels, whose columns of O are interleaved until the end
//
// Codes become float16 in registers and meet their scale and offset there: code * scale + offset, rounded
// once, 3 instructions for a pair. Q is float16 too then, a power of two keeping each row in its range, and
// so is each tile's K (by its largest scale) and V (by the largest so far, which O follows): bfloat16 caches
// overflow nowhere. The tail of a sequence is walked by the same block, as a cache of full precision.
//
// By count, head_dim 128 on an H100 (14.5 bytes a clock and multiprocessor, 4 instructions): see
// decode_attention.cu.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/decode_attention.h"
#include "cuda/dequant.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/mma.cuh"

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

template <int D>
using Fp8Codes = Codes<8, false, D>;
template <int Bits, int D>
using IntCodes = Codes<Bits, true, D>;

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
// What a warp leaves at the end: O [16][SumPitch], then maximum and sum of each row.
template <int Dim>
constexpr int SumBytes = RowTile * SumPitch<Dim> * 4 + RowTile * 8;
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
constexpr int TailBytes = SumBytes<Dim> + TailStages * 2 * Dense<__half, Dim>::Tokens * Dim * 2;

struct Kernel {
  DecodeArgs a;
  int rows, row_tiles, row_groups;  // of a kv head; of a sequence: kv_heads * row_tiles
  int stages, region_bytes, least_units;
  int log_group;          // of tokens that share K's scales
  unsigned value_groups;  // of each 32 channels of V, the group whose scales they have, 4 bits each
};

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

// What scales and offsets of codes are multiplied by. The bits of a code c are a float16 already, c 2^-24;
// times scale 2^up, plus offset 2^(up - 24), it is its value times 2^(up - 24). The largest `up` with which
// nothing overflows leaves values just below 2^-1 (8 bits) or 2^-5; where some are 1 or more, 15 is enough
// for 14 bits of the largest. A power that float16 has not comes in two parts, of which the second is applied
// to the scales in shared memory.
struct Powers {
  static constexpr int Most = 30, Middle = 24, LeastOfHalf = -14;
  int up;

  // From bounds of magnitudes, two of each lane.
  template <int Bits>
  __device__ __forceinline__ static Powers of(uint32_t bounds) {
    const unsigned most = __reduce_max_sync(AllLanes, max(bounds >> 16, bounds & 0xffff));
    // what float16 has no room for is still below 65504 (2^Bits)
    const int exponent = most >= 0x7c00 ? 16 + Bits : static_cast<int>(most >> 10) - 15;
    const int up = (Bits == 8 ? 22 : 18) - exponent;
    return {min(up, exponent >= 0 ? 15 : Most)};
  }
  __device__ __forceinline__ int first_of_scale() const { return min(up, 15); }
  __device__ __forceinline__ int first_of_offset() const { return max(up - Middle, LeastOfHalf); }
  __device__ __forceinline__ bool has_second() const { return up > 15 || up - Middle < LeastOfHalf; }
  __device__ __forceinline__ uint32_t second_of_scale() const { return half_powers(up - first_of_scale()); }
  __device__ __forceinline__ uint32_t second_of_offset() const {
    return half_powers(up - Middle - first_of_offset());
  }
};

// Of two scales and two offsets: what their codes' magnitudes are bounded by.
template <int Bits>
__device__ __forceinline__ uint32_t bounds_of(uint32_t scales, uint32_t offsets) {
  return fma2<__half>(scales, Bits == 8 ? 0x5bf85bf8 : 0x4b804b80, offsets & 0x7fff7fff);
}

// Which keys of a sequence are to be met, and in how many units of which kind.
struct Extent {
  int length;      // with new tokens
  int begin, end;  // of what the cache holds
  int units;       // of those; a sequence that has no keys has one of nothing
  int tail_begin, tail_units;
};

template <class R>
__device__ __forceinline__ Extent extent_of(const Kernel& kernel, int seqlen) {
  const DecodeArgs& a = kernel.a;
  Extent e;
  e.length = min(max(seqlen, 0), a.cache.capacity - a.new_tokens) + a.new_tokens;
  const int first = a.left < 0 ? 0 : max(0, e.length - a.queries - a.left);
  e.begin = first & -R::Tokens;
  e.end = R::Grouped ? e.length & -a.cache.group_size : e.length;
  e.units = max(0, e.end - e.begin + Warps * R::Tokens - 1) / (Warps * R::Tokens);
  e.tail_begin = e.tail_units = 0;
  if constexpr (R::Grouped) {
    constexpr int TailTokens = Dense<__half, R::Dim>::Tokens;
    e.tail_begin = max(e.end, first & -TailTokens);
    e.tail_units = max(0, e.length - e.tail_begin + Warps * TailTokens - 1) / (Warps * TailTokens);
  }
  if (e.units + e.tail_units == 0) e.units = 1;
  return e;
}

// Where K or V is read from, of one kv head of one sequence.
struct Source {
  const unsigned char *k, *v;
  uint32_t k_page, k_slot, v_page, v_slot;  // strides in 16 bytes
  int k_units, v_units;                     // of a row, 16 bytes each
  const int* table;                         // of the sequence, or null: all lies in `page`
  int page, pages, log_page_size, slot_mask;
};

// The tokens from `begin` on, for `units` units; those from `end` on are not there.
struct Span {
  int sequence, kv_head, first_row, length, begin, end, units;
};

// What a lane knows of its two rows.
struct LaneRow {
  int query, position;
  float slope;  // in log2 units
};

// All of a sequence's units before `at` are another's.
struct FoundRow {
  int sequence, group;  // kv head and row tile
  unsigned start;       // the first unit of the row in the line
  int units, seqlen;
};

template <class R>
__device__ __forceinline__ unsigned units_of(const Kernel& kernel, int sequence, int& seqlen) {
  seqlen = 0;
  if (sequence >= kernel.a.cache.batch) return 0;
  seqlen = __ldg(kernel.a.seqlens + sequence);
  const Extent e = extent_of<R>(kernel, seqlen);
  return e.units + e.tail_units;
}

template <class R>
__device__ __forceinline__ unsigned all_units(const Kernel& kernel) {
  unsigned mine = 0;
  for (int b = threadIdx.x % 32; b < kernel.a.cache.batch; b += 32) {
    int seqlen;
    mine += units_of<R>(kernel, b, seqlen);
  }
  return __reduce_add_sync(AllLanes, mine) * kernel.row_groups;
}

template <class R>
__device__ __forceinline__ FoundRow find_row(const Kernel& kernel, unsigned at) {
  const int lane = threadIdx.x % 32;
  unsigned before = 0;
  for (int first = 0;; first += 32) {
    int seqlen;
    const unsigned units = units_of<R>(kernel, first + lane, seqlen);
    unsigned sum = units * kernel.row_groups;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(AllLanes, sum, step);
      if (lane >= step) sum += below;
    }
    const unsigned past = __ballot_sync(AllLanes, at < before + sum);
    if (past != 0) {
      const int found = __ffs(past) - 1;
      FoundRow row;
      row.sequence = first + found;
      row.units = __shfl_sync(AllLanes, units, found);
      row.seqlen = __shfl_sync(AllLanes, seqlen, found);
      row.start = before + __shfl_sync(AllLanes, sum, found) - row.units * kernel.row_groups;
      row.group = (at - row.start) / row.units;
      row.start += row.group * row.units;
      return row;
    }
    before += __shfl_sync(AllLanes, sum, 31);
  }
}

// The rows' queries, rotated, to shared memory [16][QueryPitch] as the operand; behind them what each row's
// products are to be multiplied by. Rows and channels that there are not are 0.
template <class R>
__device__ __forceinline__ void load_queries(const Kernel& kernel, const Span& span, unsigned char* to) {
  const DecodeArgs& a = kernel.a;
  constexpr int Vectors = R::Dim / 8;  // of a row
  float* const factors = reinterpret_cast<float*>(to + RowTile * QueryPitch<R::Dim> * 2);
  const int heads_a_group = a.heads / a.cache.kv_heads;
#pragma unroll
  for (int i = threadIdx.x; i < RowTile * Vectors; i += Threads) {
    const int row = i / Vectors, c = i % Vectors * 8, flat = span.first_row + row;
    uint4 words = {0, 0, 0, 0};
    unsigned short* const bits = reinterpret_cast<unsigned short*>(&words);
    if (flat < kernel.rows && c < a.cache.dim) {
      const int query = flat / heads_a_group, head = span.kv_head * heads_a_group + flat % heads_a_group;
      const unsigned short* from = static_cast<const unsigned short*>(a.q.data) + span.sequence * a.q.batch +
                                   query * a.q.token + head * a.q.head;
      words = __ldg(reinterpret_cast<const uint4*>(from + c));
      if (a.rotary.cos != nullptr && c < 2 * a.rotary.half) {
        const int64_t angle = rotary_row(a.rotary, span.sequence, query, span.length - a.queries + query);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          bits[e] = rounded_bits(turned_at(a.rotary, angle, from, c + e, a.cache.type), a.cache.type);
        }
      }
    }
    if constexpr (R::Converts) {
      float x[8], most = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = float_at(bits, e, a.cache.type), most = fmaxf(most, fabsf(x[e]));
#pragma unroll
      for (int step = 1; step < Vectors; step *= 2) {
        most = fmaxf(most, __shfl_xor_sync(AllLanes, most, step));
      }
      // the largest below 2^7, so that with K below 2^15 no sum of products overflows
      const int up = most > 0 ? min(100, 6 - exponent_of(most)) : 0;
      const float factor = power_of_two(up);
#pragma unroll
      for (int e = 0; e < 8; ++e) bits[e] = rounded_bits(x[e] * factor, Float::Float16);
      if (c == 0) factors[row] = power_of_two(-up);
    } else {
      if (c == 0) factors[row] = 1.0f;
    }
    *reinterpret_cast<uint4*>(to + (row * QueryPitch<R::Dim> + c) * 2) = words;
  }
}

template <class R>
struct Fragments {
  static constexpr int Steps = R::Dim / 16;
  // Dim 256 leaves no registers for them
  static constexpr bool Kept = R::Dim <= 128;
  uint32_t kept[Kept ? Steps : 1][4];
};

// Q's fragments for the steps of unit `unit` of K rows (full precision: of units 2 unit and 2 unit + 1), in
// the order of K's channels.
template <class R, int Steps>
__device__ __forceinline__ void query_fragments(const unsigned char* queries, int unit,
                                                uint32_t (&to)[Steps][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (!R::Converts) {
    const int row = lane % 16, c = 16 * unit + lane / 16 * 8;
    ldmatrix_x4(to[0], shared_address(queries + (row * QueryPitch<R::Dim> + c) * 2));
  } else {
    const unsigned char* const upper = queries + (g * QueryPitch<R::Dim> + R::PerUnit * unit) * 2;
    const unsigned char* const lower = upper + 8 * QueryPitch<R::Dim> * 2;
    if constexpr (R::Bits == 8) {
      const uint2 a = reinterpret_cast<const uint2*>(upper)[t], b = reinterpret_cast<const uint2*>(lower)[t];
      to[0][0] = a.x, to[0][1] = b.x, to[0][2] = a.y, to[0][3] = b.y;
    } else {
      const uint4 a = order_like_pairs(reinterpret_cast<const uint4*>(upper)[t]);
      const uint4 b = order_like_pairs(reinterpret_cast<const uint4*>(lower)[t]);
      to[0][0] = a.x, to[0][1] = b.x, to[0][2] = a.y, to[0][3] = b.y;
      to[1][0] = a.z, to[1][1] = b.z, to[1][2] = a.w, to[1][3] = b.w;
    }
  }
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

// Integer codes as they stand at the bottom of float16: 4 of 8 bits in pairs as above, 8 of 4 bits in pairs
// (i, i + 4), of which every second is 4 bits too high.
template <int Bits, bool OfV>
__device__ __forceinline__ void pairs_of_codes(uint32_t word, uint32_t (&pairs)[16 / Bits]) {
  if constexpr (Bits == 8) {
    pairs[0] = OfV ? word & 0x00ff00ff : __byte_perm(word, 0, 0x4140);
    pairs[1] = __byte_perm(word, 0, OfV ? 0x4341 : 0x4342);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs[2 * i] = word >> 8 * i & 0x000f000f;
      pairs[2 * i + 1] = word >> 8 * i & 0x00f000f0;
    }
  }
}
// So much lower the power of their scale is.
template <int Bits>
__device__ __forceinline__ constexpr int too_high(int pair) {
  return Bits == 4 && pair % 2 == 1 ? 4 : 0;
}

// One warp's walk over its tiles of a span, and what it has so far.
template <class R>
class Walk {
 public:
  using T = typename R::Operand;
  using S = Stage<R>;
  static constexpr int Tokens = R::Tokens, TokenTiles = Tokens / 8, Columns = R::Dim / 8;
  static constexpr int Pairs = R::PerUnit / 8;                    // of a word
  static constexpr int StepsAUnit = R::Converts ? Pairs / 2 : 1;  // full precision: of two units
  static constexpr int KUnits = R::Converts ? S::Units : S::Units / 2;

  __device__ Walk(const Kernel& kernel, const Span& span, const Source& source, unsigned char* ring,
                  uint32_t* masks, int stages)
      : kernel_(kernel), span_(span), source_(source), ring_(ring), masks_(masks), stages_(stages) {
    lane_ = threadIdx.x % 32;
    warp_ = threadIdx.x / 32;
    log_entries_ = max(0, LogTokens - source.log_page_size);
    policy_ = evict_first_policy();
  }

  // The first stages on their way.
  __device__ __forceinline__ void start() {
    clear_unused_units();
    if (source_.table != nullptr) ahead_ = pages_of_batch(0);
    for (int i = 0; i < stages_ - 1; ++i) copy_tile(i, i);
  }

  __device__ __forceinline__ void run(const unsigned char* queries) {
    const DecodeArgs& a = kernel_.a;
    const int g = lane_ / 4;
    const float* const factors = reinterpret_cast<const float*>(queries + RowTile * QueryPitch<R::Dim> * 2);
    float scale = a.scale;
    if (!R::Grouped && R::Converts) {
      scale *=
          Fp8Unit * (a.cache.k_head_scales == nullptr ? 1.0f : __ldg(a.cache.k_head_scales + span_.kv_head));
    }
    const int heads_a_group = a.heads / a.cache.kv_heads;
    both_ = kernel_.rows - span_.first_row > 8;
    linear_ = a.softcap == 0 && a.alibi == nullptr && scale > 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int flat = min(span_.first_row + g + 8 * r, kernel_.rows - 1);
      rows_[r].query = flat / heads_a_group;
      rows_[r].position = rows_[r].query + span_.length - a.queries;
      rows_[r].slope = 0;
      if (a.alibi != nullptr) {
        const int head = span_.kv_head * heads_a_group + flat % heads_a_group;
        rows_[r].slope = Log2E * __ldg(a.alibi + static_cast<int64_t>(span_.sequence) * a.alibi_batch + head);
      }
      factor_[r] = factors[g + 8 * r] * scale * (a.softcap > 0 ? 1.0f : Log2E);
      most_[r] = -INFINITY;
      sum_[r] = 0;
    }
    if constexpr (Fragments<R>::Kept) {
#pragma unroll
      for (int u = 0; u < KUnits; ++u) {
        uint32_t of_unit[StepsAUnit][4];
        query_fragments<R>(queries, u, of_unit);
#pragma unroll
        for (int s = 0; s < StepsAUnit; ++s) {
#pragma unroll
          for (int i = 0; i < 4; ++i) fragments_.kept[u * StepsAUnit + s][i] = of_unit[s][i];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[n][i] = 0;
    }
    int stage = 0, free_stage = stages_ - 1;
    for (int i = 0; i < span_.units; ++i) {
      wait_for_stage();
      __syncwarp();
      copy_tile(i + stages_ - 1, free_stage);
      const uint32_t mask = masks_[stage];
      // the last tiles of a span need not be there
      if (mask != 0) tile(queries, i, ring_ + stage * S::Bytes, mask);
      free_stage = stage;
      stage = stage == stages_ - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncwarp();
  }

  // O, the maximum and the sum of each row, in the order of channels.
  __device__ __forceinline__ void leave(unsigned char* to) {
    const int g = lane_ / 4, t = lane_ % 4;
    float* const o = reinterpret_cast<float*>(to);
    float2* const states = reinterpret_cast<float2*>(to + RowTile * SumPitch<R::Dim> * 4);
    float unit = 1;
    if constexpr (R::Grouped) unit = power_of_two(Powers::Middle - v_powers_.up);
    if constexpr (R::Converts && !R::Grouped) {
      const float* const scales = kernel_.a.cache.v_head_scales;
      unit = Fp8Unit * (scales == nullptr ? 1.0f : __ldg(scales + span_.kv_head));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += __shfl_xor_sync(AllLanes, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(AllLanes, sum_[r], 2);
      const int row = g + 8 * r;
      if (t == 0) states[row] = {most_[r], sum_[r]};
      float* const line = o + row * SumPitch<R::Dim>;
      if constexpr (!R::Converts) {
#pragma unroll
        for (int n = 0; n < Columns; ++n) {
          *reinterpret_cast<float2*>(line + 8 * n + 2 * t) = {o_[n][2 * r], o_[n][2 * r + 1]};
        }
      } else {
        // columns 2t and 2t+1 of Pairs neighbours in n
#pragma unroll
        for (int n = 0; n < Columns; n += Pairs) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
#pragma unroll
            for (int i = 0; i < Pairs; i += 2) {
              *reinterpret_cast<float2*>(line + 8 * n + (2 * t + column) * Pairs + i) = {
                  o_[n + i][2 * r + column] * unit, o_[n + i + 1][2 * r + column] * unit};
            }
          }
        }
      }
    }
  }

 private:
  static constexpr int LogTokens = Tokens == 16 ? 4 : 5;
  static constexpr uint32_t Whole = AllLanes >> (32 - Tokens);  // the mask of a tile

  __device__ int first_token(int i) const { return span_.begin + (i * Warps + warp_) * Tokens; }

  // Channels that a row has not are read as zeros; what meets a zero of Q must be finite.
  __device__ __forceinline__ void clear_unused_units() {
    if (source_.k_units == S::Units) return;
    for (int stage = 0; stage < stages_; ++stage) {
      unsigned char* const at = ring_ + stage * S::Bytes;
      for (int i = lane_; i < Tokens * S::Units; i += 32) {
        if (i % S::Units >= source_.k_units) {
          *reinterpret_cast<uint4*>(at + place<S::Units>(i / S::Units, i % S::Units)) = {0, 0, 0, 0};
        }
      }
      if constexpr (R::Grouped) {
        for (int i = lane_; i < 2 * S::KScaleBytes / 16; i += 32) {
          if (i % (R::Dim / 8) * 8 >= kernel_.a.cache.dim) {
            *reinterpret_cast<uint4*>(at + S::KScales + 16 * i) = {0, 0, 0, 0};
          }
        }
      }
    }
  }

  // Pages of the tokens of 32 >> log_entries_ tiles: a lane has an entry of the table, or -1.
  __device__ __forceinline__ int pages_of_batch(int batch) const {
    const int entry = (batch << 5) + lane_;
    const int token =
        first_token(entry >> log_entries_) + ((entry & ((1 << log_entries_) - 1)) << source_.log_page_size);
    if (token >= span_.end) return -1;
    const int page = __ldg(source_.table + (token >> source_.log_page_size));
    return page < source_.pages ? page : -1;
  }

  // Asks for tile i of this warp, if there is one; a group of copies either way.
  __device__ __forceinline__ void copy_tile(int i, int stage) {
    if (i < span_.units) {
      const int first = first_token(i);
      // of token `lane_`: all that is the same for a page is in the lane of its first token too
      int page = source_.page;
      if (source_.table != nullptr) {
        const int at = i & ((32 >> log_entries_) - 1);
        if (at == 0) {
          pages_ = ahead_;
          ahead_ = pages_of_batch((i << log_entries_ >> 5) + 1);
        }
        page =
            __shfl_sync(AllLanes, pages_, (at << log_entries_) + (lane_ % Tokens >> source_.log_page_size));
      }
      const bool there = lane_ < Tokens && first + lane_ < span_.end && page >= 0;
      const uint32_t mask = __ballot_sync(AllLanes, there);
      if (lane_ == 0) masks_[stage] = mask;
      if (mask != 0) copy_rows(first, page, mask, stage);
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void copy_unit(uint32_t to, const unsigned char* from, bool valid) const {
    if constexpr (S::Units >= 8) {
      cp_async_16_stream(to, from, valid, policy_);
    } else {
      cp_async_16_once(to, from, valid, policy_);
    }
  }
  __device__ __forceinline__ static const unsigned char* row_of(const unsigned char* from, uint32_t page,
                                                                uint32_t page_stride, uint32_t slot,
                                                                uint32_t slot_stride) {
    return from +
           (static_cast<uint64_t>(page) * page_stride + static_cast<uint64_t>(slot) * slot_stride) * 16;
  }

  // `page`: that of token lane_ % Tokens.
  __device__ __forceinline__ void copy_rows(int first, int page, uint32_t mask, int stage) {
    constexpr int RowsAtOnce = 32 / S::Units;
    const int row_of_lane = lane_ / S::Units, unit = lane_ % S::Units;
    const uint32_t to = shared_address(ring_ + stage * S::Bytes);
    const bool of_k = unit < source_.k_units, of_v = unit < source_.v_units;
    const unsigned char *const k_unit = source_.k + 16 * unit, *const v_unit = source_.v + 16 * unit;
    const int first_page = max(__shfl_sync(AllLanes, page, 0), 0);
    if (log_entries_ == 0 && mask == Whole) {
      const int slot = (first & source_.slot_mask) + row_of_lane;
      const unsigned char* k = row_of(k_unit, first_page, source_.k_page, slot, source_.k_slot);
      const unsigned char* v = row_of(v_unit, first_page, source_.v_page, slot, source_.v_slot);
      const uint32_t lane_to = to + place<S::Units>(row_of_lane, unit);
#pragma unroll
      for (int step = 0; step < Tokens; step += RowsAtOnce) {
        const uint32_t row_to = (lane_to ^ 16 * swizzle<S::Units>(step)) + 16 * step * S::Units;
        if (of_k) copy_unit(row_to, k, true);
        if (of_v) copy_unit(row_to + S::V, v, true);
        k += RowsAtOnce * 16ull * source_.k_slot, v += RowsAtOnce * 16ull * source_.v_slot;
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < Tokens; step += RowsAtOnce) {
        const int row = step + row_of_lane, slot = (first + row) & source_.slot_mask;
        const int its_page = max(__shfl_sync(AllLanes, page, row), 0);
        const uint32_t row_to = to + place<S::Units>(row, unit);
        const bool valid = mask >> row & 1;
        if (of_k) copy_unit(row_to, row_of(k_unit, its_page, source_.k_page, slot, source_.k_slot), valid);
        if (of_v)
          copy_unit(row_to + S::V, row_of(v_unit, its_page, source_.v_page, slot, source_.v_slot), valid);
      }
    }
    if constexpr (R::Grouped) copy_scales(first_page, first & source_.slot_mask, to);
  }

  // Of a tile, which lies in one group of one page.
  __device__ __forceinline__ void copy_scales(uint32_t page, uint32_t slot, uint32_t to) const {
    const KvCache& cache = kernel_.a.cache;
    const uint32_t group = page * (cache.page_size >> kernel_.log_group) + (slot >> kernel_.log_group);
    const uint32_t a_group = cache.kv_heads * cache.dim, of_head = span_.kv_head * cache.dim;
    const uint64_t k_at = static_cast<uint64_t>(group) * a_group + of_head;
#pragma unroll
    for (int i = lane_; i < R::Dim / 4; i += 32) {
      const uint32_t c = i % (R::Dim / 8) * 8;
      const unsigned short* const from = i < R::Dim / 8 ? cache.k_scales : cache.k_offsets;
      if (c < cache.dim) cp_async_16(to + S::KScales + 16 * i, from + k_at + c, true);
    }
    // V's of token `lane_`, in the words of two that they lie in. Pages have an even number of tokens
    const uint32_t token = page * cache.page_size + slot + lane_;
    const uint32_t a_token = cache.kv_heads * cache.value_groups,
                   head_at = span_.kv_head * cache.value_groups;
    const uint64_t v_at = (static_cast<uint64_t>(token) * a_token + head_at) / 2;
    const uint32_t* const scales = reinterpret_cast<const uint32_t*>(cache.v_scales) + v_at;
    const uint32_t* const offsets = reinterpret_cast<const uint32_t*>(cache.v_offsets) + v_at;
    const uint32_t words_to = to + S::VScales + lane_ * 4;
#pragma unroll
    for (int w = 0; w < R::Dim / 64; ++w) {
      if (2 * w < cache.value_groups) {
        cp_async_4(words_to + w * Tokens * 4, scales + w, true);
        cp_async_4(words_to + w * Tokens * 4 + S::VScaleBytes, offsets + w, true);
      }
    }
  }

  // Whether the first scale of V of an even (or odd) token lies in the high half of its word.
  __device__ int value_scale_parity(int token_parity) const {
    return (token_parity * kernel_.a.cache.kv_heads + span_.kv_head) * kernel_.a.cache.value_groups & 1;
  }

  __device__ void wait_for_stage() const {
    switch (stages_) {
      case 2:
        return cp_async_wait<0>();
      case 3:
        return cp_async_wait<1>();
      case 4:
        return cp_async_wait<2>();
      case 5:
        return cp_async_wait<3>();
      default:
        return cp_async_wait<4>();
    }
  }

  __device__ __forceinline__ void tile(const unsigned char* queries, int i, unsigned char* stage,
                                       uint32_t mask) {
    float s[TokenTiles][4] = {};
    float k_unit = 1;
    if constexpr (R::Converts) {
      scores_of_codes(queries, stage, s, k_unit);
    } else {
      scores(queries, stage, s);
    }
    softmax(first_token(i), mask, k_unit, stage, s);
    uint32_t p[Tokens / 16][4];
#pragma unroll
    for (int k = 0; k < Tokens / 16; ++k) {
      p[k][0] = pack2<T>(s[2 * k][0], s[2 * k][1]);
      p[k][1] = pack2<T>(s[2 * k][2], s[2 * k][3]);
      p[k][2] = pack2<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
      p[k][3] = pack2<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
    if constexpr (R::Converts) {
      add_codes(stage, p);
    } else {
      add_values(stage + S::V, p[0]);
    }
  }

  __device__ __forceinline__ void scores(const unsigned char* queries, const unsigned char* k,
                                         float (&s)[TokenTiles][4]) {
    const uint32_t from = shared_address(k) + place<S::Units>(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
#pragma unroll
    for (int u = 0; u < KUnits; ++u) {
      uint32_t again[1][4];
      if constexpr (!Fragments<R>::Kept) query_fragments<R>(queries, u, again);
      const uint32_t (&q)[4] = Fragments<R>::Kept ? fragments_.kept[Fragments<R>::Kept ? u : 0] : again[0];
      uint32_t words[4];
      ldmatrix_x4(words, further(from, 2 * u));
      mma_m16n8k16<T>(s[0], q, words[0], words[1]);
      mma_m16n8k16<T>(s[1], q, words[2], words[3]);
    }
  }

  // Scores in units of k_unit.
  __device__ __forceinline__ void scores_of_codes(const unsigned char* queries, unsigned char* stage,
                                                  float (&s)[TokenTiles][4], float& k_unit) {
    const int t = lane_ % 4;
    unsigned char *const scales = stage + S::KScales, *const offsets = scales + S::KScaleBytes;
    uint32_t of_scale[2] = {}, of_offset = 0;
    if constexpr (R::Grouped) {
      constexpr int Words = R::Dim / 64;  // of a lane
      uint32_t bounds = 0;
#pragma unroll
      for (int w = 0; w < Words; ++w) {
        const int at = Words * lane_ + w;
        bounds = max2(bounds, bounds_of<R::Bits>(reinterpret_cast<const uint32_t*>(scales)[at],
                                                 reinterpret_cast<const uint32_t*>(offsets)[at]));
      }
      const Powers powers = Powers::of<R::Bits>(bounds);
      if (powers.has_second()) multiply_shared<Words>(scales, offsets, Words * lane_, 1, powers);
      of_scale[0] = half_powers(powers.first_of_scale());
      of_scale[1] = half_powers(powers.first_of_scale() - too_high<R::Bits>(1));
      of_offset = half_powers(powers.first_of_offset());
      k_unit = power_of_two(Powers::Middle - powers.up);
    }
    const uint32_t from = shared_address(stage) + place<S::Units>(lane_, 0);
#pragma unroll
    for (int u = 0; u < KUnits; ++u) {
      uint32_t again[StepsAUnit][4];
      if constexpr (!Fragments<R>::Kept) query_fragments<R>(queries, u, again);
      uint32_t scale[Pairs], offset[Pairs];
      if constexpr (R::Grouped) {
        if constexpr (R::Bits == 8) {
          const uint2 a = reinterpret_cast<const uint2*>(scales)[4 * u + t];
          const uint2 b = reinterpret_cast<const uint2*>(offsets)[4 * u + t];
          scale[0] = a.x, scale[1] = a.y, offset[0] = b.x, offset[1] = b.y;
        } else {
          const uint4 a = order_like_pairs(reinterpret_cast<const uint4*>(scales)[4 * u + t]);
          const uint4 b = order_like_pairs(reinterpret_cast<const uint4*>(offsets)[4 * u + t]);
          scale[0] = a.x, scale[1] = a.y, scale[2] = a.z, scale[3] = a.w;
          offset[0] = b.x, offset[1] = b.y, offset[2] = b.z, offset[3] = b.w;
        }
#pragma unroll
        for (int i = 0; i < Pairs; ++i) {
          scale[i] = mul2(scale[i], of_scale[i % 2]), offset[i] = mul2(offset[i], of_offset);
        }
      }
      uint32_t words[4];  // of 8 tokens each
      ldmatrix_x4(words, further(from, u));
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n) {
        uint32_t k[Pairs];
        if constexpr (!R::Grouped) {
          pairs_of_fp8<false>(words[n], k);
        } else {
          pairs_of_codes<R::Bits, false>(words[n], k);
#pragma unroll
          for (int i = 0; i < Pairs; ++i) k[i] = fma2<__half>(k[i], scale[i], offset[i]);
        }
#pragma unroll
        for (int j = 0; j < StepsAUnit; ++j) {
          const uint32_t (&q)[4] =
              Fragments<R>::Kept ? fragments_.kept[Fragments<R>::Kept ? u * StepsAUnit + j : 0] : again[j];
          mma_m16n8k16<T>(s[n], q, k[2 * j], k[2 * j + 1]);
        }
      }
    }
  }

  // Which of a tile's keys a row does not see. Most tiles are seen whole.
  __device__ __forceinline__ bool all_seen(int first, uint32_t mask) const {
    const DecodeArgs& a = kernel_.a;
    const int own = span_.length - a.queries;  // the position of the first query
    return mask == Whole && (a.right < 0 || first + Tokens - 1 - own <= a.right) &&
           (a.left < 0 || first - (span_.length - 1) >= -a.left) &&
           (a.tree == nullptr || first + Tokens <= own);
  }

  // Of a tile's tokens, those that a row sees; of the tree only what is this lane's.
  __device__ __forceinline__ uint32_t seen(const LaneRow& row, int first, uint32_t mask) const {
    const DecodeArgs& a = kernel_.a;
    if (a.right >= 0) mask &= below(row.position + a.right + 1 - first);
    if (a.left >= 0) mask &= ~below(row.position - a.left - first);
    if (a.tree != nullptr) {
      const int own = span_.length - a.queries;  // the first key of the tree
      const unsigned char* const line =
          a.tree + span_.sequence * a.tree_batch + static_cast<int64_t>(row.query) * a.queries;
#pragma unroll 1
      for (int i = 0; i < 2 * TokenTiles; ++i) {
        const int at = i / 2 * 8 + lane_ % 4 * 2 + i % 2, of_tree = first + at - own;
        if (of_tree >= 0 && (mask >> at & 1) && !__ldg(line + of_tree)) mask ^= 1u << at;
      }
    }
    return mask;
  }
  // The tokens before token n.
  __device__ __forceinline__ static uint32_t below(int n) {
    return n >= 32 ? AllLanes : n <= 0 ? 0 : (1u << n) - 1;
  }

  // Scores of row r to logits where they are more than a positive multiple of them.
  __device__ __forceinline__ void bend(int first, const LaneRow& row, float factor, float (&s)[TokenTiles][4],
                                       int r) const {
    const DecodeArgs& a = kernel_.a;
    // softcap tanh(x / softcap), tanh(y) = 1 - 2 / (1 + e^2y)
    const float inside = a.softcap > 0 ? 2 * Log2E / a.softcap : 0, outside = a.softcap * Log2E;
#pragma unroll
    for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * r + i];
        x *= factor;
        if (a.softcap > 0) x = outside - 2 * outside * reciprocal(1 + exp2_approx(x * inside));
        const int distance = first + 8 * n + lane_ % 4 * 2 + i - row.position;
        x -= row.slope * fabsf(static_cast<float>(distance));
      }
    }
  }

  // Scores become probabilities over the maximum so far; what there is already follows it.
  __device__ __forceinline__ void softmax(int first, uint32_t mask, float k_unit, unsigned char* stage,
                                          float (&s)[TokenTiles][4]) {
    const int t = lane_ % 4;
    const bool whole = all_seen(first, mask);
    float rescale[2] = {1, 1};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r == 1 && !both_) break;
      float factor = factor_[r] * k_unit;
      if (!linear_) {
        bend(first, rows_[r], factor, s, r);
        factor = 1;
      }
      if (!whole) {
        const uint32_t of_row = seen(rows_[r], first, mask) >> 2 * t;
#pragma unroll
        for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (!(of_row >> (8 * n + i) & 1)) s[n][2 * r + i] = -INFINITY;
          }
        }
      }
      float most = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < TokenTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(AllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(AllLanes, most, 2));
      most = fmaxf(most_[r], most * factor);
      const float from = most == -INFINITY ? 0.0f : most;
      rescale[r] = exp2_approx(most_[r] - from);
      most_[r] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * r + i];
          x = exp2_approx(fmaf(x, factor, -from));
          sum += x;
        }
      }
      sum_[r] = sum_[r] * rescale[r] + sum;
    }
    if constexpr (R::Grouped) follow_values(stage, rescale);
    if (__any_sync(AllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Columns; ++n) {
        o_[n][0] *= rescale[0], o_[n][1] *= rescale[0];
        o_[n][2] *= rescale[1], o_[n][3] *= rescale[1];
      }
    }
  }

  // O is kept in the units of the largest V so far.
  __device__ __forceinline__ void follow_values(unsigned char* stage, float (&rescale)[2]) {
    const int groups = kernel_.a.cache.value_groups, parity = value_scale_parity(lane_ & 1);
    unsigned char *const scales = stage + S::VScales, *const offsets = scales + S::VScaleBytes;
    constexpr int Words = R::Dim / 64;
    uint32_t bounds = 0;
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      if (2 * w >= groups + parity) continue;
      const int at = w * Tokens + lane_;
      // halves that are another head's
      const uint32_t low = 2 * w >= parity ? 0xffff : 0, high = 2 * w + 1 < groups + parity ? 0xffff0000 : 0;
      bounds = max2(bounds, bounds_of<R::Bits>(reinterpret_cast<const uint32_t*>(scales)[at],
                                               reinterpret_cast<const uint32_t*>(offsets)[at]) &
                                (low | high));
    }
    const Powers powers = Powers::of<R::Bits>(bounds);
    if (powers.up < v_powers_.up) {
      const float down = power_of_two(powers.up - v_powers_.up);
      rescale[0] *= down, rescale[1] *= down;
      v_powers_ = powers;
    }
    if (v_powers_.has_second()) multiply_shared<Words>(scales, offsets, lane_, Tokens, v_powers_);
  }

  // Words at, at + pitch, ... of scales and offsets times the second part of their powers.
  template <int Words>
  __device__ __forceinline__ void multiply_shared(unsigned char* scales, unsigned char* offsets, int at,
                                                  int pitch, const Powers& powers) const {
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      uint32_t* const scale = reinterpret_cast<uint32_t*>(scales) + at + w * pitch;
      uint32_t* const offset = reinterpret_cast<uint32_t*>(offsets) + at + w * pitch;
      *scale = mul2(*scale, powers.second_of_scale());
      *offset = mul2(*offset, powers.second_of_offset());
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_values(const unsigned char* v, const uint32_t (&p)[4]) {
    const uint32_t from = shared_address(v) + place<S::Units>(lane_ % 16, lane_ / 16);
#pragma unroll
    for (int u = 0; u < S::Units; u += 2) {
      uint32_t words[4];
      ldmatrix_x4_trans(words, further(from, u));
      mma_m16n8k16<T>(o_[u], p, words[0], words[1]);
      mma_m16n8k16<T>(o_[u + 1], p, words[2], words[3]);
    }
  }

  // Scales (or offsets) of group k of tokens 8m + 2t and the next.
  __device__ __forceinline__ void value_scales(const unsigned char* from, int k,
                                               uint32_t (&to)[TokenTiles]) const {
    // both tokens' scales lie in the same word of theirs, though not in the same half
    const int even = k + value_scale_parity(0), odd = k + value_scale_parity(1);
    const uint2* const words = reinterpret_cast<const uint2*>(from + even / 2 * Tokens * 4) + lane_ % 4;
    const uint32_t select = (even % 2 ? 0x32 : 0x10) | (odd % 2 ? 0x7600 : 0x5400);
#pragma unroll
    for (int m = 0; m < TokenTiles; ++m) {
      const uint2 pair = words[4 * m];
      to[m] = __byte_perm(pair.x, pair.y, select);
    }
  }

  __device__ __forceinline__ void add_codes(const unsigned char* stage, const uint32_t (&p)[2][4]) {
    uint32_t scale[2][TokenTiles], offset[TokenTiles];  // scale: of either kind of pairs
    int group = -1;
    const uint32_t from = shared_address(stage + S::V) + place<S::Units>(lane_, 0);
#pragma unroll
    for (int u = 0; u < S::Units; ++u) {
      if constexpr (R::Grouped) {
        const int its = kernel_.value_groups >> (u * R::PerUnit / 32 * 4) & 15;
        if (u * R::PerUnit % 32 == 0 && its != group) {
          group = its;
          value_scales(stage + S::VScales, group, scale[0]);
          value_scales(stage + S::VScales + S::VScaleBytes, group, offset);
          const int up = v_powers_.first_of_scale();
          const uint32_t of_scale[2] = {half_powers(up), half_powers(up - too_high<R::Bits>(1))};
          const uint32_t of_offset = half_powers(v_powers_.first_of_offset());
#pragma unroll
          for (int m = 0; m < TokenTiles; ++m) {
            scale[1][m] = mul2(scale[0][m], of_scale[1]);
            scale[0][m] = mul2(scale[0][m], of_scale[0]);
            offset[m] = mul2(offset[m], of_offset);
          }
        }
      }
      uint32_t words[4];  // of 8 tokens each
      ldmatrix_x4_trans(words, further(from, u));
      uint32_t v[TokenTiles][Pairs];
#pragma unroll
      for (int m = 0; m < TokenTiles; ++m) {
        if constexpr (!R::Grouped) {
          pairs_of_fp8<true>(words[m], v[m]);
        } else {
          pairs_of_codes<R::Bits, true>(words[m], v[m]);
#pragma unroll
          for (int i = 0; i < Pairs; ++i) {
            v[m][i] = fma2<__half>(v[m][i], scale[too_high<R::Bits>(i) ? 1 : 0][m], offset[m]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Pairs; ++i) {
        mma_m16n8k16<T>(o_[u * Pairs + i], p[0], v[0][i], v[1][i]);
        mma_m16n8k16<T>(o_[u * Pairs + i], p[1], v[2][i], v[3][i]);
      }
    }
  }

  const Kernel& kernel_;
  const Span& span_;
  const Source& source_;
  unsigned char* const ring_;
  uint32_t* const masks_;
  const int stages_;
  int lane_, warp_, log_entries_, pages_ = 0, ahead_ = 0;
  uint64_t policy_;
  bool both_;    // rows 8 to 15 are not all empty
  bool linear_;  // logits are scores times a positive factor
  LaneRow rows_[2];
  float factor_[2], most_[2], sum_[2];
  Powers v_powers_ = {Powers::Most};  // O is in their units
  Fragments<R> fragments_;
  float o_[Columns][4];
};

// What of a row's output is known when its parts are: out = factor * sum of exp2(m - most) * o.
struct Finished {
  float most, factor;
};

// From the largest maximum of a row's parts and the sum over it; writes lse.
__device__ __forceinline__ Finished finish(const Kernel& kernel, int sequence, int kv_head, int flat,
                                           float most, float sum) {
  const DecodeArgs& a = kernel.a;
  const int heads_a_group = a.heads / a.cache.kv_heads;
  const int query = flat / heads_a_group, head = kv_head * heads_a_group + flat % heads_a_group;
  const float sink = a.sinks == nullptr ? -INFINITY : Log2E * __ldg(a.sinks + head);
  const float top = fmaxf(most, sink), over = top == -INFINITY ? 0.0f : top;
  const float total = sum * exp2f((most == -INFINITY ? over : most) - over) + exp2f(sink - over);
  a.lse[(static_cast<int64_t>(sequence) * a.heads + head) * a.queries + query] =
      total == 0 ? -INFINITY : (over + log2f(total)) * (1 / Log2E);
  return {over, total == 0 ? 0.0f : 1 / total};
}

__device__ __forceinline__ void store_four(const Kernel& kernel, int sequence, int kv_head, int flat, int c,
                                           float4 o) {
  const DecodeArgs& a = kernel.a;
  const int heads_a_group = a.heads / a.cache.kv_heads;
  const int query = flat / heads_a_group, head = kv_head * heads_a_group + flat % heads_a_group;
  const int64_t row = (static_cast<int64_t>(sequence) * a.queries + query) * a.heads + head;
  const bool half = a.cache.type == Float::Float16;
  const uint2 words = {half ? pack2<__half>(o.x, o.y) : pack2<__nv_bfloat16>(o.x, o.y),
                       half ? pack2<__half>(o.z, o.w) : pack2<__nv_bfloat16>(o.z, o.w)};
  *reinterpret_cast<uint2*>(static_cast<unsigned short*>(a.out) + row * a.cache.dim_v + c) = words;
}

// A part of a row in memory: O [16][Dim], then maximum and sum of each row. A block has two at most: of the
// row that it comes to in the middle, and of the row that it leaves in the middle.
template <int Dim>
constexpr int PartFloats = RowTile * Dim + RowTile * 2;

// Parts of the row that blocks `first` to `last` have shares of, added in this order by a whole block.
template <int Dim>
__device__ void merge_parts(const Kernel& kernel, const Span& span, int first, int last, float2* finished) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = last - first + 1;
  const int rows = min(RowTile, kernel.rows - span.first_row);
  auto part = [&](int i) {
    return kernel.a.partial +
           static_cast<int64_t>(i == 0 ? 2 * first + 1 : 2 * (first + i)) * PartFloats<Dim>;
  };
  auto state = [&](int i, int row) {
    return __ldcg(reinterpret_cast<const float2*>(part(i) + RowTile * Dim) + row);
  };
  for (int row = warp; row < rows; row += Warps) {
    float most = -INFINITY, sum = 0;
    for (int i = lane; i < parts; i += 32) most = fmaxf(most, state(i, row).x);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(AllLanes, most, step));
    const float over = most == -INFINITY ? 0.0f : most;
    for (int i = lane; i < parts; i += 32) {
      const float2 one = state(i, row);
      sum += one.y * exp2f(one.x - over);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(AllLanes, sum, step);
    if (lane == 0) {
      const Finished f = finish(kernel, span.sequence, span.kv_head, span.first_row + row, most, sum);
      finished[row] = {f.most, f.factor};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * (Dim / 4); i += Threads) {
    const int row = i / (Dim / 4), c = i % (Dim / 4) * 4;
    if (c >= kernel.a.cache.dim_v) continue;
    const float2 of_row = finished[row];
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int j = 0; j < parts; ++j) {
      const float weight = exp2f(state(j, row).x - of_row.x) * of_row.y;
      const float4 o = __ldcg(reinterpret_cast<const float4*>(part(j) + row * Dim + c));
      sum.x += weight * o.x, sum.y += weight * o.y, sum.z += weight * o.z, sum.w += weight * o.w;
    }
    store_four(kernel, span.sequence, span.kv_head, span.first_row + row, c, sum);
  }
}

// Units `from` to `until` of a row: its output, or this block's part of it.
template <class R, class Tail>
__device__ __forceinline__ void attend(const Kernel& kernel, const FoundRow& row, int from, int until,
                                       int blocks, unsigned total, unsigned char* shared) {
  constexpr int Dim = R::Dim;
  const DecodeArgs& a = kernel.a;
  const KvCache& cache = a.cache;
  const Extent extent = extent_of<R>(kernel, row.seqlen);
  const int warp = __shfl_sync(AllLanes, threadIdx.x / 32, 0);
  uint32_t* const masks = reinterpret_cast<uint32_t*>(shared) + warp * MostStages;
  unsigned char* const queries = shared + MaskBytes;
  unsigned char* const regions = shared + RegionsAt<Dim>;
  unsigned char* const region = regions + warp * kernel.region_bytes;
  Span span;
  span.sequence = row.sequence;
  span.kv_head = row.group / kernel.row_tiles;
  span.first_row = row.group % kernel.row_tiles * RowTile;
  span.length = extent.length;

  const bool main = from < extent.units;
  if (main) {
    span.begin = extent.begin + from * (Warps * R::Tokens);
    span.end = extent.end;
    span.units = min(until, extent.units) - from;
    Source source;
    source.k = cache.k.data + span.kv_head * cache.k.head,
    source.v = cache.v.data + span.kv_head * cache.v.head;
    source.k_page = cache.k.page / 16, source.k_slot = cache.k.slot / 16;
    source.v_page = cache.v.page / 16, source.v_slot = cache.v.slot / 16;
    source.k_units = cache.dim / R::PerUnit, source.v_units = cache.dim_v / R::PerUnit;
    source.table = cache.table == nullptr
                       ? nullptr
                       : cache.table + static_cast<int64_t>(span.sequence) * cache.max_pages;
    source.page = span.sequence, source.pages = cache.pages;
    source.log_page_size = cache.log_page_size;
    source.slot_mask = cache.slot_mask;
    Walk<R> walk(kernel, span, source, region, masks, kernel.stages);
    walk.start();
    load_queries<R>(kernel, span, queries);
    __syncthreads();
    walk.run(queries);
    walk.leave(region);
  }
  bool tail = false;
  if constexpr (R::Grouped) {
    const int tail_from = max(0, from - extent.units), tail_until = until - extent.units;
    tail = tail_from < tail_until;
    if (tail) {
      __syncthreads();
      span.begin = extent.tail_begin + tail_from * (Warps * Tail::Tokens);
      span.end = extent.length;
      span.units = tail_until - tail_from;
      Source source;
      source.k_units = cache.dim / Tail::PerUnit, source.v_units = cache.dim_v / Tail::PerUnit;
      source.k = static_cast<const unsigned char*>(cache.k_tail) + span.kv_head * source.k_units * 16;
      source.v = static_cast<const unsigned char*>(cache.v_tail) + span.kv_head * source.v_units * 16;
      source.k_slot = cache.kv_heads * source.k_units, source.k_page = 2 * cache.group_size * source.k_slot;
      source.v_slot = cache.kv_heads * source.v_units, source.v_page = 2 * cache.group_size * source.v_slot;
      source.table = nullptr;
      source.page = span.sequence, source.pages = 0;
      source.log_page_size = 31;
      source.slot_mask = 2 * cache.group_size - 1;
      Walk<Tail> walk(kernel, span, source, region + SumBytes<Dim>, masks, TailStages);
      walk.start();
      load_queries<Tail>(kernel, span, queries);
      __syncthreads();
      walk.run(queries);
      walk.leave(region + SumBytes<Dim>);
    }
  }
  __syncthreads();

  // the warps' sums, weighted: those of the walk over the cache, then those over the tail
  const int first_sum = main ? 0 : Warps, sums = (main ? Warps : 0) + (tail ? Warps : 0);
  auto sum_at = [&](int i) {
    i += first_sum;
    return regions + i % Warps * kernel.region_bytes + i / Warps * SumBytes<Dim>;
  };
  float* const weights = reinterpret_cast<float*>(queries);  // [sums][16]
  float2* const finished = reinterpret_cast<float2*>(weights + 2 * Warps * RowTile);
  const unsigned row_last = row.start + row.units - 1;
  // block i begins at unit total * i / blocks, rounded down
  auto block_of = [&](unsigned unit) { return static_cast<int>(((unit + 1ull) * blocks - 1) / total); };
  const int first_block = block_of(row.start), last_block = block_of(row_last);
  const bool alone = first_block == last_block;
  float* const part = a.partial + (2 * static_cast<int64_t>(blockIdx.x) + (from == 0)) * PartFloats<Dim>;
  const int rows = min(RowTile, kernel.rows - span.first_row);
  if (threadIdx.x < rows) {
    const int r = threadIdx.x;
    auto state = [&](int i) {
      return reinterpret_cast<const float2*>(sum_at(i) + RowTile * SumPitch<Dim> * 4)[r];
    };
    float most = -INFINITY, sum = 0;
    for (int i = 0; i < sums; ++i) most = fmaxf(most, state(i).x);
    const float over = most == -INFINITY ? 0.0f : most;
    for (int i = 0; i < sums; ++i) sum += state(i).y * exp2f(state(i).x - over);
    Finished f = {over, 1.0f};
    if (alone) {
      f = finish(kernel, span.sequence, span.kv_head, span.first_row + r, most, sum);
    } else {
      reinterpret_cast<float2*>(part + RowTile * Dim)[r] = {most, sum};
    }
    for (int i = 0; i < sums; ++i) weights[i * RowTile + r] = exp2f(state(i).x - f.most) * f.factor;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * (Dim / 4); i += Threads) {
    const int r = i / (Dim / 4), c = i % (Dim / 4) * 4;
    if (c >= cache.dim_v) continue;
    float4 sum = {0, 0, 0, 0};
    for (int j = 0; j < sums; ++j) {
      const float weight = weights[j * RowTile + r];
      const float4 o = *reinterpret_cast<const float4*>(sum_at(j) + (r * SumPitch<Dim> + c) * 4);
      sum.x += weight * o.x, sum.y += weight * o.y, sum.z += weight * o.z, sum.w += weight * o.w;
    }
    if (alone) {
      store_four(kernel, span.sequence, span.kv_head, span.first_row + r, c, sum);
    } else {
      *reinterpret_cast<float4*>(part + r * Dim + c) = sum;
    }
  }
  if (alone) return;

  // the last block to bring its part of the row adds them all
  bool last = false;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned others = last_block - first_block;
    last = atomicInc(a.counters + row.sequence * kernel.row_groups + row.group, others) == others;
    __threadfence();
  }
  if (__syncthreads_or(last)) merge_parts<Dim>(kernel, span, first_block, last_block, finished);
}

// Tail: the reader of a cache's tail, which has the queries' type.
template <class R, class Tail>
__global__ void __launch_bounds__(Threads, R::Dim <= 128 ? 2 : 1)
    decode_attention_kernel(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned total = all_units<R>(kernel);
  const unsigned blocks = min(gridDim.x, max(1u, total / kernel.least_units));
  if (blockIdx.x >= blocks) return;
  unsigned at = static_cast<unsigned long long>(total) * blockIdx.x / blocks;
  const unsigned end = static_cast<unsigned long long>(total) * (blockIdx.x + 1) / blocks;
  while (at < end) {
    const FoundRow row = find_row<R>(kernel, at);
    const unsigned until = min(end, row.start + row.units);
    attend<R, Tail>(kernel, row, at - row.start, until - row.start, blocks, total, shared);
    at = until;
    __syncthreads();
  }
}

// A kernel, and what of shared memory it needs.
struct Instance {
  void (*function)(Kernel);
  int dim, tokens, stage_bytes, regions_at, least_region_bytes;  // of a warp
};

template <class R, class Tail = R>
constexpr Instance instance_of() {
  constexpr int Sums = R::Grouped ? TailBytes<R::Dim> : SumBytes<R::Dim>;
  return {decode_attention_kernel<R, Tail>, R::Dim, R::Tokens, Stage<R>::Bytes, RegionsAt<R::Dim>, Sums};
}

}  // namespace bitfuse::decode
