// One warp's walk over its tiles of a sequence's keys: the loop of decode_attention.
//
// A warp has its own ring of stages in shared memory: no barrier in the loop, one warp's waits are filled by
// the others. Stage: K [Tokens][Dim], V [Tokens][Dim], then K's scales and offsets [Dim] and V's
// [words][Tokens] where the cache has codes (cache_operands.cuh). A tile is
//
//     S = Q K^T    Q is the A operand, in registers (Dim 256: read again each time), in the order of K's
//                  channels
//     softmax      of rows g and g + 8, tokens 2t, 2t+1 of each 8; the running maximum in log2 units
//     O += P V     P is S's registers; columns of O are interleaved as V's channels are, until the end
//
// With codes Q is float16, whatever its type was, a power of two keeping each row in its range; so is each
// tile's K (by the largest of its group) and V (by the largest so far, which O follows). bfloat16 caches
// overflow nowhere.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/cache_operands.cuh"
#include "cuda/attention/decode_attention.h"
#include "cuda/attention/kv_cache.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace bitfuse::decode {

struct Kernel {
  DecodeParams a;
  int rows, row_tiles;  // of a kv head
  int stages, region_bytes, sum_bytes, least_units;
  int log_group;          // of tokens that share K's scales
  unsigned value_groups;  // of each 32 channels of V, the group whose scales they have, 4 bits each
};

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

// The rows' queries, rotated, to shared memory [16][QueryPitch] as the operand; behind them what each row's
// products are to be multiplied by. Rows and channels that there are not are 0.
template <class R>
__device__ __forceinline__ void load_queries(const Kernel& kernel, const Span& span, unsigned char* to) {
  const DecodeParams& a = kernel.a;
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
                                   query * a.q.row + head * a.q.head;
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
    const DecodeParams& a = kernel_.a;
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
    float* const o = reinterpret_cast<float*>(to + StateBytes);
    float2* const states = reinterpret_cast<float2*>(to);
    float unit = 1;
    if constexpr (R::Grouped) unit = v_powers_.unit();
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
      if (r == 1 && !both_) break;
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
    const DeviceCache& cache = kernel_.a.cache;
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
    const unsigned char *const scales = stage + S::KScales, *const offsets = scales + S::KScaleBytes;
    if constexpr (R::Grouped) k_unit = prepare_key_scales(stage + S::KScales);
    const uint32_t from = shared_address(stage) + place<S::Units>(lane_, 0);
#pragma unroll
    for (int u = 0; u < KUnits; ++u) {
      uint32_t again[StepsAUnit][4];
      if constexpr (!Fragments<R>::Kept) query_fragments<R>(queries, u, again);
      uint32_t scale[Pairs], offset[Pairs];
      if constexpr (R::Grouped && R::Bits == 8) {
        const uint2 a = reinterpret_cast<const uint2*>(scales)[4 * u + t];
        const uint2 b = reinterpret_cast<const uint2*>(offsets)[4 * u + t];
        scale[0] = a.x, scale[1] = a.y, offset[0] = b.x, offset[1] = b.y;
      } else if constexpr (R::Grouped) {
        const uint4 a = reinterpret_cast<const uint4*>(scales)[4 * u + t];
        const uint4 b = reinterpret_cast<const uint4*>(offsets)[4 * u + t];
        scale[0] = a.x, scale[1] = a.y, scale[2] = a.z, scale[3] = a.w;
        offset[0] = b.x, offset[1] = b.y, offset[2] = b.z, offset[3] = b.w;
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

  // A tile's scales and offsets of K times their powers, in the order of the pairs of codes; each lane has
  // some channels. Returns what products are to be multiplied by.
  __device__ __forceinline__ float prepare_key_scales(unsigned char* scales) const {
    constexpr int Words = R::Dim / 64;
    uint32_t* const both[] = {reinterpret_cast<uint32_t*>(scales),
                              reinterpret_cast<uint32_t*>(scales + S::KScaleBytes)};
    uint32_t words[2][Words], bounds = 0;
#pragma unroll
    for (int w = 0; w < Words; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[i][w] = both[i][Words * lane_ + w];
      bounds = max2(bounds, bounds_of<R::Bits>(words[0][w], words[1][w]));
    }
    const Powers<R::Bits> powers = Powers<R::Bits>::of(bounds);
#pragma unroll
    for (int w = 0; w < Words; ++w) powers.apply(words[0][w], words[1][w]);
    __syncwarp();
#pragma unroll
    for (int w = 0; w < Words; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (R::Bits == 8) {
          both[i][Words * lane_ + w] = words[i][w];
        } else {
          // channels c and c + 1 of 8, c even, are the low (c < 4) or high halves of two neighbouring pairs
          const int c = 2 * (Words * lane_ + w);
          unsigned short* const to =
              reinterpret_cast<unsigned short*>(both[i]) + (c & ~7) + c % 4 * 2 + c / 4 % 2;
          to[0] = static_cast<unsigned short>(words[i][w]);
          to[2] = static_cast<unsigned short>(words[i][w] >> 16);
        }
      }
    }
    __syncwarp();
    return powers.unit();
  }

  // Which of a tile's keys a row does not see. Most tiles are seen whole.
  __device__ __forceinline__ bool all_seen(int first, uint32_t mask) const {
    const DecodeParams& a = kernel_.a;
    const int own = span_.length - a.queries;  // the position of the first query
    return mask == Whole && (a.right < 0 || first + Tokens - 1 - own <= a.right) &&
           (a.left < 0 || first - (span_.length - 1) >= -a.left) &&
           (a.tree == nullptr || first + Tokens <= own);
  }

  // Of a tile's tokens, those that a row sees; of the tree only what is this lane's.
  __device__ __forceinline__ uint32_t seen(const LaneRow& row, int first, uint32_t mask) const {
    const DecodeParams& a = kernel_.a;
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
    const DecodeParams& a = kernel_.a;
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
      most = fmaxf(most_[r], __fmul_rn(most, factor));
      const float from = most == -INFINITY ? 0.0f : most;
      rescale[r] = exp2_approx(most_[r] - from);
      most_[r] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * r + i];
          // not fused: the largest's exponent is exactly 0, however large it is
          x = exp2_approx(__fmul_rn(x, factor) - from);
          sum += x;
        }
      }
      sum_[r] = sum_[r] * rescale[r] + sum;
    }
    if constexpr (R::Grouped) prepare_value_scales(stage + S::VScales, rescale);
    if (__any_sync(AllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Columns; ++n) {
        o_[n][0] *= rescale[0], o_[n][1] *= rescale[0];
        o_[n][2] *= rescale[1], o_[n][3] *= rescale[1];
      }
    }
  }

  // A tile's scales and offsets of V times the powers of the largest V so far, in whose units O is kept, so
  // that a lane finds those of its tokens side by side: [group][t][token / 8][2], t half its number of 8.
  // Each lane has a token.
  __device__ __forceinline__ void prepare_value_scales(unsigned char* scales, float (&rescale)[2]) {
    constexpr int Words = R::Dim / 64;
    const DeviceCache& cache = kernel_.a.cache;
    // of an odd number for each head, those of every second head and token begin in the middle of a word
    const int groups = cache.value_groups;
    const int begin = ((lane_ & 1) * cache.kv_heads + span_.kv_head) * groups % 2;
    uint32_t words[2][Words + 1] = {}, bounds = 0;
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      if (2 * w >= groups) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i][w] = reinterpret_cast<const uint32_t*>(scales + i * S::VScaleBytes)[w * Tokens + lane_];
      }
    }
#pragma unroll
    for (int w = 0; w < Words; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i][w] = __funnelshift_r(words[i][w], words[i][w + 1], 16 * begin);
        if (2 * w + 1 >= groups) words[i][w] &= 0xffff;
      }
      bounds = max2(bounds, bounds_of<R::Bits>(words[0][w], words[1][w]));
    }
    const Powers<R::Bits> powers = Powers<R::Bits>::of(bounds);
    if (powers.up < v_powers_.up) {
      const float down = power_of_two(powers.up - v_powers_.up);
      rescale[0] *= down, rescale[1] *= down;
      v_powers_ = powers;
    }
    __syncwarp();
    const int at = lane_ % 8 / 2 * 8 + lane_ / 8 * 2 + lane_ % 2;
#pragma unroll
    for (int w = 0; w < Words; ++w) {
      if (2 * w >= groups) continue;
      v_powers_.apply(words[0][w], words[1][w]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned short* const to =
            reinterpret_cast<unsigned short*>(scales + i * S::VScaleBytes) + 2 * w * Tokens + at;
        to[0] = static_cast<unsigned short>(words[i][w]);
        if (2 * w + 1 < groups) to[Tokens] = static_cast<unsigned short>(words[i][w] >> 16);
      }
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

  __device__ __forceinline__ void add_codes(const unsigned char* stage, const uint32_t (&p)[2][4]) {
    uint32_t scale[TokenTiles], offset[TokenTiles];
    int group = -1;
    const uint32_t from = shared_address(stage + S::V) + place<S::Units>(lane_, 0);
#pragma unroll
    for (int u = 0; u < S::Units; ++u) {
      if constexpr (R::Grouped) {
        const int its = kernel_.value_groups >> (u * R::PerUnit / 32 * 4) & 15;
        if (u * R::PerUnit % 32 == 0 && its != group) {
          group = its;
          const unsigned char* const of_group = stage + S::VScales + group * Tokens * 2 + lane_ % 4 * 16;
          const uint4 a = *reinterpret_cast<const uint4*>(of_group);
          const uint4 b = *reinterpret_cast<const uint4*>(of_group + S::VScaleBytes);
          scale[0] = a.x, scale[1] = a.y, scale[2] = a.z, scale[3] = a.w;
          offset[0] = b.x, offset[1] = b.y, offset[2] = b.z, offset[3] = b.w;
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
            v[m][i] = fma2<__half>(v[m][i], scale[m], offset[m]);
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
  Powers<R::Bits> v_powers_ = {Powers<R::Bits>::Most};  // O is in their units
  Fragments<R> fragments_;
  float o_[Columns][4];
};

}  // namespace bitfuse::decode
