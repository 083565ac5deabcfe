// decode_attention: a few queries of each sequence against its cache.
//
// Bound: the bytes of K and V, each read once. The rows of a tile are the queries of a kv head (its query
// heads times the query tokens), 16 of them, so that K and V meet all of them when they are read. More rows
// are more tiles, which read K and V again, but in step with the first, so that L2 has them.
//
// Work. A unit is a tile of tokens for each of a block's 4 warps (decode_walk.cuh). The units of all
// (row tile, sequence, kv head) lie in one line, and each block takes an equal stretch of it, however long
// the sequences are: blocks read the lengths and work out their stretch themselves, the host knows only
// shapes. A stretch is walked row by row of that line; where it has part of a row, the outputs go to memory
// in float32, and the last block to come adds up the parts in the order of the blocks: the same bits every
// time. The tail of a sequence, in full precision, is the last units of its rows.
//
// By count (tests/cusim, head_dim 128, 8 query heads a kv head) a token of a kv head is, on an H100 with its
// 14.5 bytes and 4 instructions a clock and multiprocessor:
//
//     cache       bytes                         of memory's clocks    instructions    of issue
//     bfloat16    512                           35.4                  23.7            17%
//     fp8         256                           17.7                  24.4            34%
//     int8        256 + 8 of K's scales + 4     18.5                  30.6            41%
//     int4        128 + 16 + 16                 11.1                  33.1            75%
//
// Two blocks a multiprocessor with 2 to 4 tiles of 5 to 9 KB on their way in each of 8 warps are 130 to 160
// KB in flight, where latency times bandwidth asks for some 20.
#pragma once

#include <cuda_runtime.h>

#include <array>

#include "cuda/attention/decode_attention.h"
#include "cuda/attention/decode_walk.cuh"

namespace bitfuse::decode {

// Which keys of a sequence are to be met, and in how many units of which kind.
struct Extent {
  int length;      // with new tokens
  int begin, end;  // of what the cache holds
  int units;       // of those; a sequence that has no keys has one of nothing
  int tail_begin, tail_units;
};

template <class R>
__device__ __forceinline__ Extent extent_of(const Kernel& kernel, int seqlen) {
  const DecodeParams& a = kernel.a;
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

// A row of the line: a row tile of a kv head of a sequence.
struct FoundRow {
  int sequence, kv_head, tile;
  unsigned start;  // its first unit in the line
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

// Of one row tile of all.
template <class R>
__device__ __forceinline__ unsigned units_of_tile(const Kernel& kernel) {
  unsigned mine = 0;
  for (int b = threadIdx.x % 32; b < kernel.a.cache.batch; b += 32) {
    int seqlen;
    mine += units_of<R>(kernel, b, seqlen);
  }
  return __reduce_add_sync(AllLanes, mine) * kernel.a.cache.kv_heads;
}

template <class R>
__device__ __forceinline__ FoundRow find_row(const Kernel& kernel, unsigned at, unsigned a_tile) {
  const int lane = threadIdx.x % 32, kv_heads = kernel.a.cache.kv_heads;
  unsigned before = at / a_tile * a_tile;
  for (int first = 0;; first += 32) {
    int seqlen;
    const unsigned units = units_of<R>(kernel, first + lane, seqlen);
    unsigned sum = units * kv_heads;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(AllLanes, sum, step);
      if (lane >= step) sum += below;
    }
    const unsigned past = __ballot_sync(AllLanes, at < before + sum);
    if (past != 0) {
      const int found = __ffs(past) - 1;
      FoundRow row;
      row.sequence = first + found, row.tile = at / a_tile;
      row.units = __shfl_sync(AllLanes, units, found);
      row.seqlen = __shfl_sync(AllLanes, seqlen, found);
      row.start = before + __shfl_sync(AllLanes, sum, found) - row.units * kv_heads;
      row.kv_head = (at - row.start) / row.units;
      row.start += row.kv_head * row.units;
      return row;
    }
    before += __shfl_sync(AllLanes, sum, 31);
  }
}

// What of a row's output is known when its parts are: out = factor * sum of exp2(m - most) * o.
struct Finished {
  float most, factor;
};

// From the largest maximum of a row's parts and the sum over it; writes lse.
__device__ __forceinline__ Finished finish(const Kernel& kernel, int sequence, int kv_head, int flat,
                                           float most, float sum) {
  const DecodeParams& a = kernel.a;
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
  const DecodeParams& a = kernel.a;
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
  // by one block, whose loads must fill their own waits: 16 parts' at once
  constexpr int Together = 2;
  const int quads = rows * (Dim / 4);
  for (int from = threadIdx.x; from < quads; from += Together * Threads) {
    float4 sums[Together] = {};
#pragma unroll 8
    for (int j = 0; j < parts; ++j) {
#pragma unroll
      for (int k = 0; k < Together; ++k) {
        const int i = min(from + k * Threads, quads - 1), row = i / (Dim / 4);
        const float weight = exp2_approx(state(j, row).x - finished[row].x) * finished[row].y;
        const float4 o = __ldcg(reinterpret_cast<const float4*>(part(j)) + i);
        sums[k].x += weight * o.x, sums[k].y += weight * o.y;
        sums[k].z += weight * o.z, sums[k].w += weight * o.w;
      }
    }
#pragma unroll
    for (int k = 0; k < Together; ++k) {
      const int i = from + k * Threads, c = i % (Dim / 4) * 4;
      if (i >= quads || c >= kernel.a.cache.dim_v) continue;
      store_four(kernel, span.sequence, span.kv_head, span.first_row + i / (Dim / 4), c, sums[k]);
    }
  }
}

template <int Dim>
__device__ __forceinline__ unsigned char* region_of(const Kernel& kernel, unsigned char* shared, int warp) {
  return shared + RegionsAt<Dim> + warp * kernel.region_bytes;
}
__device__ __forceinline__ uint32_t* masks_of(unsigned char* shared, int warp) {
  return reinterpret_cast<uint32_t*>(shared) + warp * MostStages;
}

struct Stretch {
  FoundRow row;
  int length, begin, from, until;  // begin: of unit 0
};

// The tail of a row's sequence; the warps leave their sums beside those of the walk over codes. Not a part of
// each kernel for codes: it is compiled once for each type and dim.
template <class R>
__device__ __noinline__ void walk_tail(const Kernel& kernel, const Stretch& stretch, unsigned char* shared) {
  const DeviceCache& cache = kernel.a.cache;
  const int warp = __shfl_sync(AllLanes, threadIdx.x / 32, 0);
  unsigned char* const queries = shared + MaskBytes;
  unsigned char* const region = region_of<R::Dim>(kernel, shared, warp) + kernel.sum_bytes;
  Span span;
  span.sequence = stretch.row.sequence;
  span.kv_head = stretch.row.kv_head;
  span.first_row = stretch.row.tile * RowTile;
  span.length = stretch.length;
  span.begin = stretch.begin + stretch.from * (Warps * R::Tokens);
  span.end = stretch.length;
  span.units = stretch.until - stretch.from;
  Source source;
  source.k_units = cache.dim / R::PerUnit, source.v_units = cache.dim_v / R::PerUnit;
  source.k = static_cast<const unsigned char*>(cache.k_tail) + span.kv_head * source.k_units * 16;
  source.v = static_cast<const unsigned char*>(cache.v_tail) + span.kv_head * source.v_units * 16;
  source.k_slot = cache.kv_heads * source.k_units, source.k_page = 2 * cache.group_size * source.k_slot;
  source.v_slot = cache.kv_heads * source.v_units, source.v_page = 2 * cache.group_size * source.v_slot;
  source.table = nullptr;
  source.page = span.sequence, source.pages = 0;
  source.log_page_size = 31;
  source.slot_mask = 2 * cache.group_size - 1;
  Walk<R> walk(kernel, span, source, region, masks_of(shared, warp), TailStages);
  walk.start();
  load_queries<R>(kernel, span, queries);
  __syncthreads();
  walk.run(queries);
  walk.leave(region);
}

// Units `from` to `until` of a row: its output, or this block's part of it.
template <class R>
__device__ __forceinline__ void attend(const Kernel& kernel, const FoundRow& row, int from, int until,
                                       int blocks, unsigned total, unsigned char* shared) {
  constexpr int Dim = R::Dim;
  const DecodeParams& a = kernel.a;
  const DeviceCache& cache = a.cache;
  const Extent extent = extent_of<R>(kernel, row.seqlen);
  const int warp = __shfl_sync(AllLanes, threadIdx.x / 32, 0);
  unsigned char* const queries = shared + MaskBytes;
  unsigned char* const region = region_of<Dim>(kernel, shared, warp);
  Span span;
  span.sequence = row.sequence;
  span.kv_head = row.kv_head;
  span.first_row = row.tile * RowTile;
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
    Walk<R> walk(kernel, span, source, region, masks_of(shared, warp), kernel.stages);
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
      const Stretch of_tail = {row, extent.length, extent.tail_begin, tail_from, tail_until};
      if (cache.type == Float::Float16) {
        walk_tail<Dense<__half, Dim>>(kernel, of_tail, shared);
      } else {
        walk_tail<Dense<__nv_bfloat16, Dim>>(kernel, of_tail, shared);
      }
    }
  }
  __syncthreads();

  // the warps' sums, weighted: those of the walk over the cache, then those over the tail
  const int first_sum = main ? 0 : Warps, sums = (main ? Warps : 0) + (tail ? Warps : 0);
  auto sum_at = [&](int i) {
    i += first_sum;
    return region_of<Dim>(kernel, shared, i % Warps) + i / Warps * kernel.sum_bytes;
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
    auto state = [&](int i) { return reinterpret_cast<const float2*>(sum_at(i))[r]; };
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
      const float4 o = *reinterpret_cast<const float4*>(sum_at(j) + StateBytes + (r * SumPitch<Dim> + c) * 4);
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
    const int counter = (row.tile * cache.batch + row.sequence) * cache.kv_heads + row.kv_head;
    last = atomicInc(a.counters + counter, others) == others;
    __threadfence();
  }
  if (__syncthreads_or(last)) merge_parts<Dim>(kernel, span, first_block, last_block, finished);
}

template <class R>
__global__ void __launch_bounds__(Threads, R::Dim <= 128 ? 2 : 1)
    decode_attention_kernel(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned a_tile = units_of_tile<R>(kernel), total = a_tile * kernel.row_tiles;
  const unsigned blocks = min(gridDim.x, max(1u, total / kernel.least_units));
  if (blockIdx.x >= blocks) return;
  unsigned at = static_cast<unsigned long long>(total) * blockIdx.x / blocks;
  const unsigned end = static_cast<unsigned long long>(total) * (blockIdx.x + 1) / blocks;
  while (at < end) {
    const FoundRow row = find_row<R>(kernel, at, a_tile);
    const unsigned until = min(end, row.start + row.units);
    attend<R>(kernel, row, at - row.start, until - row.start, blocks, total, shared);
    at = until;
    __syncthreads();
  }
}

// A kernel, and what of shared memory it needs.
struct Instance {
  void (*function)(Kernel);
  int dim, tokens, stage_bytes, regions_at;
  int sum_bytes[2];  // of a warp, with up to 8 rows or more
  int tail_bytes;    // of a warp's walk over a tail
};

template <class R>
constexpr Instance instance_of() {
  constexpr int Dim = R::Dim, Tail = R::Grouped ? TailBytes<Dim> : 0;
  return {decode_attention_kernel<R>,
          Dim,
          R::Tokens,
          Stage<R>::Bytes,
          RegionsAt<Dim>,
          {sum_bytes<Dim>(8), sum_bytes<Dim>(16)},
          Tail};
}

// By dim: 64, 128 and 256.
constexpr int Dims = 3;
using InstancesByDim = std::array<Instance, Dims>;

template <template <int> class R>
constexpr InstancesByDim by_dim() {
  return {instance_of<R<64>>(), instance_of<R<128>>(), instance_of<R<256>>()};
}

// For fp8, int8 and int4; in decode_attention_codes.cu.
extern const InstancesByDim OfCodes[3];

}  // namespace bitfuse::decode
