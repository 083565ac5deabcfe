// Places of a KV cache and rotated rows, on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attention/kv_cache.h"

namespace bitfuse {

__device__ __forceinline__ float float_at(const void* row, int64_t i, Float type) {
  return type == Float::Float16 ? __half2float(static_cast<const __half*>(row)[i])
                                : __bfloat162float(static_cast<const __nv_bfloat16*>(row)[i]);
}

// As 16 bits of `type`.
__device__ __forceinline__ unsigned short rounded_bits(float x, Float type) {
  return type == Float::Float16 ? __half_as_ushort(__float2half_rn(x))
                                : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ __forceinline__ float rounded(float x, Float type) {
  return type == Float::Float16 ? __half2float(__float2half_rn(x)) : __bfloat162float(__float2bfloat16_rn(x));
}

// The page of a position below the capacity; negative when the table names none that there is.
__device__ __forceinline__ int page_of(const DeviceCache& cache, int sequence, int position) {
  if (cache.table == nullptr) return sequence;
  const int page = __ldg(cache.table + static_cast<int64_t>(sequence) * cache.max_pages +
                         (position >> cache.log_page_size));
  return page >= 0 && page < cache.pages ? page : -1;
}

__device__ __forceinline__ int slot_of(const DeviceCache& cache, int position) {
  return position & cache.slot_mask;
}

// The row of cos and sin that a token is turned by; one that is not there is not read.
__device__ __forceinline__ int64_t rotary_row(const DeviceRotary& rotary, int sequence, int index,
                                              int place) {
  const int row = rotary.positions == nullptr
                      ? place
                      : __ldg(rotary.positions + sequence * rotary.positions_batch + index);
  return max(0, min(row, rotary.rows - 1));
}

__device__ __forceinline__ float angle_at(const void* table, int64_t i, Dtype type) {
  if (type == Dtype::kFloat32) return static_cast<const float*>(table)[i];
  return float_at(table, i, type == Dtype::kFloat16 ? Float::Float16 : Float::BFloat16);
}

// Channel c of a row, turned by row `angle` of the tables and rounded to the row's type. Products are rounded
// before they are added, as torch does, so that a cache holds the same bits whoever writes to it.
__device__ __forceinline__ float turned_at(const DeviceRotary& rotary, int64_t angle, const void* row, int c,
                                           Float type) {
  const float own = float_at(row, c, type);
  if (rotary.cos == nullptr || c >= 2 * rotary.half) return own;
  const bool first = rotary.interleaved ? c % 2 == 0 : c < rotary.half;
  const int pair = rotary.interleaved ? c / 2 : first ? c : c - rotary.half;
  const int partner = rotary.interleaved ? c ^ 1 : first ? c + rotary.half : c - rotary.half;
  const float cos = angle_at(rotary.cos, angle * rotary.half + pair, rotary.type);
  const float sin = angle_at(rotary.sin, angle * rotary.half + pair, rotary.type);
  const float a = __fmul_rn(own, cos), b = __fmul_rn(float_at(row, partner, type), sin);
  return rounded(first ? __fsub_rn(a, b) : __fadd_rn(a, b), type);
}

}  // namespace bitfuse
