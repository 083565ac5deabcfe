// attention on Hopper: softmax(scale q k^T) v, the scores never written. The scheme is FlashAttention-3's
// (Shah et al., 2024) with FlashAttention-4's lazy rescaling; code for sm_90a alone.
//
// A block stays on its multiprocessor and takes tile after tile: TileM queries of one head. Its warps:
//   warp 0          the producer: has TMA bring Q, and K and V in tiles of TileN keys through two rings of
//                   Stages stages, as far ahead as the rings allow, into the next tile's too; takes the next
//                   tile's number from a counter, works out where it is, and hands that over in a ring
//   warps 1 to 3    give their registers away and leave
//   the others      2 or 3 warpgroups of 64 queries: the products by wgmma, the softmax between them
//
// Shared memory: Q [Dim / 64][TileM][64], Stages times K and V [Dim / 64][TileN][64], swizzled rows of 128
// bytes; then the barriers.
//
// A thread has two rows of its warp's 16, and of each the columns that wgmma.cuh says: TileN / 2 logits,
// Dim / 2 sums, TileN / 4 pairs of probabilities, which are operand A of the second product where they are.
// Step t:
//
//   S = Q K(t)^T             wgmma, group 1
//   O += P(t - 1) V(t - 1)   wgmma, group 2
//   wait for group 1; its stage of K is free
//   the maximum of each row; exp2(scale S - maximum), summed
//   wait for K(t + 1)
//   wait for group 2; its stage of V is free
//   P(t); O times what the maximum grew by, where it did
//
// So the softmax of step t runs beside the second product of step t - 1. And warpgroups take turns
// (PingPong): a named barrier lets one queue both products after the other has, so that one's products run
// under the other's softmax. At dim 256 the products are so long that there is nothing to win.
//
// A row's sums are relative to a maximum that follows the true one only when this has grown by more than 2^8:
// mostly not at all after the first steps. P is then 256 at most, and P and the row's sum are as exact as
// ever. The multiply-add of an exponent has what scale times maximum was rounded by: all of a row have the
// same, and it cancels; from 2^27 on, where it would be 8 and more, a row takes a power of two for a scale
// (even_scale).
//
// The keys that some rows of the tile do not see (window, end of the sequence) are masked, and come first;
// then those that all see. What none sees is not visited.
//
// Tiles: within a section of heads whose keys and values L2 holds, longest rows first, then by head, the
// query heads of one key head beside each other.
//
// What bounds it: see attention_sm90.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/core/tensor_map.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace bitfuse::attention_sm90_detail {

constexpr int WarpgroupThreads = 128, WarpgroupRows = 64;
constexpr float LazyGrowth = 8.0f;  // in powers of two

// Groups: warpgroups of consumers, 2 or 3.
template <typename T_, int Dim_, int Groups_, int TileN_, int Stages_, bool Capped_>
struct Tiling {
  using T = T_;
  static constexpr int Dim = Dim_, Groups = Groups_, TileN = TileN_, Stages = Stages_;
  static constexpr bool Capped = Capped_;  // a softcap
  static constexpr bool PingPong = Dim <= 128;
  static constexpr int TileM = Groups * WarpgroupRows, Threads = (Groups + 1) * WarpgroupThreads;
  // of a thread; together the 65536 that there are
  static constexpr int ProducerRegisters = Groups == 3 ? 32 : 24, ConsumerRegisters = Groups == 3 ? 160 : 240;

  static constexpr int Columns = Dim / 64;  // boxes side by side
  static constexpr int QBytes = TileM * Dim * 2, KBytes = TileN * Dim * 2;
  static constexpr int KOffset = QBytes, VOffset = KOffset + Stages * KBytes;
  static constexpr int QFull = VOffset + Stages * KBytes, VTail = QFull + 16;
  static constexpr int KRing = VTail + 16, VRing = KRing + Ring<Stages>::Bytes;
  static constexpr int WorkRing = VRing + Ring<Stages>::Bytes, Works = WorkRing + Ring<2>::Bytes;
  static constexpr int SharedBytes = Works + 2 * 64;
  static_assert(SharedBytes + 1024 <= 228 * 1024, "a block's most on sm_90");
};

struct Call {
  CUtensorMap q, k, v;
  void* out;
  float* lse;
  const int *cu_seqlens_q, *cu_seqlens_k;  // null: sq and sk
  const float* sinks;                      // [heads]; null: none
  unsigned* counters;                      // tiles taken, blocks that are done
  int sq, sk, total_q, total_k;
  int heads, kv_heads, group, batch;
  int left, right, bottom;  // bottom 1: the last query meets the last key
  int tiles, row_tiles;     // row_tiles: of one head
  int section;              // key heads of a section
  float scale;              // of a logit, in powers of two
  float sink_scale;         // of a sink, so that `scale` makes it a power of two
  float before_cap;         // of q k, for tanh_approx
};

// One tile: where it is, and which keys it visits. The producer makes it and hands it over: it has the time.
struct __align__(16) Work {
  int m, head, kv_head, b;  // m: the first query in its sequence
  int q_first, k_first, sq, sk;
  int shift;  // query i stands at key i + shift
  int lo, right_end,
      whole_end;             // tiles of keys: those cut on the left from lo on, whole ones before whole_end
  int right, masked, count;  // how many are cut on the right; cut at all; all
  int end;                   // 1: there is no tile, and no further one

  // The t-th tile of keys that is visited.
  __device__ __forceinline__ int visited(int t) const {
    return t < right ? right_end - 1 - t : t < masked ? lo + (t - right) : whole_end - 1 - (t - masked);
  }
};

static_assert(sizeof(Work) == 64);

__device__ __forceinline__ int clamped(int x, int least, int most) { return min(max(x, least), most); }

// The place of sequence b in its tensor; what the offsets say is held to the tensor.
__device__ __forceinline__ void span(const int* cu_seqlens, int b, int length, int total, int& first,
                                     int& own) {
  first = 0, own = length;
  if (cu_seqlens == nullptr) return;
  first = clamped(__ldg(cu_seqlens + b), 0, total);
  own = clamped(__ldg(cu_seqlens + b + 1), first, total) - first;
}

template <typename C>
__device__ __forceinline__ Work work_of(const Call& call, int tile) {
  constexpr int TileM = C::TileM, TileN = C::TileN;
  Work w{};
  if (tile >= call.tiles) {
    w.end = 1;
    return w;
  }
  const int per_section = call.section * call.group * call.row_tiles;
  const int first_head = tile / per_section * call.section;
  const int wide = min(call.section, call.batch * call.kv_heads - first_head) * call.group;
  const int in_section = tile % per_section;
  const int kv = first_head + in_section % wide / call.group;
  w.m = (call.row_tiles - 1 - in_section / wide) * TileM;
  w.b = kv / call.kv_heads;
  w.kv_head = kv % call.kv_heads;
  w.head = w.kv_head * call.group + in_section % call.group;
  span(call.cu_seqlens_q, w.b, call.sq, call.total_q, w.q_first, w.sq);
  span(call.cu_seqlens_k, w.b, call.sk, call.total_k, w.k_first, w.sk);
  w.shift = (w.sk - w.sq) * call.bottom;
  if (w.m >= w.sq) return w;
  const int first = w.m, last = min(w.m + TileM, w.sq) - 1;
  const int before = call.left - w.shift, after = call.right + w.shift;
  const int hi = clamped(last + after + 1, 0, w.sk);
  w.lo = max(first - before, 0) / TileN;
  w.right_end = max((hi + TileN - 1) / TileN, w.lo);
  const int whole_from = clamped((max(last - before, 0) + TileN - 1) / TileN, w.lo, w.right_end);
  w.whole_end = clamped(clamped(first + after + 1, 0, w.sk) / TileN, whole_from, w.right_end);
  w.right = w.right_end - w.whole_end;
  w.masked = w.right + whole_from - w.lo;
  w.count = w.right_end - w.lo;
  return w;
}

__device__ __forceinline__ void put(uint32_t to, const Work& w) {
  const int* const words = &w.m;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + 4 * i), "r"(words[i]),
                 "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                 : "memory");
  }
}
__device__ __forceinline__ Work taken(uint32_t from) {
  Work w;
  int* const words = &w.m;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                 : "r"(from + 4 * i)
                 : "memory");
  }
  return w;
}

// ---- the producer ----

template <typename C>
__device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, int rows, uint32_t barrier, int row,
                                     int head, int batch) {
#pragma unroll
  for (int c = 0; c < C::Columns; ++c) {
    tma_load(to + c * rows * BoxRowBytes, map, barrier, c * 64, row, head, batch);
  }
}

template <typename C>
__device__ void produce(const Call& call, uint32_t shared, int lane) {
  constexpr int TileN = C::TileN, Stages = C::Stages;
  const uint32_t q_full = shared + C::QFull, q_empty = q_full + 8, v_tail = shared + C::VTail;
  Ring<Stages> k_ring(shared + C::KRing), v_ring(shared + C::VRing);
  Ring<2> works(shared + C::WorkRing);
  const bool packed = call.cu_seqlens_k != nullptr;
  uint32_t q_parity = 1, tail_parity = 0;
  if (lane == 0) {
    tma_prefetch_map(call.q);
    tma_prefetch_map(call.k);
    tma_prefetch_map(call.v);
  }
  for (int tile = blockIdx.x;;) {
    const Work w = work_of<C>(call, tile);
    works.wait_empty();
    if (lane == 0) {
      put(shared + C::Works + 64 * works.stage(), w);
      mbarrier_arrive(works.full());
    }
    works.advance();
    if (w.end) break;
    unsigned next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(call.counters, 1u);
    const int batch = packed ? 0 : w.b;

    auto load_v = [&](int t) {
      const int key = w.visited(t) * TileN, stage = v_ring.stage(), rows = w.sk - key;
      const uint32_t to = shared + C::VOffset + stage * C::KBytes;
      v_ring.wait_empty();
      // What follows a packed sequence is the next one's: a probability of 0 times that may be NaN.
      const bool tail = packed && rows < TileN;
      const uint32_t barrier = tail ? v_tail : v_ring.full();
      if (lane == 0) {
        mbarrier_arrive_expecting(barrier, C::KBytes);
        load<C>(call.v, to, TileN, barrier, w.k_first + key, w.kv_head, batch);
      }
      if (tail) {
        mbarrier_wait(v_tail, tail_parity);
        tail_parity ^= 1;
        for (int c = 0; c < C::Columns; ++c) {
          for (int at = rows * BoxRowBytes + lane * 16; at < TileN * BoxRowBytes; at += 32 * 16) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to + c * TileN * BoxRowBytes + at),
                         "r"(0)
                         : "memory");
          }
        }
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(v_ring.full());
      }
      v_ring.advance();
    };

    if (w.count > 0) {
      mbarrier_wait(q_empty, q_parity);
      q_parity ^= 1;
      if (lane == 0) {
        mbarrier_arrive_expecting(q_full, C::QBytes);
        load<C>(call.q, shared, C::TileM, q_full, w.q_first + w.m, w.head, batch);
      }
      for (int t = 0; t < w.count; ++t) {
        k_ring.wait_empty();
        if (lane == 0) {
          mbarrier_arrive_expecting(k_ring.full(), C::KBytes);
          load<C>(call.k, shared + C::KOffset + k_ring.stage() * C::KBytes, TileN, k_ring.full(),
                  w.k_first + w.visited(t) * TileN, w.kv_head, batch);
        }
        k_ring.advance();
        if (t > 0) load_v(t - 1);
      }
      load_v(w.count - 1);
    }

    tile = __shfl_sync(0xffffffffu, static_cast<int>(next), 0);
  }
  // the last block leaves the counters as it found them
  if (lane == 0) {
    __threadfence();
    if (atomicAdd(call.counters + 1, 1u) == gridDim.x - 1) {
      atomicExch(call.counters, 0u);
      atomicExch(call.counters + 1, 0u);
    }
  }
}

// ---- the consumers ----

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x by), by the hardware: right to 2^-11 of the result, a quarter of bfloat16's own rounding. For
// float16 by 1 - 2 / (exp(2x) + 1), with an absolute error like float32's; `by` then has 2 log2(e) in it.
template <typename T>
__device__ __forceinline__ float tanh_approx(float x, float by) {
  float y;
  if constexpr (std::is_same_v<T, __half>) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(exp2_approx(x * by) + 1.0f));
    return fmaf(-2.0f, y, 1.0f);
  } else {
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x * by));
    return y;
  }
}

// Two numbers as T's, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

// The maximum, or the sum, of the four threads that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Word t of lane l of a quad becomes word l of lane t.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
  auto swap = [](uint32_t& a, uint32_t& b, bool upper, int with) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? a : b, with);
    (upper ? a : b) = got;
  };
  swap(x[0], x[1], lane & 1, 1);
  swap(x[2], x[3], lane & 1, 1);
  swap(x[0], x[2], lane & 2, 2);
  swap(x[1], x[3], lane & 2, 2);
}

// What a thread keeps of its two rows from step to step.
template <typename C>
struct Rows {
  float o[C::Dim / 2];
  float s[C::TileN / 2];
  uint32_t p[C::TileN / 4];
  float top[2], sum[2];  // what the sums are relative to, as a logit; this thread's part of the row's sum
};

// The scale of a row whose largest score is `top`; a power of two above it where a logit would be 2^27 or
// more: no product of it is rounded, and of neighbouring floats the smaller is nothing beside the larger.
__device__ __forceinline__ float even_scale(float top, float scale) {
  const float above = __int_as_float((__float_as_int(scale) & 0x7f800000) + 0x00800000);
  return fabsf(top * scale) < 134217728.0f ? scale : above;
}

// From the products s: logits, and what they are relative to, `base`, as powers of two; a logit is `scale`
// times a score. Returns whether o has to be multiplied by `shrink`, which is the same for all lanes. `from`,
// `to`: the row's first and last-but-one visible column, from the thread's own first column on.
template <typename C, bool Masked>
__device__ __forceinline__ bool find_base(const Call& call, Rows<C>& r, const int (&from)[2],
                                          const int (&to)[2], float (&scale)[2], float (&base)[2],
                                          float (&shrink)[2]) {
  constexpr int Logits = C::TileN / 2;
  if constexpr (C::Capped) {
#pragma unroll
    for (int i = 0; i < Logits; ++i) r.s[i] = tanh_approx<typename C::T>(r.s[i], call.before_cap);
  }
  if constexpr (Masked) {
#pragma unroll
    for (int i = 0; i < Logits; ++i) {
      const int column = i / 4 * 8 + i % 2, row = i / 2 % 2;
      if (column < from[row] || column >= to[row]) r.s[i] = -INFINITY;
    }
  }
  float largest[2];
  bool grew = false;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float even = r.s[2 * row], odd = r.s[2 * row + 1];
#pragma unroll
    for (int c = 1; c < Logits / 4; ++c) {
      even = fmaxf(even, r.s[4 * c + 2 * row]);
      odd = fmaxf(odd, r.s[4 * c + 2 * row + 1]);
    }
    largest[row] = fmaxf(r.top[row], quad_max(fmaxf(even, odd)));
    grew |= (largest[row] - r.top[row]) * call.scale > LazyGrowth;  // not where both are -inf
  }
  grew = __any_sync(0xffffffffu, grew);
  if (grew) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // a row that has seen nothing yet: any finite number, since exp2(-inf - it) is 0
      const float before = __fmul_rn(r.top[row], even_scale(r.top[row], call.scale));
      r.top[row] = largest[row];
      scale[row] = even_scale(largest[row], call.scale);
      base[row] = largest[row] == -INFINITY ? 0.0f : __fmul_rn(largest[row], scale[row]);
      shrink[row] = exp2_approx(before - base[row]);
      r.sum[row] *= shrink[row];
    }
  } else {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      scale[row] = even_scale(r.top[row], call.scale);
      base[row] = r.top[row] == -INFINITY ? 0.0f : __fmul_rn(r.top[row], scale[row]);
    }
  }
  return grew;
}

// From logits the probabilities in their place, and the rows' sums.
template <typename C>
__device__ __forceinline__ void exponentiate(Rows<C>& r, const float (&scale)[2], const float (&base)[2]) {
  float part[4] = {};
#pragma unroll
  for (int i = 0; i < C::TileN / 2; ++i) {
    r.s[i] = exp2_approx(fmaf(r.s[i], scale[i / 2 % 2], -base[i / 2 % 2]));
    part[i % 4] += r.s[i];
  }
  r.sum[0] += part[0] + part[1];
  r.sum[1] += part[2] + part[3];
}

template <typename C>
__device__ __forceinline__ void round_probabilities(Rows<C>& r) {
#pragma unroll
  for (int i = 0; i < C::TileN / 4; ++i) {
    r.p[i] = rounded_pair<typename C::T>(r.s[2 * i], r.s[2 * i + 1]);
  }
}

// s = Q K^T, queued.
template <typename C>
__device__ __forceinline__ void multiply_qk(Rows<C>& r, uint64_t q, uint32_t k_stage) {
  wgmma_fence();
  const uint64_t k = matrix_descriptor(k_stage);
#pragma unroll
  for (int step = 0; step < C::Dim / 16; ++step) {
    const int column = step / 4, within = step % 4 * 32;
    const uint64_t a = further(q, column * C::TileM * BoxRowBytes + within);
    const uint64_t b = further(k, column * C::TileN * BoxRowBytes + within);
    if (step == 0) {
      Wgmma<C::TileN>::template shared<typename C::T, false>(r.s, a, b);
    } else {
      Wgmma<C::TileN>::template shared<typename C::T, true>(r.s, a, b);
    }
  }
  wgmma_commit();
}

// o += P V, queued.
template <typename C>
__device__ __forceinline__ void multiply_pv(Rows<C>& r, uint32_t v_stage) {
  wgmma_fence();
  const uint64_t v = matrix_descriptor(v_stage, C::TileN * BoxRowBytes);
#pragma unroll
  for (int step = 0; step < C::TileN / 16; ++step) {
    Wgmma<C::Dim>::template registers<typename C::T>(r.o, r.p[4 * step], r.p[4 * step + 1], r.p[4 * step + 2],
                                                     r.p[4 * step + 3], further(v, step * 16 * BoxRowBytes));
  }
  wgmma_commit();
}

// out and lse of a tile: o over the row's sum. A quad exchanges words, so that a thread has 16 bytes of a row
// and a quad 64, which are whole sectors.
template <typename C>
__device__ __forceinline__ void store(const Call& call, const Work& w, Rows<C>& r, int row0, int lane) {
  using T = typename C::T;
  constexpr float Ln2 = 0.6931471805599453f;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int i = row0 + 8 * row;
    const float sum = quad_sum(r.sum[row]);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const bool there = i < w.sq;
    const bool packed = call.cu_seqlens_q != nullptr;
    if (there && lane % 4 == 0) {
      const int64_t line = packed ? static_cast<int64_t>(w.head) * call.total_q + w.q_first
                                  : (static_cast<int64_t>(w.b) * call.heads + w.head) * call.sq;
      call.lse[line + i] = sum == 0.0f ? -INFINITY : (r.top[row] * call.scale + log2f(sum)) * Ln2;
    }
    const int64_t place = (packed ? w.q_first : static_cast<int64_t>(w.b) * call.sq) + i;
    T* const out = static_cast<T*>(call.out) + (place * call.heads + w.head) * C::Dim + lane % 4 * 8;
#pragma unroll
    for (int c = 0; c < C::Dim / 32; ++c) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 16 * c + 4 * j + 2 * row;
        words[j] = rounded_pair<T>(r.o[at] * factor, r.o[at + 1] * factor);
      }
      transpose_quad(words, lane);
      if (there) *reinterpret_cast<uint4*>(out + 32 * c) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

template <typename C>
__device__ void consume(const Call& call, uint32_t shared, int group, int warp, int lane) {
  constexpr int Groups = C::Groups, TileN = C::TileN, Stages = C::Stages;
  constexpr int FirstBarrier = 1;  // of the warpgroups' turns
  constexpr int TurnThreads = 2 * WarpgroupThreads;
  const uint32_t q_full = shared + C::QFull, q_empty = q_full + 8;
  const uint64_t q = matrix_descriptor(shared + group * WarpgroupRows * BoxRowBytes);
  Ring<Stages> k_ring(shared + C::KRing), v_ring(shared + C::VRing);
  Ring<2> works(shared + C::WorkRing);
  uint32_t q_parity = 0;
  const int turn = FirstBarrier + group, next_turn = FirstBarrier + (group + 1) % Groups;
  if (C::PingPong && group == Groups - 1) named_barrier_arrive<TurnThreads>(next_turn);

  auto release = [lane](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };

  Rows<C> r;
  for (;;) {
    works.wait_full();
    const Work w = taken(shared + C::Works + 64 * works.stage());
    __syncwarp();
    release(works.empty());
    works.advance();
    if (w.end) break;
    const int row0 = w.m + group * WarpgroupRows + warp * 16 + lane / 4;
    const float sink = call.sinks == nullptr ? -INFINITY : __ldg(call.sinks + w.head) * call.sink_scale;
    r.top[0] = r.top[1] = sink;
    r.sum[0] = r.sum[1] = sink > -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
    for (float& o : r.o) o = 0.0f;

    if (w.count > 0) {
      int from[2], to[2];
      float scale[2], base[2], shrink[2];
      auto bounds = [&](int t) {  // of the columns of a masked tile
        const int first = w.visited(t) * TileN + lane % 4 * 2;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = row0 + 8 * row + w.shift;
          from[row] = at - call.left - first;
          to[row] = min(at + call.right + 1, w.sk) - first;
        }
      };
      auto k_done = [&](int t) {
        release(k_ring.empty());
        k_ring.advance();
        if (t == w.count - 1) release(q_empty);
      };
      auto next_k = [&](int t) {
        if (t + 1 < w.count) k_ring.wait_full();
      };
      auto v_done = [&] {
        release(v_ring.empty());
        v_ring.advance();
      };

      mbarrier_wait(q_full, q_parity);
      q_parity ^= 1;
      k_ring.wait_full();
      multiply_qk<C>(r, q, shared + C::KOffset + k_ring.stage() * C::KBytes);
      wgmma_wait<0>();
      keep_behind(r.s);
      k_done(0);
      bounds(0);
      find_base<C, true>(call, r, from, to, scale, base, shrink);
      exponentiate<C>(r, scale, base);
      round_probabilities<C>(r);
      next_k(0);

      auto step = [&]<bool Masked>(std::bool_constant<Masked>, int t) {
        if constexpr (C::PingPong) named_barrier_sync<TurnThreads>(turn);
        multiply_qk<C>(r, q, shared + C::KOffset + k_ring.stage() * C::KBytes);
        v_ring.wait_full();
        multiply_pv<C>(r, shared + C::VOffset + v_ring.stage() * C::KBytes);
        if constexpr (C::PingPong) named_barrier_arrive<TurnThreads>(next_turn);
        wgmma_wait<1>();
        keep_behind(r.s);
        k_done(t);
        if constexpr (Masked) bounds(t);
        const bool grew = find_base<C, Masked>(call, r, from, to, scale, base, shrink);
        exponentiate<C>(r, scale, base);
        // The branches of this wait keep the next one where it is: ptxas would have it before the
        // exponentials.
        keep_behind(r.s);
        next_k(t);
        wgmma_wait<0>();
        keep_behind(r.o);
        keep_behind(r.p);
        v_done();
        round_probabilities<C>(r);
        if (grew) {
#pragma unroll
          for (int i = 0; i < C::Dim / 2; ++i) r.o[i] *= shrink[i / 2 % 2];
        }
      };
      int t = 1;
      for (; t < w.masked; ++t) step(std::true_type{}, t);
      for (; t < w.count; ++t) step(std::false_type{}, t);

      v_ring.wait_full();
      multiply_pv<C>(r, shared + C::VOffset + v_ring.stage() * C::KBytes);
      wgmma_wait<0>();
      keep_behind(r.o);
      v_done();
    }
    store<C>(call, w, r, row0, lane);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::Threads, 1) attention_sm90_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t shared = shared_address(memory);
  // the same for all lanes, and the compiler knows
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    constexpr int Warps = 4 * C::Groups;
    mbarrier_init(shared + C::QFull, 1);
    mbarrier_init(shared + C::QFull + 8, Warps);
    mbarrier_init(shared + C::VTail, 1);
    Ring<C::Stages>(shared + C::KRing).init(1, Warps);
    Ring<C::Stages>(shared + C::VRing).init(1, Warps);
    Ring<2>(shared + C::WorkRing).init(1, Warps);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    fewer_registers<C::ProducerRegisters>();
    if (warp == 0) produce<C>(call, shared, lane);
  } else {
    more_registers<C::ConsumerRegisters>();
    consume<C>(call, shared, warp / 4 - 1, warp % 4, lane);
  }
}

}  // namespace bitfuse::attention_sm90_detail
