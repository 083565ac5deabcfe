// The inner product of rows of x with a panel of decoded weights.
//
// A panel holds kWidth outputs side by side for each step of the contraction: float [depth][kWidth], or pairs
// of bfloat16 as dwords [depth / 2][kWidth]. A tile is Rows x kWidth accumulators in registers: at 16 lanes 6
// x 4 vectors, with 4 of the panel and 1 broadcast of x 29 of 32 registers, 10 loads to 24 multiply-adds.
#pragma once

#include "cpu/core/elements.h"
#include "cpu/core/threads.h"
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

}  // namespace bitfuse::BITFUSE_ISA
