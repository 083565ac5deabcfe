// New keys and values into a cache: rotated, quantised, put in their places.
//
// A block has one (sequence, kv head). In full precision and fp8 it takes every gridDim.y-th token, a thread
// a channel. Codes share scales over a group of tokens, so there it takes every gridDim.y-th group that
// becomes whole: of K a thread has the channels of a byte and walks the group twice, for the extremes and for
// the codes; of V a warp has a token. Block 0 of y has the group that is begun in the tail, and when it has
// been read, writes the tail. Bound by the launch: a step of decoding brings a row of K and V a head. The
// arithmetic of codes is that of python/bitfuse/ops/attention/kv_cache.py, operation for operation: no bit
// differs.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "cuda/attention/kv_cache.cuh"
#include "cuda/core/launch.cuh"

namespace bitfuse {
namespace {

constexpr int AppendWarps = 4;
constexpr int AppendThreads = 32 * AppendWarps;
constexpr float HalfLargest = 65504.0f, Fp8Largest = 448.0f;
constexpr unsigned short HalfNan = 0x7e00;

// To the nearest e4m3, ties to even; past 448 saturates, NaN stays.
__device__ unsigned char to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7f;
  const float a = __uint_as_float(magnitude);
  if (a >= Fp8Largest) return sign | 0x7e;
  // subnormal: a multiple of 2^-9, the last place of 2^14
  if (a < 0.015625f) return sign | (__float_as_uint(a + 16384.0f) & 0xf);
  return sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3));
}

// The extremes of a group, and whether all of it is finite.
struct Extremes {
  float low = INFINITY, high = -INFINITY;
  bool finite = true;

  __device__ void add(float x) {
    low = fminf(low, x), high = fmaxf(high, x);
    finite = finite && isfinite(x);
  }
};

// Offset = low and scale = (high - low) / levels, rounded to float16; a code is round((x - offset) / scale).
struct Grid {
  float offset, inverse, levels;
  unsigned short scale_bits, offset_bits;

  __device__ Grid(const Extremes& of, float levels) : levels(levels) {
    const __half low = __float2half_rn(fminf(fmaxf(of.low, -HalfLargest), HalfLargest));
    offset = __half2float(low);
    const __half scale =
        __float2half_rn(fminf(fmaxf(__fdiv_rn(of.high - offset, levels), 0.0f), HalfLargest));
    inverse = __half2float(scale) == 0 ? 0.0f : __fdiv_rn(1.0f, __half2float(scale));
    scale_bits = of.finite ? __half_as_ushort(scale) : HalfNan;
    offset_bits = of.finite ? __half_as_ushort(low) : HalfNan;
    if (!of.finite) offset = inverse = 0;
  }

  __device__ unsigned code(float x) const {
    return static_cast<unsigned>(rintf(fminf(fmaxf(__fmul_rn(x - offset, inverse), 0.0f), levels)));
  }
};

// What one block appends to: a sequence and a kv head.
struct Appended {
  const AppendParams& a;
  int sequence, head, begin, end;

  __device__ const void* row(const HeadRows& rows, int position) const {
    const int64_t at =
        sequence * rows.batch + static_cast<int64_t>(position - begin) * rows.row + head * rows.head;
    return static_cast<const unsigned short*>(rows.data) + at;
  }
  __device__ unsigned short* tail_row(void* tail, int dim, int position) const {
    const int64_t kept = 2 * a.cache.group_size;
    const int64_t at = ((sequence * kept + position % kept) * a.cache.kv_heads + head) * dim;
    return static_cast<unsigned short*>(tail) + at;
  }
  __device__ int64_t angle(int position) const {
    return rotary_row(a.rotary, sequence, position - begin, position);
  }
  __device__ float key(int position, int c) const {
    if (position < begin) return float_at(tail_row(a.cache.k_tail, a.cache.dim, position), c, a.cache.type);
    return turned_at(a.rotary, angle(position), row(a.k, position), c, a.cache.type);
  }
  __device__ float value(int position, int c) const {
    const void* from =
        position < begin ? tail_row(a.cache.v_tail, a.cache.dim_v, position) : row(a.v, position);
    return float_at(from, c, a.cache.type);
  }
  // Of a new token; what is not turned is copied, whatever NaN it is.
  __device__ unsigned short key_bits(int position, int c) const {
    if (a.rotary.cos != nullptr && c < 2 * a.rotary.half) return rounded_bits(key(position, c), a.cache.type);
    return static_cast<const unsigned short*>(row(a.k, position))[c];
  }
  __device__ unsigned char* place(const DeviceRows& rows, int page, int slot) const {
    return rows.data + page * rows.page + slot * rows.slot + head * rows.head;
  }
};

__device__ void append_row(const Appended& of, int position) {
  const DeviceCache& cache = of.a.cache;
  const int page = page_of(cache, of.sequence, position), slot = slot_of(cache, position);
  if (page < 0) return;
  unsigned char *const k = of.place(cache.k, page, slot), *const v = of.place(cache.v, page, slot);
  const bool fp8 = cache.format == CacheFormat::kFp8;
  const float k_scale = cache.k_head_scales == nullptr ? 1.0f : cache.k_head_scales[of.head];
  const float v_scale = cache.v_head_scales == nullptr ? 1.0f : cache.v_head_scales[of.head];
  for (int c = threadIdx.x; c < cache.dim; c += AppendThreads) {
    if (fp8) {
      k[c] = to_e4m3(__fdiv_rn(of.key(position, c), k_scale));
    } else {
      reinterpret_cast<unsigned short*>(k)[c] = of.key_bits(position, c);
    }
  }
  for (int c = threadIdx.x; c < cache.dim_v; c += AppendThreads) {
    if (fp8) {
      v[c] = to_e4m3(__fdiv_rn(of.value(position, c), v_scale));
    } else {
      const void* const from = of.row(of.a.v, position);
      reinterpret_cast<unsigned short*>(v)[c] = static_cast<const unsigned short*>(from)[c];
    }
  }
}

// The group whose first position is `first`, which is whole.
template <int Bits>
__device__ void append_group(const Appended& of, int first) {
  constexpr int PerByte = 8 / Bits;
  constexpr float Levels = (1 << Bits) - 1;
  const DeviceCache& cache = of.a.cache;
  const int page = page_of(cache, of.sequence, first), slot = slot_of(cache, first), size = cache.group_size;
  if (page < 0) return;
  const int64_t k_scales =
      ((static_cast<int64_t>(page) * (cache.page_size / size) + slot / size) * cache.kv_heads + of.head) *
      cache.dim;
  for (int byte = threadIdx.x; byte < cache.dim / PerByte; byte += AppendThreads) {
    Extremes extremes[PerByte];
#pragma unroll 4
    for (int t = 0; t < size; ++t) {
#pragma unroll
      for (int i = 0; i < PerByte; ++i) extremes[i].add(of.key(first + t, PerByte * byte + i));
    }
    const Grid grids[] = {Grid(extremes[0], Levels), Grid(extremes[PerByte - 1], Levels)};
#pragma unroll
    for (int i = 0; i < PerByte; ++i) {
      cache.k_scales[k_scales + PerByte * byte + i] = grids[i].scale_bits;
      cache.k_offsets[k_scales + PerByte * byte + i] = grids[i].offset_bits;
    }
#pragma unroll 4
    for (int t = 0; t < size; ++t) {
      unsigned codes = 0;
#pragma unroll
      for (int i = 0; i < PerByte; ++i) {
        codes |= grids[i].code(of.key(first + t, PerByte * byte + i)) << Bits * i;
      }
      of.place(cache.k, page, slot + t)[byte] = static_cast<unsigned char>(codes);
    }
  }
  const int lane = threadIdx.x % 32;
  for (int t = threadIdx.x / 32; t < size; t += AppendWarps) {
    const int64_t v_scales =
        ((static_cast<int64_t>(page) * cache.page_size + slot + t) * cache.kv_heads + of.head) *
        cache.value_groups;
    unsigned char* const to = of.place(cache.v, page, slot + t);
    for (int g = 0; g < cache.value_groups; ++g) {
      const int from = g * cache.channel_group / PerByte;
      const int until = min(cache.dim_v, (g + 1) * cache.channel_group) / PerByte;
      Extremes all;
      for (int byte = from + lane; byte < until; byte += 32) {
#pragma unroll
        for (int i = 0; i < PerByte; ++i) all.add(of.value(first + t, PerByte * byte + i));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        all.low = fminf(all.low, __shfl_xor_sync(~0u, all.low, step));
        all.high = fmaxf(all.high, __shfl_xor_sync(~0u, all.high, step));
      }
      all.finite = __all_sync(~0u, all.finite);
      const Grid grid(all, Levels);
      if (lane == 0) {
        cache.v_scales[v_scales + g] = grid.scale_bits;
        cache.v_offsets[v_scales + g] = grid.offset_bits;
      }
      for (int byte = from + lane; byte < until; byte += 32) {
        unsigned codes = 0;
#pragma unroll
        for (int i = 0; i < PerByte; ++i) {
          codes |= grid.code(of.value(first + t, PerByte * byte + i)) << Bits * i;
        }
        to[byte] = static_cast<unsigned char>(codes);
      }
    }
  }
}

__global__ void __launch_bounds__(AppendThreads, 4) append_kv_kernel(const __grid_constant__ AppendParams a) {
  const DeviceCache& cache = a.cache;
  const int sequence = blockIdx.x / cache.kv_heads, head = blockIdx.x % cache.kv_heads;
  const int begin = a.begins[sequence];
  if (begin < 0 || begin >= cache.capacity) return;
  const int end = a.tokens < cache.capacity - begin ? begin + a.tokens : cache.capacity;
  const Appended of{a, sequence, head, begin, end};
  if (cache.format <= CacheFormat::kFp8) {
    for (int p = begin + blockIdx.y; p < end; p += gridDim.y) append_row(of, p);
    return;
  }
  const int size = cache.group_size, whole = end / size * size;
  for (int64_t p = begin / size * size + static_cast<int64_t>(blockIdx.y) * size; p < whole;
       p += static_cast<int64_t>(gridDim.y) * size) {
    if (cache.format == CacheFormat::kInt8) {
      append_group<8>(of, static_cast<int>(p));
    } else {
      append_group<4>(of, static_cast<int>(p));
    }
  }
  if (blockIdx.y != 0) return;
  // rows of the tail that the first group has been read from may be written to now
  __syncthreads();
  for (int p = max(begin, whole - size); p < end; ++p) {
    unsigned short* const k = of.tail_row(cache.k_tail, cache.dim, p);
    unsigned short* const v = of.tail_row(cache.v_tail, cache.dim_v, p);
    for (int c = threadIdx.x; c < cache.dim; c += AppendThreads) k[c] = of.key_bits(p, c);
    for (int c = threadIdx.x; c < cache.dim_v; c += AppendThreads) {
      v[c] = static_cast<const unsigned short*>(of.row(a.v, p))[c];
    }
  }
}

}  // namespace

void append_kv(const AppendParams& params, int device, std::uintptr_t stream) {
  if (params.tokens == 0 || params.cache.batch == 0) return;
  const DeviceScope scope(device);
  const bool codes = has_codes(params.cache.format);
  const int parts = codes ? params.tokens / params.cache.group_size + 1 : params.tokens;
  const dim3 grid(params.cache.batch * params.cache.kv_heads, std::min(parts, 65535));
  append_kv_kernel<<<grid, AppendThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "append_kv_kernel<<<(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
                                "), " + std::to_string(AppendThreads) + ">>>");
}

}  // namespace bitfuse
