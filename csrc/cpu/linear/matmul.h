// The inner product of rows of x with a panel of decoded weights, and what surrounds it: threads, scratch,
// dtypes.
//
// A panel holds kWidth outputs side by side for each step of the contraction: float [depth][kWidth], or pairs
// of bfloat16 as dwords [depth / 2][kWidth]. A tile is Rows x kWidth accumulators in registers: at 16 lanes 6
// x 4 vectors, with 4 of the panel and 1 broadcast of x 29 of 32 registers, 10 loads to 24 multiply-adds.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <new>

#include "cpu/isa/contract.h"
#include "cpu/linear/lowbit_linear.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kVecs = kLanes == 16 ? 4 : 2;
constexpr int kWidth = kVecs * kLanes;
constexpr int kMaxRows = 6;

// c[Rows][Vecs * kLanes] (+)= x[Rows][depth] panel[depth][Vecs * kLanes]; `first` starts from zero. Callers
// give at most kSegment steps at a time: summed apart, so that the rounding of a long sum grows with K /
// kSegment and not with K. Narrow panels, fewer Vecs, take more rows. Turned: x is [depth][Rows].
constexpr int64_t kSegment = 64;
template <int Rows, int Vecs = kVecs, bool Turned = false>
void tile_float(const float* x, int64_t x_stride, const float* panel, int depth, float* c, bool first) {
  constexpr int kPitch = Vecs * kLanes;
  Vf acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) acc[r][v] = zero();
  for (int i = 0; i < depth; ++i) {
    Vf b[Vecs];
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) b[v] = load(panel + i * kPitch + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      Vf a = set1(Turned ? x[i * x_stride + r] : x[r * x_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      float* at = c + r * kPitch + v * kLanes;
      store(at, first ? acc[r][v] : add(acc[r][v], load(at)));
    }
}

using TileFloat = void (*)(const float*, int64_t, const float*, int, float*, bool);
constexpr TileFloat kTileFloat[kMaxRows + 1] = {nullptr,       tile_float<1>, tile_float<2>, tile_float<3>,
                                                tile_float<4>, tile_float<5>, tile_float<6>};

#if BITFUSE_PAIRS
// c[Rows][kWidth] (+)= scale[kWidth] * (x[Rows][2 * pairs] panel[pairs][kWidth]); x_stride counts
// bfloat16.
template <int Rows>
void tile_pairs(const uint16_t* x, int64_t x_stride, const uint32_t* panel, int pairs, const float* scale,
                float* c, bool first) {
  Vf acc[Rows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
  for (int i = 0; i < pairs; ++i) {
    Vi b[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) b[v] = load_dwords(panel + i * kWidth + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x + r * x_stride + 2 * i, 4);
      const Vi a = set1_dwords(pair);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = dot_pairs(acc[r][v], b[v], a);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    Vf s = load(scale + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      float* at = c + r * kWidth + v * kLanes;
      store(at, first ? mul(acc[r][v], s) : fma(acc[r][v], s, load(at)));
    }
  }
}

using TilePairs = void (*)(const uint16_t*, int64_t, const uint32_t*, int, const float*, float*, bool);
constexpr TilePairs kTilePairs[kMaxRows + 1] = {nullptr,       tile_pairs<1>, tile_pairs<2>, tile_pairs<3>,
                                                tile_pairs<4>, tile_pairs<5>, tile_pairs<6>};
#endif

// Not std::min: a weak symbol of a wide level must not be what the linker gives to a narrow one.
BITFUSE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
BITFUSE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
BITFUSE_INLINE int64_t round_up(int64_t a, int64_t multiple) {
  return (a + multiple - 1) / multiple * multiple;
}

// Part `index` of `parts` near-equal contiguous ranges of [0, count).
struct Range {
  int64_t begin, end;
};
BITFUSE_INLINE Range share(int64_t count, int64_t index, int64_t parts) {
  int64_t each = count / parts, more = count % parts;
  int64_t begin = index * each + least(index, more);
  return {begin, begin + each + (index < more)};
}

// f(thread, threads) on each of at most `threads` threads. All of them see the same `threads`, which can be
// fewer than asked for; no result depends on it.
template <class F>
void parallel(int threads, F f) {
  if (threads <= 1) return f(0, 1);
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}

// Threads worth waking for this many multiply-adds: a region costs about as much as 2^18 of them.
BITFUSE_INLINE int threads_for(int64_t multiply_adds) {
  return int(least(most(multiply_adds >> 18, 1), omp_get_max_threads()));
}

// Memory of the calling thread that outlives the call, 64-byte aligned; its contents are whatever the last
// call left. Workers use slices of the caller's. It grows to the largest call's need, which every kernel
// bounds and states.
inline char* scratch(size_t bytes) {
  struct Block {
    char* data = nullptr;
    size_t size = 0;
    ~Block() { std::free(data); }
  };
  thread_local Block block;
  if (bytes > block.size) {
    std::free(block.data);
    block.size = 0;
    size_t rounded = (bytes + 4095) & ~size_t(4095);
    block.data = static_cast<char*>(std::aligned_alloc(64, rounded));
    if (!block.data) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.data;
}

// Hands out 64-byte aligned arrays from one block of scratch. With a null block it only adds up the need.
class Carver {
 public:
  explicit Carver(char* block = nullptr) : block_(block) {}
  template <class T>
  T* take(int64_t count) {
    size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    return reinterpret_cast<T*>(block_ ? block_ + at : nullptr);
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

// Floats of `count` elements of any dtype.
inline void to_float(const void* from, Dtype dtype, float* to, int64_t count) {
  if (dtype == Dtype::kFloat32) {
    // vectors and not memcpy, which is slow to start at the few hundred bytes of a row's scales
    const auto* p = static_cast<const float*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(p + i));
    for (; i < count; ++i) to[i] = p[i];
    return;
  }
  const auto* p = static_cast<const uint16_t*>(from);
  const bool half = dtype == Dtype::kFloat16;
  int64_t i = 0;
  if (half) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_half(p + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_bfloat(p + i));
  }
  if (i < count) {
    uint16_t words[kLanes] = {};
    float floats[kLanes];
    std::memcpy(words, p + i, size_t(count - i) * 2);
    store(floats, half ? load_half(words) : load_bfloat(words));
    std::memcpy(to + i, floats, size_t(count - i) * 4);
  }
}

inline void from_float(const float* from, void* to, Dtype dtype, int64_t count) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, size_t(count) * 4);
    return;
  }
  auto* p = static_cast<uint16_t*>(to);
  const bool half = dtype == Dtype::kFloat16;
  int64_t i = 0;
  if (half) {
    for (; i + kLanes <= count; i += kLanes) store_half(p + i, load(from + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store_bfloat(p + i, load(from + i));
  }
  if (i < count) {
    float floats[kLanes] = {};
    uint16_t words[kLanes];
    std::memcpy(floats, from + i, size_t(count - i) * 4);
    if (half) {
      store_half(words, load(floats));
    } else {
      store_bfloat(words, load(floats));
    }
    std::memcpy(p + i, words, size_t(count - i) * 2);
  }
}

BITFUSE_INLINE const void* element(const void* p, Dtype dtype, int64_t index) {
  return static_cast<const char*>(p) + index * size_of(dtype);
}
BITFUSE_INLINE void* element(void* p, Dtype dtype, int64_t index) {
  return static_cast<char*>(p) + index * size_of(dtype);
}

}  // namespace bitfuse::BITFUSE_ISA
