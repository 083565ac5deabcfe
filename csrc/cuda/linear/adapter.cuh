// Adapters that ride along in a kernel for few tokens: y[m] += s_e h[m] B_e^T, h[m] = x[m] A_e^T.
//
// Every block of the launch needs all of h, and h needs all of x and A: as a kernel of its own the shrink
// costs a launch, some 2 us; made anew by each block it would read A once a block, through an L2 that gives
// the whole machine 5 TB/s. So the first blocks of the launch make h between them, a slice of k each, while
// the copies that they have asked for are on their way, and any block adds its part of s h B^T once h is
// there.
//
// Work. Rows that share an adapter are a group, and a group and a tile of 16 of its ranks are a pair: A and B
// are read once a pair. The shrink of a pair is cut along k into slices, as many as there are blocks for; a
// slice of a pair is an item. A block takes item after item:
// - A is the A operand of mma.m16n8k16 (16 ranks a step), the group's rows of x the B operand (8 tokens).
//   Lane (g = lane / 4, t = lane % 4) holds A[k 8t..8t+7] of ranks g and g+8 and the same k of token g: one
//   16-byte load each for two steps, 64 bytes of each row a warp, 256 k the block. An A that is not of x's
//   type goes through tf32, in two parts where it is float32.
// - The sums of the block's warps meet in shared memory; those of a pair's slices in `partial`, added in the
//   order of k by the block that comes last. The same bits every time.
// The expansion of a pair is 16 more k of a warp's own sums: B's rows in the place of W's, h in the place of
// x. h is float32 and goes through tf32 in two parts, B exactly (float32: two parts).
//
// Waiting. `state` counts arrivals in its low half and, in its high half, the blocks that will not look
// again; the first block's farewell takes all of it back, so that the sum is zero when the last has gone: no
// reset, no second launch, and a replayed graph finds it as it left it. Whether h is there is the low half:
// see `ready`. A block waits only once its own part of the main loop is done, which is long after h is, as a
// rule. Blocks that wait could keep those that make h from starting, on a device that is busy with something
// else. So patience is short, and then a block makes all of h itself, with the same bits in the same places.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/linear/adapter.h"
#include "cuda/ptx/mma.cuh"

namespace bitfuse {

constexpr int AdapterWarps = 8;
constexpr int UnitK = 32 * AdapterWarps;   // of k that a block takes at a time
constexpr int TileSums = AdapterTileSums;  // [16 ranks][8 tokens]
constexpr int ScratchTiles = 4;            // of tokens whose sums a warp has room for at a time
constexpr int ScratchFloats = ScratchTiles * TileSums;
constexpr int Patience = 64;     // looks, half a microsecond apart, and one more for each PatienceK of a pair
constexpr int PatienceK = 8192;  // A at 0.5 TB/s

// The groups of a launch, the same in every block.
struct Groups {
  uint64_t tokens[AdapterMaxTokens];  // of x: a bit each
  int adapter[AdapterMaxTokens];
  unsigned char order[AdapterMaxTokens];       // rows of x, sorted by group
  unsigned char first[AdapterMaxTokens];       // this group's place in `order`
  unsigned short pairs[AdapterMaxTokens + 1];  // those before this group's
  int count, slices, makers;                   // makers: blocks that make h
  unsigned flag;

  __device__ int all_pairs() const { return pairs[count]; }
};

// x as the shrink reads it.
struct Rows {
  const void* x;
  int64_t stride;
  int m, k;
};

__device__ __forceinline__ int adapter_rank(const AdapterArgs& a, int adapter) {
  return a.table == nullptr
             ? a.rank
             : min(max(static_cast<int>(__ldg(a.table + 2 * a.adapters + adapter)), 0), a.rank);
}

__device__ __forceinline__ int float_bytes(AdapterFloat type) {
  return type == AdapterFloat::Float32 ? 4 : 2;
}

// The address of an adapter's A or B; `which` is its row of the table, `size` its numbers when stacked.
__device__ __forceinline__ const unsigned char* adapter_matrix(const AdapterArgs& a, int adapter, int which,
                                                               int64_t size) {
  if (a.table != nullptr) {
    return reinterpret_cast<const unsigned char*>(__ldg(a.table + which * a.adapters + adapter));
  }
  const void* const all = which == 0 ? a.lora_a : a.lora_b;
  return static_cast<const unsigned char*>(all) +
         adapter * size * float_bytes(which == 0 ? a.a_type : a.b_type);
}

// Sorts the rows of x by adapter; one warp, a lane two rows.
__device__ __forceinline__ void find_groups(const AdapterArgs& a, const Rows& rows, Groups& groups) {
  const int lane = threadIdx.x % 32;
  int ids[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = lane + 32 * half;
    ids[half] = -1;
    if (token < rows.m) {
      int64_t id = 0;
      if (a.ids != nullptr) {
        id = a.ids_are_64_bit ? static_cast<const int64_t*>(a.ids)[token]
                              : static_cast<const int*>(a.ids)[token];
      }
      if (id >= 0 && id < a.adapters && adapter_rank(a, static_cast<int>(id)) > 0)
        ids[half] = static_cast<int>(id);
    }
  }
  uint64_t same[2] = {0, 0};
  for (int other = 0; other < 32; ++other) {
    const int low = __shfl_sync(~0u, ids[0], other), high = __shfl_sync(~0u, ids[1], other);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      same[half] |= static_cast<uint64_t>(low == ids[half]) << other;
      same[half] |= static_cast<uint64_t>(high == ids[half]) << (other + 32);
    }
  }
  // a group's first row speaks for it: running sums over those of groups, their rows and their pairs
  int sum[2], own[2], begin[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool speaks = ids[half] >= 0 && __ffsll(static_cast<long long>(same[half])) - 1 == lane + 32 * half;
    own[half] = 0;
    if (speaks) {
      const int pairs = (adapter_rank(a, ids[half]) + RankTile - 1) / RankTile;
      own[half] = 1 | __popcll(same[half]) << 8 | pairs << 16;
    }
    sum[half] = own[half];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, sum[half], step);
      if (lane >= step) sum[half] += before;
    }
  }
  sum[1] += __shfl_sync(~0u, sum[0], 31);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    begin[half] = sum[half] - own[half];
    if (own[half] != 0) {
      const int group = begin[half] & 0xff;
      groups.tokens[group] = same[half];
      groups.adapter[group] = ids[half];
      groups.first[group] = begin[half] >> 8 & 0xff;
      groups.pairs[group] = begin[half] >> 16;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int speaker = __ffsll(static_cast<long long>(same[half])) - 1;
    const int low = __shfl_sync(~0u, begin[0], speaker & 31), high = __shfl_sync(~0u, begin[1], speaker & 31);
    if (ids[half] >= 0) {
      const int token = lane + 32 * half, before = __popcll(same[half] & ((uint64_t{1} << token) - 1));
      groups.order[((speaker < 32 ? low : high) >> 8 & 0xff) + before] = token;
    }
  }
  const int all = __shfl_sync(~0u, sum[1], 31);
  if (lane == 0) {
    const int pairs = all >> 16, units = (rows.k + UnitK - 1) / UnitK;
    groups.count = all & 0xff;
    groups.pairs[groups.count] = pairs;
    groups.slices = pairs == 0 ? 1 : max(1, min(units, a.participants / pairs));
    groups.makers = min(a.participants, pairs * groups.slices);
  }
}

__device__ __forceinline__ int group_of_pair(const Groups& groups, int pair) {
  int low = 0, high = groups.count;  // pairs[low] <= pair < pairs[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (groups.pairs[middle] <= pair)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A number's upper 19 bits, which tf32 keeps, and what they leave.
struct TwoParts {
  uint32_t high, low;

  __device__ __forceinline__ explicit TwoParts(float v) {
    high = __float_as_uint(v) & 0xffffe000;
    low = __float_as_uint(v - __uint_as_float(high)) & 0xffffe000;
  }
};

// 16-bit numbers or float32, of a pair in a word or of a word.
__device__ __forceinline__ float2 two_floats(uint32_t pair, AdapterFloat type) {
  if (type == AdapterFloat::Float16) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
}

// d += a b with a [16 x 8] and b [8 x 8] in tf32.
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 8 numbers of A from `at` on, as floats.
__device__ __forceinline__ void load_eight(const unsigned char* at, AdapterFloat type, bool valid,
                                           float (&v)[8]) {
  if (type == AdapterFloat::Float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = valid ? __ldg(reinterpret_cast<const float4*>(at) + i) : float4{};
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
  } else {
    const uint4 raw = valid ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{};
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = two_floats(words[i], type);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
}

template <typename T>
constexpr AdapterFloat FloatOf = std::is_same_v<T, __half> ? AdapterFloat::Float16 : AdapterFloat::BFloat16;

// The sums of an item for `Tiles` tiles of tokens from `tile` on: to `partial`, or where there is one slice
// to h. Native: A is of x's type. All threads of the block; `scratch` has ScratchFloats for each warp,
// `pitch` apart.
template <typename T, int Tiles, bool Native>
__device__ __forceinline__ void shrink_tiles(const AdapterArgs& a, const Rows& rows, const Groups& groups,
                                             int pair, int slice, int tile, int token_tiles, float* scratch,
                                             int pitch) {
  constexpr int Ahead = 2;  // 16 KiB of A on their way to a block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int group = group_of_pair(groups, pair), adapter = groups.adapter[group];
  const int count = __popcll(groups.tokens[group]) - 8 * tile, tiles = min((count + 7) / 8, Tiles);
  const unsigned char* const order = groups.order + groups.first[group] + 8 * tile;
  const int rank = adapter_rank(a, adapter), rank_begin = (pair - groups.pairs[group]) * RankTile;
  const int units = (rows.k + UnitK - 1) / UnitK;
  const int unit_begin = units * slice / groups.slices, unit_end = units * (slice + 1) / groups.slices;

  const int bytes = Native ? sizeof(T) : float_bytes(a.a_type);
  const int lane_k = 32 * warp + 8 * t;
  const unsigned char* const matrix = adapter_matrix(a, adapter, 0, static_cast<int64_t>(a.rank) * rows.k) +
                                      (static_cast<int64_t>(rank_begin + g) * rows.k + lane_k) * bytes;
  const int64_t eight_ranks = static_cast<int64_t>(8) * rows.k * bytes;
  const bool has_upper = rank_begin + g < rank, has_lower = rank_begin + g + 8 < rank;
  const T* of_tile[Tiles];
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    of_tile[j] = static_cast<const T*>(rows.x) + order[min(8 * j + g, count - 1)] * rows.stride + lane_k;
  }

  float sums[Tiles][4] = {};
  if constexpr (Native) {
    for (int unit = unit_begin; unit < unit_end; unit += Ahead) {
      uint4 upper[Ahead], lower[Ahead], first[Ahead];
#pragma unroll
      for (int i = 0; i < Ahead; ++i) {
        const int k = (unit + i) * UnitK;
        const bool valid = unit + i < unit_end && k + lane_k < rows.k;
        const unsigned char* const at = matrix + static_cast<int64_t>(k) * bytes;
        upper[i] = valid && has_upper ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{};
        lower[i] = valid && has_lower ? __ldg(reinterpret_cast<const uint4*>(at + eight_ranks)) : uint4{};
        first[i] = valid ? __ldg(reinterpret_cast<const uint4*>(of_tile[0] + k)) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < Ahead; ++i) {
        const int k = (unit + i) * UnitK;
        const bool valid = unit + i < unit_end && k + lane_k < rows.k;
        const uint32_t even[4] = {upper[i].x, lower[i].x, upper[i].y, lower[i].y};
        const uint32_t odd[4] = {upper[i].z, lower[i].z, upper[i].w, lower[i].w};
#pragma unroll
        for (int j = 0; j < Tiles; ++j) {
          if (j < tiles) {
            const uint4 x = j == 0  ? first[i]
                            : valid ? __ldg(reinterpret_cast<const uint4*>(of_tile[j] + k))
                                    : uint4{};
            mma_m16n8k16<T>(sums[j], even, x.x, x.y);
            mma_m16n8k16<T>(sums[j], odd, x.z, x.w);
          }
        }
      }
    }
  } else {
    static_assert(Tiles == 1);
    for (int unit = unit_begin; unit < unit_end; ++unit) {
      const int k = unit * UnitK;
      const bool valid = k + lane_k < rows.k;
      const unsigned char* const at = matrix + static_cast<int64_t>(k) * bytes;
      float upper[8], lower[8], x[8];
      load_eight(at, a.a_type, valid && has_upper, upper);
      load_eight(at + eight_ranks, a.a_type, valid && has_lower, lower);
      load_eight(reinterpret_cast<const unsigned char*>(of_tile[0] + k), FloatOf<T>, valid, x);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        // x has no more bits than tf32
        const uint32_t x0 = __float_as_uint(x[i]), x1 = __float_as_uint(x[i + 1]);
        const TwoParts a0(upper[i]), a1(lower[i]), a2(upper[i + 1]), a3(lower[i + 1]);
        mma_tf32(sums[0], a0.high, a1.high, a2.high, a3.high, x0, x1);
        if (a.a_type == AdapterFloat::Float32) mma_tf32(sums[0], a0.low, a1.low, a2.low, a3.low, x0, x1);
      }
    }
  }

  float* const to =
      a.partial + (static_cast<int64_t>(pair * groups.slices + slice) * token_tiles + tile) * TileSums;
#pragma unroll
  for (int round = 0; round < Tiles; round += ScratchTiles) {
    if (round >= tiles) break;
    float* const mine = scratch + warp * pitch + g * 8 + 2 * t;
#pragma unroll
    for (int j = round; j < Tiles && j < round + ScratchTiles; ++j) {
      if (j < tiles) {
        float* const here = mine + (j - round) * TileSums;
        *reinterpret_cast<float2*>(here) = {sums[j][0], sums[j][1]};
        *reinterpret_cast<float2*>(here + 8 * 8) = {sums[j][2], sums[j][3]};
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(tiles - round, ScratchTiles) * TileSums; i += 32 * AdapterWarps) {
      float sum = 0;
#pragma unroll
      for (int other = 0; other < AdapterWarps; ++other) sum += scratch[other * pitch + i];
      const int at = round * TileSums + i, token = 8 * (at / TileSums) + at % 8;
      const int r = rank_begin + at % TileSums / 8;
      if (token < count && r < rank) {
        // volatile: a block out of patience may write the same bits at the same time
        volatile float* const place =
            groups.slices == 1 ? a.h + order[token] * static_cast<int64_t>(a.rank) + r : to + at;
        *place = sum;
      }
    }
    __syncthreads();
  }
}

// The sums of an item; Alone is rare, and takes little code rather than little time.
template <typename T, int TokenTiles, bool Alone>
__device__ __forceinline__ void shrink_item(const AdapterArgs& a, const Rows& rows, const Groups& groups,
                                            int pair, int slice, float* scratch, int pitch) {
  const bool native = a.a_type == FloatOf<T>;
  if (native && !Alone) {
    shrink_tiles<T, TokenTiles, true>(a, rows, groups, pair, slice, 0, TokenTiles, scratch, pitch);
    return;
  }
  const int count = __popcll(groups.tokens[group_of_pair(groups, pair)]);
  for (int tile = 0; 8 * tile < count; ++tile) {
    if (native) {
      if constexpr (Alone) {
        shrink_tiles<T, 1, true>(a, rows, groups, pair, slice, tile, TokenTiles, scratch, pitch);
      }
    } else {
      shrink_tiles<T, 1, false>(a, rows, groups, pair, slice, tile, TokenTiles, scratch, pitch);
    }
  }
}

// The slices of a pair, which are all there, to h.
template <int TokenTiles>
__device__ __forceinline__ void add_slices(const AdapterArgs& a, const Groups& groups, int pair) {
  const int group = group_of_pair(groups, pair), count = __popcll(groups.tokens[group]);
  const unsigned char* const order = groups.order + groups.first[group];
  const int rank = adapter_rank(a, groups.adapter[group]),
            rank_begin = (pair - groups.pairs[group]) * RankTile;
  const float* const from = a.partial + static_cast<int64_t>(pair) * groups.slices * TokenTiles * TileSums;
  for (int i = threadIdx.x; i < (count + 7) / 8 * TileSums; i += 32 * AdapterWarps) {
    const int token = 8 * (i / TileSums) + i % 8, r = rank_begin + i % TileSums / 8;
    if (token >= count || r >= rank) continue;
    float sum = 0;
#pragma unroll 8
    for (int slice = 0; slice < groups.slices; ++slice) {
      sum += *static_cast<const volatile float*>(from + slice * TokenTiles * TileSums + i);
    }
    *static_cast<volatile float*>(a.h + order[token] * static_cast<int64_t>(a.rank) + r) = sum;
  }
}

// This block's share of h, or, Alone, all of it. All threads of the block.
template <typename T, int TokenTiles, bool Alone>
__device__ __forceinline__ void shrink(const AdapterArgs& a, const Rows& rows, Groups& groups, int block,
                                       float* scratch, int pitch) {
  const int items = groups.all_pairs() * groups.slices;
  for (int item = Alone ? 0 : block; item < items; item += Alone ? 1 : a.participants) {
    const int pair = item / groups.slices, slice = item % groups.slices;
    shrink_item<T, TokenTiles, Alone>(a, rows, groups, pair, slice, scratch, pitch);
    if (groups.slices == 1) continue;
    bool last = slice == groups.slices - 1;
    if constexpr (!Alone) {
      if (threadIdx.x == 0) {
        __threadfence();
        const unsigned final = groups.slices - 1;
        groups.flag = atomicInc(a.counters + pair, final) == final;
        __threadfence();
      }
      __syncthreads();
      last = groups.flag != 0;
    }
    if (last) add_slices<TokenTiles>(a, groups, pair);
    __syncthreads();
  }
  if (!Alone && threadIdx.x == 0) {
    __threadfence();
    atomicAdd(a.state, 1ull);
  }
}

// True when h is there: all have arrived, and before the first block's farewell that is their number, after
// it zero (see `leave`).
__device__ __forceinline__ bool ready(const AdapterArgs& a, const Groups& groups) {
  int64_t state;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(state) : "l"(a.state) : "memory");
  return static_cast<uint32_t>(state) == (state < 0 ? 0u : static_cast<uint32_t>(groups.makers));
}

// Returns when h is there, if need be made by this block. All threads of the block.
template <typename T, int TokenTiles>
__device__ __noinline__ void wait_for_h(const AdapterArgs& a, const Rows& rows, Groups& groups, int block,
                                        float* scratch, int pitch) {
  bool there = false;
  if (threadIdx.x == 0) {
    there = ready(a, groups);
    const int patience = Patience + groups.all_pairs() * (1 + rows.k / PatienceK);
    for (int look = 1; look < patience && !there; ++look) {
      __nanosleep(500);
      there = ready(a, groups);
    }
  }
  if (!__syncthreads_or(there)) shrink<T, TokenTiles, true>(a, rows, groups, block, scratch, pitch);
}

// A block's farewell: one thread of each block, when none of its threads will look at `state` again.
__device__ __forceinline__ void leave(const AdapterArgs& a, const Groups& groups, int block, int blocks) {
  constexpr unsigned long long One = 1ull << 32;
  atomicAdd(a.state, block == 0 ? 0ull - groups.makers - (blocks - 1) * One : One);
}

// Asks L2 for the rows of B that the block will need.
__device__ __forceinline__ void prefetch_expansion(const AdapterArgs& a, const Groups& groups, int n, int row,
                                                   int rows) {
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups.count; group += AdapterWarps) {
    const int adapter = groups.adapter[group], row_bytes = adapter_rank(a, adapter) * float_bytes(a.b_type);
    const unsigned char* const from = adapter_matrix(a, adapter, 1, static_cast<int64_t>(n) * a.rank) +
                                      static_cast<int64_t>(row) * row_bytes;
    const int bytes = min(rows, n - row) * row_bytes;
    for (int at = 128 * lane; at < bytes; at += 128 * 32) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
    }
  }
}

// 4 numbers of a row of B, of which the first so many are `there`, the others 0; `whole`: all are, and lie at
// a multiple of their size.
__device__ __forceinline__ void load_four(const unsigned char* at, AdapterFloat type, int there, bool whole,
                                          float (&v)[4]) {
  v[0] = v[1] = v[2] = v[3] = 0;
  if (there == 0) return;
  if (type == AdapterFloat::Float32) {
    if (whole) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(at));
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = i < there ? __ldg(reinterpret_cast<const float*>(at) + i) : 0.0f;
    }
    return;
  }
  uint32_t pairs[2];
  if (whole) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(at));
    pairs[0] = two.x, pairs[1] = two.y;
  } else {
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves[i] = i < there ? __ldg(reinterpret_cast<const unsigned short*>(at) + i) : 0;
    }
    pairs[0] = halves[0] | halves[1] << 16, pairs[1] = halves[2] | halves[3] << 16;
  }
  const float2 low = two_floats(pairs[0], type), high = two_floats(pairs[1], type);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// sums [tokens][16 * RowTiles, `pitch` apart] += s h B^T for the outputs from `row` on, and of every second,
// fourth, ... pair: those from `pair` on, `stride` apart. One warp, whose own the sums are: a lane has rows
// g, g+8, ... of tokens 2t and 2t+1 of each eight, as in a fragment of mma.m16n8k16.
template <int RowTiles>
__device__ __noinline__ void expand(const AdapterArgs& a, const Groups& groups, int n, int row, int pair,
                                    int stride, float* sums, int pitch) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (; pair < groups.all_pairs(); pair += stride) {
    const int group = group_of_pair(groups, pair), adapter = groups.adapter[group];
    const uint64_t tokens = groups.tokens[group];
    const int rank = adapter_rank(a, adapter), r = (pair - groups.pairs[group]) * RankTile + 4 * t;
    const int bytes = float_bytes(a.b_type), there = min(max(rank - r, 0), 4);
    const unsigned char* const matrix = adapter_matrix(a, adapter, 1, static_cast<int64_t>(n) * a.rank);
    const bool whole = there == 4 && rank % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % (4 * bytes) == 0;
    // h of the next eight tokens of the group, from L2 while B is on its way, or while this eight's is in use
    uint64_t rest = tokens;
    int eight = 0;
    float next[4] = {};
    auto next_eight = [&] {
      eight = (__ffsll(static_cast<long long>(rest)) - 1) & ~7;
      const bool has = rest >> (eight + g) & 1;
      rest &= ~(uint64_t{0xff} << eight);
      const float* const from = a.h + (eight + g) * static_cast<int64_t>(a.rank) + r;
      if (a.rank % 4 == 0 && there == 4) {
        const float4 four = has ? __ldcg(reinterpret_cast<const float4*>(from)) : float4{};
        next[0] = four.x, next[1] = four.y, next[2] = four.z, next[3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) next[i] = has && i < there ? __ldcg(from + i) : 0.0f;
      }
    };
    next_eight();
    const float scale = a.scaling_by * (a.scaling == nullptr ? 1.0f : __ldg(a.scaling + adapter));
    float b[2 * RowTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * RowTiles; ++i) {
      const int output = row + 8 * i + g;
      load_four(matrix + (static_cast<int64_t>(output) * rank + r) * bytes, a.b_type, output < n ? there : 0,
                whole, b[i]);
    }
    for (bool more = true; more;) {
      const float h[4] = {scale * next[0], scale * next[1], scale * next[2], scale * next[3]};
      const int to = eight;
      more = rest != 0;
      if (more) next_eight();
      float d[RowTiles][4] = {};
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        const TwoParts h0(h[step]), h1(h[step + 1]);
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
          const TwoParts b0(b[2 * i][step]), b1(b[2 * i + 1][step]);
          const TwoParts b2(b[2 * i][step + 1]), b3(b[2 * i + 1][step + 1]);
          mma_tf32(d[i], b0.high, b1.high, b2.high, b3.high, h0.high, h1.high);
          mma_tf32(d[i], b0.high, b1.high, b2.high, b3.high, h0.low, h1.low);
          if (a.b_type == AdapterFloat::Float32) {
            mma_tf32(d[i], b0.low, b1.low, b2.low, b3.low, h0.high, h1.high);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          // what is no number in B is nothing to the other groups' tokens of this eight
          const int token = to + 2 * t + c % 2;
          if (tokens >> token & 1) sums[token * pitch + 16 * i + 8 * (c / 2) + g] += d[i][c];
        }
      }
    }
  }
}

}  // namespace bitfuse
