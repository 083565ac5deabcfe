// append_kv, quantize_kv and rope: rows of keys and values rotated, quantised and put in their places.
//
// A task is one (sequence, kv head) with all its new tokens, so that a group of tokens which share K's scales
// is one task's. Bound by bytes: a row is read once and written once, some 20 instructions a vector between
// for codes. The arithmetic of codes is that of python/bitfuse/ops/attention/kv_cache.py, operation for
// operation: no bit differs.
#include "cpu/attention/rotary.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kRow = kMaxHeadDim + 16;  // floats of a row, with room for whole vectors
constexpr float kHalfLargest = 65504.0f, kFp8Largest = 448.0f;

float smaller(float a, float b) { return a < b ? a : b; }
float larger(float a, float b) { return a > b ? a : b; }

// To the nearest e4m3, ties to even; past 448 saturates, NaN stays.
uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint8_t(sign | 0x7f);
  float a;
  std::memcpy(&a, &magnitude, 4);
  if (a >= kFp8Largest) return uint8_t(sign | 0x7e);
  if (a < 0.015625f) {  // subnormal: a multiple of 2^-9, the last place of 2^14
    a += 16384.0f;
    std::memcpy(&bits, &a, 4);
    return uint8_t(sign | (bits & 0xf));
  }
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return uint8_t(sign | ((rounded >> 20) - (120 << 3)));
}

// Floats rounded to half and back, for `count` up to kRow.
void round_to_half(float* x, int64_t count, uint16_t* halves) {
  from_float(x, halves, Dtype::kFloat16, count);
  to_float(halves, Dtype::kFloat16, x, count);
}

// From the extremes of groups to scales and offsets, as halves and as floats; inverse is 1 / scale, or 0. A
// group whose high is not finite has NaN in both, and 0 as inverse.
struct Grid {
  alignas(64) float low[kRow], high[kRow], scale[kRow], inverse[kRow];
  alignas(64) uint16_t scales[kRow], offsets[kRow];

  // low becomes the offset.
  void make(int64_t count, float levels) {
    for (int64_t i = 0; i < count; ++i) low[i] = smaller(larger(low[i], -kHalfLargest), kHalfLargest);
    round_to_half(low, count, offsets);
    for (int64_t i = 0; i < count; ++i)
      scale[i] = smaller(larger((high[i] - low[i]) / levels, 0), kHalfLargest);
    round_to_half(scale, count, scales);
    for (int64_t i = 0; i < count; ++i) inverse[i] = scale[i] == 0 ? 0 : 1 / scale[i];
    for (int64_t i = 0; i < count; ++i)
      if (!(high[i] - high[i] == 0)) {
        scales[i] = offsets[i] = 0x7e00;
        low[i] = inverse[i] = 0;
      }
  }
};

float code_of(float x, float offset, float inverse, float levels) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
  // clamped before it is rounded, which gives the same, so that no compiler fuses the product with the sum
  const float code = smaller(larger((x - offset) * inverse, 0), levels);
  return (code + magic) - magic;
}

void pack_codes(const float* codes, int64_t count, int bits, uint8_t* to) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) to[i] = uint8_t(int32_t(codes[i]));
  } else {
    for (int64_t i = 0; i < count / 2; ++i)
      to[i] = uint8_t(int32_t(codes[2 * i]) | int32_t(codes[2 * i + 1]) << 4);
  }
}

class Writer {
 public:
  explicit Writer(const KvCache& cache)
      : cache_(cache), levels_(cache.format == CacheFormat::kInt4 ? 15 : 255) {}

  // A group of K, rows kRow apart, whose first position is `position`.
  void keys(int64_t sequence, int64_t head, int64_t position, const float* rows) {
    const int64_t dim = cache_.dim, size = cache_.group_size;
    for (int64_t i = 0; i < dim; ++i) grid_.low[i] = grid_.high[i] = rows[i];
    alignas(64) float other[kRow];  // 0, or NaN where a row is not finite: comparisons lose a NaN
    for (int64_t i = 0; i < dim; ++i) other[i] = rows[i] * 0;
    for (int64_t t = 1; t < size; ++t) {
      const float* row = rows + t * kRow;
      for (int64_t i = 0; i < dim; ++i) {
        grid_.low[i] = smaller(row[i], grid_.low[i]);
        grid_.high[i] = larger(row[i], grid_.high[i]);
        other[i] += row[i] * 0;
      }
    }
    for (int64_t i = 0; i < dim; ++i) grid_.high[i] += other[i];
    grid_.make(dim, levels_);
    const int64_t page = cache_.page_of(sequence, position), slot = position % cache_.page_size;
    const int64_t at = ((page * (cache_.page_size / size) + slot / size) * cache_.kv_heads + head) * dim;
    std::memcpy(cache_.k_scales + at, grid_.scales, size_t(dim) * 2);
    std::memcpy(cache_.k_offsets + at, grid_.offsets, size_t(dim) * 2);
    for (int64_t t = 0; t < size; ++t) {
      alignas(64) float codes[kRow];
      const float* row = rows + t * kRow;
      for (int64_t i = 0; i < dim; ++i) codes[i] = code_of(row[i], grid_.low[i], grid_.inverse[i], levels_);
      pack_codes(codes, dim, bits_of(cache_.format), place(cache_.k, page, slot + t, head));
    }
  }

  void values(int64_t sequence, int64_t head, int64_t position, const float* row) {
    const int64_t dim = cache_.dim_v, each = cache_.channel_group, groups = cache_.value_groups();
    for (int64_t g = 0; g < groups; ++g) {
      float low = row[g * each], high = low, other = low * 0;
      for (int64_t i = g * each + 1; i < least(dim, (g + 1) * each); ++i) {
        low = smaller(row[i], low);
        high = larger(row[i], high);
        other += row[i] * 0;
      }
      grid_.low[g] = low;
      grid_.high[g] = high + other;
    }
    grid_.make(groups, levels_);
    const int64_t page = cache_.page_of(sequence, position), slot = position % cache_.page_size;
    const int64_t at = ((page * cache_.page_size + slot) * cache_.kv_heads + head) * groups;
    std::memcpy(cache_.v_scales + at, grid_.scales, size_t(groups) * 2);
    std::memcpy(cache_.v_offsets + at, grid_.offsets, size_t(groups) * 2);
    alignas(64) float codes[kRow];
    for (int64_t g = 0; g < groups; ++g) {
      const float offset = grid_.low[g], inverse = grid_.inverse[g];
      for (int64_t i = g * each; i < least(dim, (g + 1) * each); ++i)
        codes[i] = code_of(row[i], offset, inverse, levels_);
    }
    pack_codes(codes, dim, bits_of(cache_.format), place(cache_.v, page, slot, head));
  }

  static uint8_t* place(const CacheRows& rows, int64_t page, int64_t slot, int64_t head) {
    return reinterpret_cast<uint8_t*>(rows.data + page * rows.page + slot * rows.slot + head * rows.head);
  }

 private:
  const KvCache& cache_;
  float levels_;
  Grid grid_;
};

void fp8_row(const float* row, int64_t count, const float* scales, int64_t head, uint8_t* to) {
  const float scale = scales ? scales[head] : 1;
  for (int64_t i = 0; i < count; ++i) to[i] = to_e4m3(row[i] / scale);
}

void append_dense(const AppendArgs& call, int64_t b, int64_t h) {
  const KvCache& cache = call.cache;
  const Dtype dtype = cache.dtype;
  Turn turn;
  alignas(64) float row[kRow];
  for (int64_t i = 0; i < call.tokens; ++i) {
    const int64_t position = call.seqlens[b] + i, slot = position % cache.page_size;
    const int64_t page = cache.page_of(b, position);
    const void *k = row_of(call.k, dtype, b, i, h), *v = row_of(call.v, dtype, b, i, h);
    uint8_t* k_to = Writer::place(cache.k, page, slot, h);
    uint8_t* v_to = Writer::place(cache.v, page, slot, h);
    if (cache.format == CacheFormat::kNone) {
      if (call.rotary.cos) {
        turn_of(call.rotary, b, i, position, turn);
        to_float(k, dtype, row, cache.dim);
        rotate_row(call.rotary, turn, row);
        from_float(row, k_to, dtype, cache.dim);
      } else {
        std::memcpy(k_to, k, size_t(cache.dim * size_of(dtype)));
      }
      std::memcpy(v_to, v, size_t(cache.dim_v * size_of(dtype)));
      continue;
    }
    turn_of(call.rotary, b, i, position, turn);
    to_float(k, dtype, row, cache.dim);
    if (call.rotary.cos) {
      alignas(64) float rounded[kRow];
      rotate_row(call.rotary, turn, row);
      from_float(row, rounded, dtype, cache.dim);
      to_float(rounded, dtype, row, cache.dim);
    }
    fp8_row(row, cache.dim, cache.k_head_scales, h, k_to);
    to_float(v, dtype, row, cache.dim_v);
    fp8_row(row, cache.dim_v, cache.v_head_scales, h, v_to);
  }
}

// Row `position` of a tail.
void* tail_row(const KvCache& cache, void* tail, int64_t dim, int64_t b, int64_t h, int64_t position) {
  const int64_t slot = position % (2 * cache.group_size);
  return element(tail, cache.dtype, ((b * 2 * cache.group_size + slot) * cache.kv_heads + h) * dim);
}

// `group`: floats of a group's rows, kRow apart. A group that becomes whole is begun in the tail, or all new.
void append_codes(const AppendArgs& call, int64_t b, int64_t h, float* group) {
  const KvCache& cache = call.cache;
  const Dtype dtype = cache.dtype;
  const int64_t size = cache.group_size, begin = call.seqlens[b], end = begin + call.tokens;
  const int64_t whole = end / size * size, kept = most(begin, whole - size);
  Writer writer(cache);
  Turn turn;
  alignas(64) float row[kRow];
  alignas(64) uint8_t rounded[kRow * 4];
  for (int64_t p = begin / size * size; p < whole; p += size)
    for (int64_t t = 0; t < size; ++t) {
      const int64_t position = p + t;
      float* to = group + t * kRow;
      if (position < begin) {
        to_float(tail_row(cache, cache.k_tail, cache.dim, b, h, position), dtype, to, cache.dim);
        to_float(tail_row(cache, cache.v_tail, cache.dim_v, b, h, position), dtype, row, cache.dim_v);
      } else {
        to_float(row_of(call.k, dtype, b, position - begin, h), dtype, to, cache.dim);
        if (call.rotary.cos) {
          turn_of(call.rotary, b, position - begin, position, turn);
          rotate_row(call.rotary, turn, to);
          from_float(to, rounded, dtype, cache.dim);
          to_float(rounded, dtype, to, cache.dim);
        }
        to_float(row_of(call.v, dtype, b, position - begin, h), dtype, row, cache.dim_v);
      }
      writer.values(b, h, position, row);
      if (t == size - 1) writer.keys(b, h, p, group);
    }
  for (int64_t position = kept; position < end; ++position) {
    const void* k = row_of(call.k, dtype, b, position - begin, h);
    void* to = tail_row(cache, cache.k_tail, cache.dim, b, h, position);
    if (call.rotary.cos) {
      turn_of(call.rotary, b, position - begin, position, turn);
      to_float(k, dtype, row, cache.dim);
      rotate_row(call.rotary, turn, row);
      from_float(row, to, dtype, cache.dim);
    } else {
      std::memcpy(to, k, size_t(cache.dim * size_of(dtype)));
    }
    std::memcpy(tail_row(cache, cache.v_tail, cache.dim_v, b, h, position),
                row_of(call.v, dtype, b, position - begin, h), size_t(cache.dim_v * size_of(dtype)));
  }
}

}  // namespace

// Scratch: of codes, group_size rows of kRow floats a thread.
void append_kv(const AppendArgs& call) {
  const KvCache& cache = call.cache;
  const int64_t tasks = cache.batch * cache.kv_heads, group = cache.group_size * kRow;
  if (tasks == 0 || call.tokens == 0) return;
  const int threads = int(least(threads_for(tasks * call.tokens * (cache.dim + cache.dim_v) * 4), tasks));
  const bool codes = has_codes(cache.format);
  auto* groups = codes ? reinterpret_cast<float*>(scratch(size_t(threads * group) * 4)) : nullptr;
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(tasks, thread, team);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t b = task / cache.kv_heads, h = task % cache.kv_heads;
      if (codes) {
        append_codes(call, b, h, groups + thread * group);
      } else {
        append_dense(call, b, h);
      }
    }
  });
}

// Scratch: as append_kv.
void quantize_kv(const QuantizeKvArgs& call) {
  const KvCache& cache = call.cache;
  const Dtype dtype = cache.dtype;
  const int64_t tasks = cache.batch * cache.kv_heads, size = cache.group_size;
  if (tasks == 0 || cache.page_size == 0) return;
  const int threads = int(least(threads_for(tasks * cache.page_size * (cache.dim + cache.dim_v) * 4), tasks));
  const bool codes = has_codes(cache.format);
  auto* groups = codes ? reinterpret_cast<float*>(scratch(size_t(threads * size * kRow) * 4)) : nullptr;
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(tasks, thread, team);
    alignas(64) float row[kRow];
    float* group = groups + (codes ? thread * size * kRow : 0);
    Writer writer(cache);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t b = task / cache.kv_heads, h = task % cache.kv_heads;
      for (int64_t p = 0; p < cache.page_size; ++p) {
        float* k = codes ? group + p % size * kRow : row;
        to_float(row_of(call.k, dtype, b, p, h), dtype, k, cache.dim);
        if (!codes) fp8_row(k, cache.dim, cache.k_head_scales, h, Writer::place(cache.k, b, p, h));
        if (codes && p % size == size - 1) writer.keys(b, h, p + 1 - size, group);
        to_float(row_of(call.v, dtype, b, p, h), dtype, row, cache.dim_v);
        if (codes) {
          writer.values(b, h, p, row);
        } else {
          fp8_row(row, cache.dim_v, cache.v_head_scales, h, Writer::place(cache.v, b, p, h));
        }
      }
    }
  });
}

void rope(const RopeArgs& call) {
  const int64_t rows = call.batch * call.tokens;
  if (rows == 0 || call.heads == 0) return;
  const int threads = int(least(threads_for(rows * call.heads * call.dim * 4), rows));
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(rows, thread, team);
    Turn turn;
    alignas(64) float row[kRow];
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t b = r / call.tokens, i = r % call.tokens;
      turn_of(call.rotary, b, i, i, turn);
      for (int64_t h = 0; h < call.heads; ++h) {
        to_float(row_of(call.x, call.dtype, b, i, h), call.dtype, row, call.dim);
        rotate_row(call.rotary, turn, row);
        from_float(row, element(call.out, call.dtype, (r * call.heads + h) * call.dim), call.dtype, call.dim);
      }
    }
  });
}

}  // namespace bitfuse::BITFUSE_ISA
