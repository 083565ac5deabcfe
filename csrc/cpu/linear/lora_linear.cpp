// The thin products of an adapter: one dimension is its rank.
//
// - lora_shrink: h = drop(x) A^T (low_rank.h). With a few-bit W it is part of the product instead.
// - lora_expand: y += s h B^T and dX += drop'(GB A) beside a dense W, with bias and scale in the same pass.
// - bottleneck_adapter: h = x D^T + c, t = act(h), y = x + t U^T + b; the two above, a barrier around t.
// - lora_times: GB = s dY B. Lanes run along the ranks, where B lies so already; a panel is as narrow as the
//   rank, and the narrower it is the more rows a tile has.
// - lora_outer: dA = GB^T drop(x) and dB = s dY^T h. A task is kWidth columns of x or dY, a panel 128 rows of
//   them, and each tile of 6 ranks broadcasts t, which lies [rows][rank]: only dB's result is transposed.
//
// Bound by multiply-adds from a few dozen rows on, below by reading A, B, x and dY, each once. Each output is
// summed by one thread in an order that no thread count changes: the same bits from run to run. Scratch, on
// each thread: at most 192 KiB, and for a shrink what Shrink says.
#include "cpu/linear/lora_linear.h"

#include <utility>

#include "cpu/core/activations.h"
#include "cpu/linear/low_rank.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kDepth = 128;  // steps to a panel

// Rows of a tile as wide as Vecs vectors: as many sums as registers hold, or 12.
template <int Vecs>
constexpr int kTileRows = kMaxRows * kVecs / Vecs < 12 ? kMaxRows * kVecs / Vecs : 12;

template <int Vecs, bool Turned, class Rows = std::make_integer_sequence<int, kTileRows<Vecs>>>
struct Tiles;
template <int Vecs, bool Turned, int... Rows>
struct Tiles<Vecs, Turned, std::integer_sequence<int, Rows...>> {
  static constexpr TileFloat table[] = {nullptr, tile_float<Rows + 1, Vecs, Turned>...};
};

// out columns [column, column + Vecs * kLanes) of rows [row, row + rows).
template <int Vecs>
void times_block(const LoraTimesArgs& call, int64_t row, int64_t rows, int64_t column, float* panel,
                 float* packed, float* sums) {
  constexpr int kPitch = Vecs * kLanes, kTile = kTileRows<Vecs>;
  const int64_t valid = least(kPitch, call.rank - column), tiles = (rows + kTile - 1) / kTile;
  for (int64_t k = 0; k < call.depth; k += kDepth) {
    const int64_t count = least(kDepth, call.depth - k);
    natural_panel<kPitch>(call.b, call.b_dtype, call.rank, k, count, column, valid, nullptr, 1, panel);
    for (int64_t i = 0; i < tiles; ++i) {
      const Range tile = share(rows, i, tiles);
      const float* y = static_cast<const float*>(call.y) + (row + tile.begin) * call.row_stride + k;
      int64_t stride = call.row_stride;
      if (call.dtype != Dtype::kFloat32) {
        for (int64_t r = tile.begin; r < tile.end; ++r)
          to_float(element(call.y, call.dtype, (row + r) * call.row_stride + k), call.dtype,
                   packed + (r - tile.begin) * kDepth, count);
        y = packed;
        stride = kDepth;
      }
      for (int64_t s = 0; s < count; s += kSegment)
        Tiles<Vecs, false>::table[tile.end - tile.begin](y + s, stride, panel + s * kPitch,
                                                         int(least(kSegment, count - s)),
                                                         sums + tile.begin * kPitch, k + s == 0);
    }
  }
  const Vf scale = set1(call.scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* from = sums + r * kPitch;
    for (int v = 0; v < kPitch; v += kLanes) store(from + v, mul(load(from + v), scale));
    std::memcpy(call.out + (row + r) * call.rank + column, from, size_t(valid) * 4);
  }
}

}  // namespace

void lora_shrink(const LoraShrinkArgs& call) {
  const Shrink shrink(call.adapter, call.x, call.dtype, call.row_stride, call.depth);
  const int threads = threads_for(call.rows * call.depth * call.adapter.rank);
  Carver need;
  shrink.carve_worker(need);
  char* block = scratch(size_t(threads) * need.used());
  parallel(threads, [&](int thread, int team) {
    Carver mine(block + size_t(thread) * need.used());
    shrink.run(0, call.rows, thread, team, shrink.carve_worker(mine));
  });
}

void lora_expand(const LoraExpandArgs& call) {
  const int threads = threads_for(call.rows * call.outs * call.rank);
  const Expand expand(call, threads);
  Carver need;
  expand.carve_worker(need);
  char* block = scratch(size_t(threads) * need.used());
  parallel(threads, [&](int thread, int team) {
    Carver mine(block + size_t(thread) * need.used());
    expand.run(thread, team, expand.carve_worker(mine));
  });
}

void bottleneck_adapter(const BottleneckArgs& call) {
  const Adapter& adapter = call.down.adapter;
  const int64_t rows = call.down.rows, rank = adapter.rank;
  const int threads = threads_for(rows * rank * most(call.down.depth, call.up.outs));
  const Shrink shrink(adapter, call.down.x, call.down.dtype, call.down.row_stride, call.down.depth);
  const Expand expand(call.up, threads);
  struct Worker {
    float* shrink;
    Expand::Worker expand;
  };
  auto carve_worker = [&](Carver& carver) {
    return Worker{shrink.carve_worker(carver), expand.carve_worker(carver)};
  };
  Carver need;
  carve_worker(need);
  char* block = scratch(size_t(threads) * need.used());
  parallel(threads, [&](int thread, int team) {
    Carver mine(block + size_t(thread) * need.used());
    const Worker my = carve_worker(mine);
    auto wait = [&] { wait_for_team(team); };
    shrink.run(0, rows, thread, team, my.shrink);
    wait();
    const Range own = share(rows, thread, team);
    with_activation(call.activation, [&](auto act) {
      with_elements(call.bias_dtype, [&](auto elements) {
        using Elements = decltype(elements);
        const auto* bias = static_cast<const typename Elements::Type*>(call.bias);
        for (int64_t r = own.begin; r < own.end; ++r) {
          float *h = adapter.h + r * rank, *t = call.t + r * rank;
          for (int64_t j = 0; j < rank; j += kLanes) {
            const int count = int(least(kLanes, rank - j));
            const bool whole = count == kLanes;
            Vf v = whole ? load(h + j) : load_first(h + j, count);
            if (bias) v = add(v, whole ? Elements::whole(bias + j) : Elements::some(bias + j, count));
            put_some<Floats>(h + j, v, count);
            put_some<Floats>(t + j, act(v).value, count);
          }
        }
      });
    });
    wait();
    expand.run(thread, team, my.expand);
  });
}

void lora_times(const LoraTimesArgs& call) {
  constexpr int64_t kRows = 120;  // to a panel of B
  const int threads = threads_for(call.rows * call.depth * call.rank);
  struct Worker {
    float *panel, *packed, *sums;
  };
  auto carve_worker = [&](Carver& carver) {
    Worker worker;
    worker.panel = carver.take<float>(kDepth * kWidth);
    worker.packed = carver.take<float>(call.dtype == Dtype::kFloat32 ? 0 : 12 * kDepth);
    worker.sums = carver.take<float>(kRows * kWidth);
    return worker;
  };
  Carver need;
  carve_worker(need);
  char* block = scratch(size_t(threads) * need.used());
  parallel(threads, [&](int thread, int team) {
    Carver carver(block + size_t(thread) * need.used());
    const Worker my = carve_worker(carver);
    const Range mine = share(call.rows, thread, team);
    for (int64_t row = mine.begin; row < mine.end; row += kRows) {
      const int64_t rows = least(kRows, mine.end - row);
      for (int64_t column = 0; column < call.rank;) {
        const int64_t left = call.rank - column;
        if (left <= kLanes) {
          times_block<1>(call, row, rows, column, my.panel, my.packed, my.sums);
          column += kLanes;
        } else if (left <= 2 * kLanes) {
          times_block<2>(call, row, rows, column, my.panel, my.packed, my.sums);
          column += 2 * kLanes;
        } else {
          times_block<kVecs>(call, row, rows, column, my.panel, my.packed, my.sums);
          column += kWidth;
        }
      }
    }
  });
}

void lora_outer(const LoraOuterArgs& call) {
  const int64_t tiles = round_up(call.columns, kWidth) / kWidth,
                rank_tiles = (call.rank + kMaxRows - 1) / kMaxRows;
  const int64_t padded = round_up(call.rank, kLanes);
  const int threads = int(least(threads_for(call.rows * call.columns * call.rank), most(tiles, 1)));
  const bool masked = call.dropout.p > 0;
  const Mask mask(call.dropout);
  struct Worker {
    float *panel, *sums, *rows;
  };
  auto carve_worker = [&](Carver& carver) {
    Worker worker;
    worker.panel = carver.take<float>(kDepth * kWidth);
    worker.sums = carver.take<float>(padded * kWidth);
    worker.rows = carver.take<float>(call.transposed ? kLanes * padded : 0);
    return worker;
  };
  Carver need;
  carve_worker(need);
  char* block = scratch(size_t(threads) * need.used());
  parallel(threads, [&](int thread, int team) {
    Carver carver(block + size_t(thread) * need.used());
    const Worker my = carve_worker(carver);
    const Range tasks = share(tiles, thread, team);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t column = task * kWidth, valid = least(kWidth, call.columns - column);
      for (int64_t i = 0; i < padded * kWidth; i += kLanes) store(my.sums + i, zero());
      for (int64_t m = 0; m < call.rows; m += kDepth) {
        const int64_t count = least(kDepth, call.rows - m);
        natural_panel<kWidth>(call.x, call.dtype, call.row_stride, m, count, column, valid,
                              masked ? &mask : nullptr, call.scale, my.panel);
        for (int64_t i = 0; i < rank_tiles; ++i) {
          const Range tile = share(call.rank, i, rank_tiles);
          for (int64_t s = 0; s < count; s += kSegment)
            Tiles<kVecs, true>::table[tile.end - tile.begin](
                call.t + (m + s) * call.rank + tile.begin, call.rank, my.panel + s * kWidth,
                int(least(kSegment, count - s)), my.sums + tile.begin * kWidth, false);
        }
      }
      if (!call.transposed) {
        for (int64_t j = 0; j < call.rank; ++j)
          from_float(my.sums + j * kWidth, element(call.out, call.out_dtype, j * call.columns + column),
                     call.out_dtype, valid);
        continue;
      }
      for (int64_t v = 0; v < valid; v += kLanes) {
        for (int64_t j = 0; j < padded; j += kLanes) {
          Vi a[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) a[i] = load_dwords(my.sums + (j + i) * kWidth + v);
          transpose(a);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store_dwords(my.rows + i * padded + j, a[i]);
        }
        for (int64_t i = 0; i < least(kLanes, valid - v); ++i)
          from_float(my.rows + i * padded, element(call.out, call.out_dtype, (column + v + i) * call.rank),
                     call.out_dtype, call.rank);
      }
    }
  });
}

}  // namespace bitfuse::BITFUSE_ISA
