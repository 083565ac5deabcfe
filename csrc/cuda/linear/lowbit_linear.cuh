// lowbit_linear for few tokens: y[m, n] = sum_k x[m, k] w[n, k] + bias[n], w decoded in registers.
//
// Bound: up to some 16 tokens the bytes of codes and scales where memory gives a multiprocessor 12 bytes a
// clock (H100, A100; an RTX 4090's 3), the issue of instructions where it gives 16 and more (H200, B200); by
// 64 tokens the tensor cores' mma.sync rate, which is near the bytes then. So codes go from the canonical
// layout to shared memory with three of four stages always on their way, and on to registers with as few
// instructions as there are.
//
// Layout. W is the A operand of mma.m16n8k16 (16 outputs a step), x the B operand (8 tokens), and since k is
// summed over, any order of k serves if both operands follow it: the canonical layout is taken as it stands.
// - A warp has 32 outputs, two tiles of 16, and takes of each row a chunk of 64 bytes at a time: 128 codes of
//   4 bits, 64 of 8 bits.
// - A stage is a warp's chunk: 32 rows of 4 units of 16 bytes, 2 KiB. Each lane copies unit lane % 4 of rows
//   lane / 4 + 8 i, so a row is read in 64 bytes. Unit u of row r lies at 4 r + (u ^ swizzle(r)): neither
//   writing nor reading meets a bank twice.
// - A span is 32 consecutive k, two steps of k16. Lane (g = lane / 4, t = lane % 4) holds codes 8t..8t+7 of
//   rows g, g+8, g+16 and g+24, and x[8t..8t+7] of token g, which is one 16-byte read for both steps.
// - A panel is x[all tokens, a power of two of chunks], swizzled, shared by the warps that stand side by side
//   in n. Where a format's pairs are not neighbours, each thread reorders the units that it has copied.
// Decoding is 9 instructions for 8 codes of int4 (float16), 12 and 4 table reads of a codebook; a span of 512
// bytes, for up to 8 tokens, is 96 instructions a warp and 8 shared-memory wavefronts (24 of a
// codebook). A span never straddles a group (groups are a multiple of 32, or the row), so a group's scale
// meets float32 sums: codes minus zero points are multiplied exactly, and no weight is rounded. A float
// offset meets the sum of a span's x, which a product with ones gives each lane for its tokens.
//
// Start. Weights depend on no kernel before this one: their first stages are on their way to L2 while that
// one ends (grid_dependency.cuh), for which a block needs no more than where its rows and its chunks begin:
// the host has divided.
//
// Order. The weights' pipeline is each warp's own and needs no block barrier; the one there is comes with a
// new panel of x. Warps that split k, and then blocks, are added in a fixed order, whoever is last: the same
// bits every time.
#pragma once

#include <cuda_runtime.h>

#include <array>

#include "cuda/linear/adapter.cuh"
#include "cuda/linear/dequant.cuh"
#include "cuda/linear/lowbit_linear.h"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"

namespace bitfuse {

constexpr int LogWarps = 3;
constexpr int Warps = 1 << LogWarps;
constexpr int Threads = 32 * Warps;
constexpr int Stages = 4;
constexpr int RowTiles = 2;  // of 16 outputs, a warp
constexpr int LaneRows = 2 * RowTiles;
constexpr int WarpRows = 16 * RowTiles;
constexpr int ChunkBytes = 64;
constexpr int StageBytes = WarpRows * ChunkBytes;
constexpr int RingBytes = Warps * Stages * StageBytes;
constexpr int SpanK = 32;
constexpr int NestedLevels = 256;
constexpr int NestedBlock = 256;        // scales under one second-level scale
constexpr int SumPitch = WarpRows + 4;  // floats between tokens: tokens 2t.. and rows g fall into 32 banks

// Tokens that a panel has room for: a lane reads x of every token in its tiles.
__host__ __device__ constexpr int panel_tokens(int m, int token_tiles) {
  return token_tiles == 1 ? m : 8 * token_tiles;
}
template <int Bits>
constexpr int LogChunkK = Bits == 4 ? 7 : 6;
template <int Bits>
constexpr int ChunkK = 1 << LogChunkK<Bits>;
static_assert(ChunkK<4> == ChunkBytes * 8 / 4 && ChunkK<8> == ChunkBytes * 8 / 8);
constexpr int sum_bytes(int token_tiles) { return Warps * 8 * token_tiles * SumPitch * 4; }

// A block's work and what it derives from the plan; the same for every block but for the ranges.
struct Kernel {
  LowbitLinearArgs a;
  AdapterArgs adapter;
  Rows rows;  // for the adapter
  int log_warps_n, log_panel, panel_buffers, splits, flush, nested_offset, groups_offset, ring_offset;
  // What the plan and the sizes say once for all blocks, so that none of them divides: chunks of a split, and
  // those that are left over; the inverse of `splits`; spans of a group, and their logarithm where it is
  // whole (31 where a row is one group), else -1; groups, and spans more, that a warp goes on by in a step.
  int chunks_a_split, chunks_left, inverse_splits;
  int group_spans, log_group_spans, groups_a_step, spans_a_step;
  bool aligned;  // rows of codes start at multiples of 16 bytes, and have no other end
};
constexpr int LogInverse = 20;  // inverse_splits = ceil(2^LogInverse / splits)
constexpr int MostSplits = 64;  // for which that is exact
constexpr int GroupsBytes = (sizeof(Groups) + 127) / 128 * 128;
static_assert(Warps == AdapterWarps && ScratchFloats * 4 <= StageBytes);

// Places of the 4 units of rows 0..7 (then again): with 4-byte reads of one unit, or 8-byte reads of two
// neighbours, eight, or four, rows spread over all banks.
__device__ __forceinline__ int swizzle(int row) { return (row & 2) | ((row >> 2) & 1); }

// floor(chunks * split / splits), where split `split` begins.
__device__ __forceinline__ int first_chunk(const Kernel& kernel, int split) {
  return split * kernel.chunks_a_split + (kernel.chunks_left * split * kernel.inverse_splits >> LogInverse);
}

// The scales and zero points (or offsets) of a lane's rows in one group, as they are stored: loads that
// nothing waits for yet.
struct Scales {
  uint32_t scale[LaneRows];
  uint32_t zero[LaneRows];
  int index;  // of the first row's scale
};

// `rows[r]` is how many rows of scales the lane's r-th row is from its first: 8 r, less where a warp has not
// so many; 0 where they share one. In its last eight there may be none of the lane's: then the last scale of
// all is read, and not used.
__device__ __forceinline__ int scale_place(const LowbitLinearArgs& a, int index, int rows) {
  return min(index + rows * a.scales_stride, a.last_scale);
}

template <bool HasOffset>
__device__ __forceinline__ void load_scales(const LowbitLinearArgs& a, int row, const int (&rows)[LaneRows],
                                            int group, Scales& s) {
  s.index = row * a.scales_stride + group;
  if (a.scale_type == ScaleType::Float16 || a.scale_type == ScaleType::BFloat16) {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      s.scale[r] = __ldg(static_cast<const unsigned short*>(a.scales) + scale_place(a, s.index, rows[r]));
    }
  } else if (a.scale_type == ScaleType::Float32) {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      s.scale[r] = __ldg(static_cast<const unsigned*>(a.scales) + scale_place(a, s.index, rows[r]));
    }
  } else {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      s.scale[r] = __ldg(static_cast<const unsigned char*>(a.scales) + scale_place(a, s.index, rows[r]));
    }
  }
  if constexpr (HasOffset) {
    const bool wide = a.offset_type == ScaleType::Float32;
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      const int place = min((row + rows[r]) * a.zeros_stride + group, a.last_zero);
      s.zero[r] = wide ? __ldg(static_cast<const unsigned*>(a.offsets) + place)
                       : __ldg(static_cast<const unsigned short*>(a.offsets) + place);
    }
  } else if (a.zeros != nullptr) {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      s.zero[r] = __ldg(a.zeros + min((row + rows[r]) * a.zeros_stride + group, a.last_zero));
    }
  }
}

__device__ __forceinline__ void scale_values(const LowbitLinearArgs& a, const int (&rows)[LaneRows],
                                             const Scales& s, const float* nested,
                                             float (&values)[LaneRows]) {
  if (a.scale_type == ScaleType::Float16) {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      values[r] = __half2float(__ushort_as_half(static_cast<unsigned short>(s.scale[r])));
    }
  } else if (a.scale_type == ScaleType::Nested) {
    // one second-level scale serves 256 neighbours: it is in L1
    const float offset = __ldg(a.scale_offset);
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      const float second = __ldg(a.scale_scales + scale_place(a, s.index, rows[r]) / NestedBlock);
      values[r] = nested[s.scale[r]] * second + offset;
    }
  } else if (a.scale_type == ScaleType::E8M0) {
    // 2^(bits - 127): a subnormal float32 at 0, NaN at 255
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      const uint32_t bits = s.scale[r];
      values[r] = __uint_as_float(bits == 0 ? 0x00400000u : bits == 255 ? 0x7fffffffu : bits << 23);
    }
  } else {
    const int shift = a.scale_type == ScaleType::BFloat16 ? 16 : 0;
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) values[r] = __uint_as_float(s.scale[r] << shift);
  }
}

// Stored in a float dtype.
__device__ __forceinline__ float float_of(uint32_t bits, ScaleType type) {
  if (type == ScaleType::Float16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(type == ScaleType::BFloat16 ? bits << 16 : bits);
}

// Outputs n and n + 1, n even, of a token; where n is the last, the first of them.
template <typename T>
__device__ __forceinline__ void store_pair(const LowbitLinearArgs& a, int token, int n, float2 sum) {
  const bool two = n + 1 < a.n;
  if (a.out_scale != nullptr) {
    sum.x *= __ldg(a.out_scale + n);
    if (two) sum.y *= __ldg(a.out_scale + n + 1);
  }
  if (a.bias != nullptr) {
    const T* bias = static_cast<const T*>(a.bias) + n;
    sum.x += static_cast<float>(bias[0]);
    if (two) sum.y += static_cast<float>(bias[1]);
  }
  store_two<T>(static_cast<T*>(a.y) + static_cast<int64_t>(token) * a.n + n, sum, two, a.n % 2 == 0);
}

template <typename T, template <typename> class Format, int TokenTiles, bool Adapter>
__global__ void __launch_bounds__(Threads, TokenTiles <= 2 ? 2 : 1)
    lowbit_linear_kernel(const __grid_constant__ Kernel kernel) {
  using F = Format<T>;
  constexpr int ChunkK = bitfuse::ChunkK<F::Bits>, Spans = ChunkK / SpanK, Words = F::Bits / 4;
  extern __shared__ __align__(1024) unsigned char shared[];
  const LowbitLinearArgs& a = kernel.a;

  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), g = lane / 4, t = lane % 4;
  const int log_warps_k = LogWarps - kernel.log_warps_n;
  const int warps_n = 1 << kernel.log_warps_n, warps_k = 1 << log_warps_k;
  const int warp_k = warp >> kernel.log_warps_n;
  const int tile_row = blockIdx.x * (WarpRows << kernel.log_warps_n);
  const int warp_row = tile_row + (warp & (warps_n - 1)) * WarpRows;

  const int chunk_begin = first_chunk(kernel, blockIdx.y), chunk_end = first_chunk(kernel, blockIdx.y + 1);
  const int row_bytes = a.k * F::Bits / 8;
  // the first stages' codes on their way to L2 while the kernel before this one ends: a thread has a row's
  if (kernel.aligned && threadIdx.x < WarpRows << kernel.log_warps_n && tile_row + threadIdx.x < a.n) {
    const int begin = chunk_begin * ChunkBytes;
    const int end = min(chunk_end * ChunkBytes, row_bytes);
    const int bytes = min((Stages - 1) * ChunkBytes << log_warps_k, end - begin);
    prefetch_early(a.qweight + static_cast<int64_t>(tile_row + threadIdx.x) * a.qweight_stride + begin,
                   bytes);
  }
  wait_for_previous();
  let_next_start();

  const int steps = (chunk_end - chunk_begin + warps_k - 1) >> log_warps_k;
  const int panel_steps = 1 << kernel.log_panel, panel_k = ChunkK * warps_k << kernel.log_panel;

  unsigned char* const ring = shared + kernel.ring_offset;
  unsigned char* const panels = ring + RingBytes;
  float* const nested = reinterpret_cast<float*>(shared + kernel.nested_offset);
  const int panel_pitch = panel_k * static_cast<int>(sizeof(T));
  const int panel_bytes = panel_tokens(a.m, TokenTiles) * panel_pitch;

  // copying codes: this lane's unit of rows lane/4 + 8i; those that there are not are neither copied nor
  // stored
  const int row_eights = min(LaneRows, (a.n - warp_row + 7) >> 3);
  const int lane_rows = min(LaneRows, (a.n - warp_row - g + 7) >> 3);
  const int64_t eight_rows = 8 * a.qweight_stride;
  const uint32_t copy_to = shared_address(ring) + warp * Stages * StageBytes + 16 * (lane ^ swizzle(g));
  const uint64_t policy = evict_first_policy();
  int to_copy = chunk_begin + warp_k;
  unsigned copy_stage = 0;
  int row_rest = row_bytes - to_copy * ChunkBytes - 16 * t;  // from this lane's unit on
  const unsigned char* from = a.qweight + (warp_row + g) * a.qweight_stride + to_copy * ChunkBytes + 16 * t;
  auto copy_chunk = [&] {
    if (to_copy < chunk_end) {
      const uint32_t to = copy_to + copy_stage;
      if (kernel.aligned) {
#pragma unroll
        for (int i = 0; i < LaneRows; ++i) {
          if (i < lane_rows) {
            cp_async_16_stream(to + 8 * i * ChunkBytes, from + i * eight_rows, row_rest > 0, policy);
          }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < lane_rows; ++i) {
#pragma unroll
          for (int word = 0; word < 16; word += 4) {
            cp_async_4(to + 8 * i * ChunkBytes + word, from + i * eight_rows + word, row_rest > word);
          }
        }
      }
    }
    to_copy += warps_k;
    from += warps_k * ChunkBytes;
    row_rest -= warps_k * ChunkBytes;
    copy_stage = (copy_stage + StageBytes) % (Stages * StageBytes);
  };

  // copying x: units of 8 numbers; odd tokens have the halves of each 128 bytes swapped, so that the 16-byte
  // reads of two tokens' 64 bytes meet no bank twice
  const int log_units = LogChunkK<F::Bits> - 3 + log_warps_k + kernel.log_panel;
  const int units = a.m << log_units;
  auto unit_at = [&](int unit, int token) { return 16 * (unit ^ ((token & 1) << 2)); };
  auto copy_panel = [&](int panel, int buffer) {
    const int from_k = chunk_begin * ChunkK + panel * panel_k;
    const int to_k = min(a.k, chunk_end * ChunkK);
    const uint32_t to = shared_address(panels) + buffer * panel_bytes;
    if (from_k >= to_k) return;
    for (int i = threadIdx.x; i < units; i += Threads) {
      const int token = i >> log_units, k = from_k + 8 * (i & ((1 << log_units) - 1));
      cp_async_16(to + unit_at(i, token), static_cast<const T*>(a.x) + token * a.x_stride + k, k < to_k);
    }
  };
  // puts this thread's units of a panel, which have arrived, in the order of the format's pairs
  auto order_panel = [&](int buffer) {
    for (int i = threadIdx.x; i < units; i += Threads) {
      uint4* const unit =
          reinterpret_cast<uint4*>(panels + buffer * panel_bytes + unit_at(i, i >> log_units));
      *unit = order_like_pairs(*unit);
    }
  };

  // fill the pipeline, then do what else is to be done once
  const int panels_ahead = kernel.panel_buffers - 1;
  copy_chunk();
  copy_panel(0, 0);
  cp_async_commit();
#pragma unroll
  for (int step = 1; step < Stages - 1; ++step) {
    if (step < panels_ahead) copy_panel(step, step);
    copy_chunk();
    cp_async_commit();
  }

  // this lane's scales: of its four rows, and of a chunk's spans the one of its number
  const int scale_row = (warp_row + g) >> a.log_scale_rows;
  const int scale_eights = a.log_scale_rows == 0 ? row_eights : 1;  // a warp's rows share one, then
  int rows[LaneRows];
#pragma unroll
  for (int r = 0; r < LaneRows; ++r) rows[r] = 8 * min(r, scale_eights - 1);
  const int first_span = (chunk_begin + warp_k) * Spans + t % Spans;
  int group =
      kernel.log_group_spans >= 0 ? first_span >> kernel.log_group_spans : first_span / kernel.group_spans;
  int in_group = first_span - group * kernel.group_spans;  // spans
  Scales scales;
  auto next_scales = [&] {
    load_scales<F::HasOffset>(a, scale_row, rows, min(group, a.groups - 1), scales);
    group += kernel.groups_a_step;
    in_group += kernel.spans_a_step;
    if (in_group >= kernel.group_spans) in_group -= kernel.group_spans, ++group;
  };

  if constexpr (!Adapter) next_scales();
  if (a.scale_type == ScaleType::Nested) nested[threadIdx.x] = __ldg(a.nested_levels + threadIdx.x);
  if constexpr (F::TableBytes > 0)
    F::fill_table(shared, static_cast<const uint4*>(a.pairs), threadIdx.x, Threads);

  // the adapters' h, while the first weights are on their way; the stage that they leave free is its scratch
  const AdapterArgs& adapter = kernel.adapter;
  Groups& groups = *reinterpret_cast<Groups*>(shared + kernel.groups_offset);
  const int block = blockIdx.x + blockIdx.y * gridDim.x;
  float* const scratch = reinterpret_cast<float*>(ring + (Stages - 1) * StageBytes);
  constexpr int ScratchPitch = Stages * StageBytes / 4;
  bool rides = Adapter;
  if constexpr (Adapter) {
    if (warp == 0) find_groups(adapter, kernel.rows, groups);
    __syncthreads();
    rides = groups.count > 0;
    if (block < groups.makers) {
      shrink<T, TokenTiles, false>(adapter, kernel.rows, groups, block, scratch, ScratchPitch);
    }
    if (blockIdx.y == 0) {
      prefetch_expansion(adapter, groups, a.n, tile_row, WarpRows << kernel.log_warps_n);
    }
  }
  bool there = !rides;                   // h
  if constexpr (Adapter) next_scales();  // not before: the registers were the shrink's

  const F format(shared, lane);
  typename F::Zero zero[LaneRows];
  uint32_t flags[LaneRows];
#pragma unroll
  for (int r = 0; r < LaneRows; ++r) zero[r] = F::zero(a.zero_point), flags[r] = 0;
  float total[RowTiles][TokenTiles][4] = {}, part[RowTiles][TokenTiles][4] = {};

  // Where this lane's codes are in `shared`: an exclusive or leads from span to span, see swizzle.
  const int unit = Words == 1 ? 0 : t / 2, within = Words == 1 ? 4 * t : 8 * (t % 2);
  const int lane_codes =
      kernel.ring_offset + warp * Stages * StageBytes + g * ChunkBytes + 16 * (unit ^ swizzle(g)) + within;
  unsigned stage = 0;
  // Where this lane's x is in `shared`. Tokens that there are not read what is there: another token's x, or
  // what a tile of eight leaves unused; their sums are not stored.
  const int token = TokenTiles == 1 ? min(g, a.m - 1) : g;
  const int lane_x = kernel.ring_offset + RingBytes + token * panel_pitch + 16 * (t ^ ((token & 1) << 2));

  const int chunk_pitch = ChunkK * static_cast<int>(sizeof(T));
  int buffer = -1;  // of the panel that is read
  int x_at = 0;     // of this lane's x in it
  for (int step = 0; step < steps; ++step) {
    if constexpr (Adapter) {
      if (!there && step >= steps / 2) there = ready(adapter, groups);
    }
    cp_async_wait<Stages - 2>();
    if ((step & (panel_steps - 1)) == 0) {
      const int read_before = buffer < 0 ? panels_ahead : buffer;
      buffer = buffer == panels_ahead ? 0 : buffer + 1;
      if constexpr (F::PairsApart) order_panel(buffer);
      __syncthreads();
      if (panels_ahead > 0) copy_panel((step >> kernel.log_panel) + panels_ahead, read_before);
      x_at = lane_x + buffer * panel_bytes + warp_k * chunk_pitch;
    } else {
      __syncwarp();
    }
    copy_chunk();
    cp_async_commit();
    if (chunk_begin + warp_k + step * warps_k >= chunk_end) break;

    float scale[LaneRows], offset[LaneRows];
    uint32_t zero_codes = 0;  // a byte a row
    scale_values(a, rows, scales, nested, scale);
    if constexpr (F::HasOffset) {
#pragma unroll
      for (int r = 0; r < LaneRows; ++r) offset[r] = float_of(scales.zero[r], a.offset_type);
    } else if (a.zeros != nullptr) {
#pragma unroll
      for (int r = 0; r < LaneRows; ++r) zero_codes |= scales.zero[r] << 8 * r;
    }
    next_scales();

#pragma unroll
    for (int span = 0; span < Spans; ++span) {
      // with the most sums there are no registers for the next span's codes: none are read ahead
      if constexpr (TokenTiles == 8) __syncwarp();
      uint32_t words[LaneRows][Words];
      const unsigned char* const codes = shared + ((lane_codes + stage) ^ (16 * Words * span));
#pragma unroll
      for (int r = 0; r < LaneRows; ++r) {
        if constexpr (Words == 1) {
          words[r][0] = *reinterpret_cast<const uint32_t*>(codes + 8 * r * ChunkBytes);
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(codes + 8 * r * ChunkBytes);
          words[r][0] = two.x, words[r][1] = two.y;
        }
      }
      if (!F::HasOffset && a.zeros != nullptr) {
        const uint32_t of_span = __shfl_sync(~0u, zero_codes, (lane & ~3) + span);
#pragma unroll
        for (int r = 0; r < LaneRows; ++r) zero[r] = F::zero(of_span >> 8 * r & 0xff);
      }
      uint32_t w[2][RowTiles][4];
#pragma unroll
      for (int i = 0; i < RowTiles; ++i) {
        uint32_t upper[4], lower[4];
        format.dequant8(words[2 * i], zero[2 * i], flags[2 * i], upper);
        format.dequant8(words[2 * i + 1], zero[2 * i + 1], flags[2 * i + 1], lower);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[half][i][0] = upper[2 * half], w[half][i][1] = lower[2 * half];
          w[half][i][2] = upper[2 * half + 1], w[half][i][3] = lower[2 * half + 1];
        }
      }
      float of_span[LaneRows];
      if constexpr (F::HasOffset) {
#pragma unroll
        for (int r = 0; r < LaneRows; ++r) of_span[r] = __shfl_sync(~0u, offset[r], (lane & ~3) + span);
      }
      // the place of a span within 128 bytes is one bit, which the swizzle may have flipped
      const int x_span = (x_at + span / 2 * 128) ^ (span % 2 * 64);
#pragma unroll
      for (int j = 0; j < TokenTiles; ++j) {
        const uint4 b = *reinterpret_cast<const uint4*>(shared + x_span + 8 * j * panel_pitch);
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
          mma_m16n8k16<T>(part[i][j], w[0][i], b.x, b.y);
          mma_m16n8k16<T>(part[i][j], w[1][i], b.z, b.w);
        }
        if constexpr (F::HasOffset) {
          const uint32_t one = pack2<T>(1.0f, 1.0f), ones[4] = {one, one, one, one};
          float sum[4] = {};  // of tokens 2t and 2t + 1, then again
          mma_m16n8k16<T>(sum, ones, b.x, b.y);
          mma_m16n8k16<T>(sum, ones, b.z, b.w);
#pragma unroll
          for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) total[i][j][c] -= of_span[2 * i + c / 2] * sum[c % 2];
          }
        }
      }
      if (span == Spans - 1 || (kernel.flush >> span & 1)) {
#pragma unroll
        for (int i = 0; i < RowTiles; ++i) {
          const float upper = __shfl_sync(~0u, scale[2 * i], (lane & ~3) + span);
          const float lower = __shfl_sync(~0u, scale[2 * i + 1], (lane & ~3) + span);
#pragma unroll
          for (int j = 0; j < TokenTiles; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              total[i][j][c] += (c < 2 ? upper : lower) * part[i][j][c];
              part[i][j][c] = 0;
            }
          }
        }
      }
    }
    x_at += warps_k * chunk_pitch;
    stage = (stage + StageBytes) % (Stages * StageBytes);
  }

  if constexpr (F::HasNan) {
#pragma unroll
    for (int r = 0; r < LaneRows; ++r) {
      flags[r] |= __shfl_xor_sync(~0u, flags[r], 1);
      flags[r] |= __shfl_xor_sync(~0u, flags[r], 2);
      if ((flags[r] & 0x80808080) != 0) {
#pragma unroll
        for (int j = 0; j < TokenTiles; ++j) {
          total[r / 2][j][r % 2 * 2] = total[r / 2][j][r % 2 * 2 + 1] = __int_as_float(0x7fffffff);
        }
      }
    }
  }

  // sums [warp][token][row] in place of the ring and the panels, which no warp reads any more
  float* const sums = reinterpret_cast<float*>(ring);
  constexpr int WarpSums = 8 * TokenTiles * SumPitch;
  cp_async_wait<0>();
  const bool all_see_h = __syncthreads_and(there);
#pragma unroll
  for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < TokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[warp * WarpSums + (8 * j + 2 * t + c % 2) * SumPitch + 16 * i + 8 * (c / 2) + g] =
            total[i][j][c];
      }
    }
  }
  if (Adapter && rides) {
    if (!all_see_h) {
      wait_for_h<T, TokenTiles>(adapter, kernel.rows, groups, block, sums + Warps * WarpSums, ScratchFloats);
    }
    if (threadIdx.x == 0) leave(adapter, groups, block, gridDim.x * gridDim.y);
    expand<RowTiles>(adapter, groups, a.n, warp_row, warp_k + warps_k * blockIdx.y, warps_k * kernel.splits,
                     sums + warp * WarpSums, SumPitch);
  }
  __syncthreads();

  const int log_pairs = 4 + kernel.log_warps_n;  // of neighbouring outputs in the tile
  const int64_t partial_pitch = a.n + a.n % 2;
  for (int i = threadIdx.x; i < a.m << log_pairs; i += Threads) {
    const int token = i >> log_pairs, at = 2 * (i & ((1 << log_pairs) - 1)), n = tile_row + at;
    if (n >= a.n) continue;
    const float* from = sums + at / WarpRows * WarpSums + token * SumPitch + at % WarpRows;
    float2 sum = {0.0f, 0.0f};
    for (int k = 0; k < warps_k; ++k, from += warps_n * WarpSums) {
      const float2 one = *reinterpret_cast<const float2*>(from);
      sum.x += one.x, sum.y += one.y;
    }
    if (kernel.splits == 1) {
      store_pair<T>(a, token, n, sum);
    } else {
      const int64_t line = static_cast<int64_t>(blockIdx.y) * a.m + token;
      *reinterpret_cast<float2*>(a.partial + line * partial_pitch + n) = sum;
    }
  }
  if (kernel.splits == 1) return;

  // the last block of a tile to come here adds them all
  bool last = false;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned final = kernel.splits - 1;
    last = atomicInc(a.counters + blockIdx.x, final) == final;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  for (int i = threadIdx.x; i < a.m << log_pairs; i += Threads) {
    const int token = i >> log_pairs, n = tile_row + 2 * (i & ((1 << log_pairs) - 1));
    if (n >= a.n) continue;
    float2 sum = {0.0f, 0.0f};
#pragma unroll 4
    for (int split = 0; split < kernel.splits; ++split) {
      const int64_t line = static_cast<int64_t>(split) * a.m + token;
      const float2 one = __ldcg(reinterpret_cast<const float2*>(a.partial + line * partial_pitch + n));
      sum.x += one.x, sum.y += one.y;
    }
    store_pair<T>(a, token, n, sum);
  }
}

// Kernels by the type of x, the decoder and the logarithm of the tiles of 8 tokens.
using KernelFunction = void (*)(Kernel);
using KernelTable = std::array<std::array<std::array<KernelFunction, 4>, 4>, 2>;

template <bool Adapter, typename T, template <typename> class Format>
constexpr std::array<KernelFunction, 4> by_tokens() {
  return {lowbit_linear_kernel<T, Format, 1, Adapter>, lowbit_linear_kernel<T, Format, 2, Adapter>,
          lowbit_linear_kernel<T, Format, 4, Adapter>, lowbit_linear_kernel<T, Format, 8, Adapter>};
}

template <bool Adapter, typename T>
constexpr std::array<std::array<KernelFunction, 4>, 4> by_code() {
  return {by_tokens<Adapter, T, Int4>(), by_tokens<Adapter, T, Codebook4>(), by_tokens<Adapter, T, Int8>(),
          by_tokens<Adapter, T, Fp8>()};
}

template <bool Adapter>
constexpr KernelTable by_type() {
  return {by_code<Adapter, __half>(), by_code<Adapter, __nv_bfloat16>()};
}

// Those with an adapter to ride along; in lora_linear.cu.
extern const KernelTable LoraKernels;

// Those with float offsets, of Int4 and of Int8, without and with an adapter; in lowbit_linear_offsets.cu.
using OffsetTable = std::array<std::array<std::array<std::array<KernelFunction, 4>, 2>, 2>, 2>;
extern const OffsetTable OffsetKernels;

}  // namespace bitfuse
