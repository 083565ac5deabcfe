// The pieces of an adapter: t = drop(x) A^T ahead of a product with W, and t P added to its sums.
//
// - Shrink: t[rows, rank]. A and x lie with the contraction in memory order, so lanes run along it: a tile is
//   4 rows of x by kDotRanks of A, their sums in registers, 8 loads to 16 multiply-adds at 16 lanes, and
//   lanes are added once a block. Nothing is transposed. Few rows: bound by reading A.
// - Panels: P as floats [rank][kWidth], for the microkernels of matmul.h. A lies so already, B is transposed
//   kLanes x kLanes at a time.
// - Expand: t P onto what is there, in tiles of kWidth outputs. Bound by reading and writing them.
//
// Everything is float32 but the products of bfloat16 x with bfloat16 A at the avx512bf16 level, which are
// exact before they are summed in float32.
#pragma once

#include "cpu/core/dropout.h"
#include "cpu/core/elements.h"
#include "cpu/linear/lora_linear.h"
#include "cpu/linear/matmul.h"

namespace bitfuse::BITFUSE_ISA {

class Mask {
 public:
  explicit Mask(const Dropout& dropout)
      : seed_(dropout.seed), threshold_(dropout_threshold(dropout.p)), share_(set1(float(1 - dropout.p))) {}

  struct Row {
    Vi first, second, threshold;
    Vf share;
    // `value` over the share that survives in the lanes that do, 0 in the others; lane 0 is column `column`.
    BITFUSE_INLINE Vf keep(int64_t column, Vf value) const {
      const Vi columns = add_dwords(set1_dwords(uint32_t(column)), lane_numbers());
      return where_at_least(dropout_bits(columns, first, second), threshold, div(value, share));
    }
  };
  BITFUSE_INLINE Row row(int64_t index) const {
    const DropoutRow words(seed_, uint32_t(index));
    return {set1_dwords(words.first), set1_dwords(words.second), set1_dwords(threshold_), share_};
  }

 private:
  uint64_t seed_;
  uint32_t threshold_;
  Vf share_;
};

// Columns [from, from + count) of row `row` of drop(x) * scale as floats, then zeros up to `padded`; both are
// multiples of kLanes but count.
template <class Elements>
BITFUSE_INLINE void read_row(const typename Elements::Type* x, int64_t row, int64_t from, int64_t count,
                             int64_t padded, const Mask* mask, float scale, float* to) {
  const Vf s = set1(scale);
  const Mask::Row kept = mask ? mask->row(row) : Mask::Row{};
  auto put = [&](int64_t i, Vf v)
                 __attribute__((always_inline)) { store(to + i, mul(mask ? kept.keep(from + i, v) : v, s)); };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) put(i, Elements::whole(x + from + i));
  if (i < count) put(i, Elements::some(x + from + i, int(count - i))), i += kLanes;
  for (; i < padded; i += kLanes) store(to + i, zero());
}

// the shrink

constexpr int kDotRows = 4;
constexpr int kDotRanks = kLanes == 16 ? 4 : 2;
constexpr int64_t kDotSegment = 16 * kLanes;  // summed apart: as long a sum as is in each lane
constexpr int64_t kDotBlock = 1024;           // of the contraction: kDotGroup rows of it stay in L2
constexpr int64_t kDotGroup = 32;

// out[Rows][Ranks] (+)= x[Rows][depth] A[Ranks][depth]^T.
template <class Elements, int Rows, int Ranks>
void dots(const float* x, int64_t x_stride, const void* matrix, int64_t a_stride, int64_t depth, float* out,
          int64_t out_stride, bool first) {
  const auto* a = static_cast<const typename Elements::Type*>(matrix);
  const int64_t whole = depth / kLanes * kLanes;
  Vf total[Rows][Ranks];
  for (int64_t at = 0; at == 0 || at < whole; at += kDotSegment) {
    Vf acc[Rows][Ranks];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Ranks; ++j) acc[r][j] = zero();
    auto step = [&](auto load_x, auto load_a) __attribute__((always_inline)) {
      Vf b[Ranks];
#pragma GCC unroll 4
      for (int j = 0; j < Ranks; ++j) b[j] = load_a(a + j * a_stride);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vf v = load_x(x + r * x_stride);
#pragma GCC unroll 4
        for (int j = 0; j < Ranks; ++j) acc[r][j] = fma(v, b[j], acc[r][j]);
      }
    };
    const int64_t end = least(at + kDotSegment, whole);
    for (int64_t i = at; i < end; i += kLanes)
      step([&](const float* p) { return load(p + i); },
           [&](const auto* p) { return Elements::whole(p + i); });
    if (end == whole && depth > whole) {
      const int rest = int(depth - whole);
      step([&](const float* p) { return load_first(p + whole, rest); },
           [&](const auto* p) { return Elements::some(p + whole, rest); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Ranks; ++j) total[r][j] = at ? add(total[r][j], acc[r][j]) : acc[r][j];
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Ranks; ++j) {
      float* to = out + r * out_stride + j;
      *to = first ? sum(total[r][j]) : *to + sum(total[r][j]);
    }
}

using Dots = void (*)(const float*, int64_t, const void*, int64_t, int64_t, float*, int64_t, bool);
template <class Elements, int Ranks>
constexpr Dots kDots[kDotRows + 1] = {nullptr, dots<Elements, 1, Ranks>, dots<Elements, 2, Ranks>,
                                      dots<Elements, 3, Ranks>, dots<Elements, 4, Ranks>};

#if BITFUSE_PAIRS
// The same for bfloat16 x and A, pairs of the contraction at a time.
template <int Rows, int Ranks>
void dots_pairs(const uint16_t* x, int64_t x_stride, const uint16_t* a, int64_t a_stride, int64_t depth,
                float* out, int64_t out_stride, bool first) {
  Vf acc[Rows][Ranks];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Ranks; ++j) acc[r][j] = zero();
  auto step = [&](auto read) __attribute__((always_inline)) {
    Vi b[Ranks];
#pragma GCC unroll 4
    for (int j = 0; j < Ranks; ++j) b[j] = read(a + j * a_stride);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vi v = read(x + r * x_stride);
#pragma GCC unroll 4
      for (int j = 0; j < Ranks; ++j) acc[r][j] = dot_pairs(acc[r][j], v, b[j]);
    }
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= depth; i += 2 * kLanes)
    step([&](const uint16_t* p) { return load_dwords(p + i); });
  if (i < depth) step([&](const uint16_t* p) { return load_bytes(p + i, 2 * (depth - i)); });
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Ranks; ++j) {
      float* to = out + r * out_stride + j;
      *to = first ? sum(acc[r][j]) : *to + sum(acc[r][j]);
    }
}

using DotsPairs = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t,
                           bool);
template <int Ranks>
constexpr DotsPairs kDotsPairs[kDotRows + 1] = {nullptr, dots_pairs<1, Ranks>, dots_pairs<2, Ranks>,
                                                dots_pairs<3, Ranks>, dots_pairs<4, Ranks>};
#endif

// h = drop(x) A^T of some rows, shared by a team. Which thread computes an element changes no bit of it.
// Scratch, on each thread: 128 KiB, and 16 bytes for each column of x.
class Shrink {
 public:
  Shrink(const Adapter& adapter, const void* x, Dtype dtype, int64_t row_stride, int64_t depth)
      : adapter_(adapter),
        mask_(adapter.dropout),
        masked_(adapter.dropout.p > 0),
        x_(x),
        dtype_(dtype),
        row_stride_(row_stride),
        depth_(depth) {
#if BITFUSE_PAIRS
    pairs_ = !masked_ && dtype == Dtype::kBfloat16 && adapter.a_dtype == Dtype::kBfloat16;
#endif
    packed_ = !pairs_ && (masked_ || dtype != Dtype::kFloat32);
  }

  float* carve_worker(Carver& carver) const {
    return carver.take<float>(packed_ ? most(kDotGroup * kDotBlock, kDotRows * round_up(depth_, kLanes)) : 0);
  }

  // Rows [first, first + rows), the part of `thread` of a team.
  void run(int64_t first, int64_t rows, int thread, int team, float* buffer) const {
    // few rows: a thread takes ranks, so that A is read once; many: rows, so that x is
    const int64_t rank_tiles = round_up(adapter_.rank, kDotRanks) / kDotRanks;
    const int64_t parts = rows <= kDotGroup ? least(rank_tiles, team) : 1;
    const int64_t groups = most((rows + kDotGroup - 1) / kDotGroup,
                                least((rows + kDotRows - 1) / kDotRows, (team + parts - 1) / parts));
    const int64_t step = rows <= kDotRows ? most(depth_, 1) : kDotBlock;
    const Range tasks = share(groups * parts, thread, team);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const Range mine = share(rows, task / parts, groups), tiles = share(rank_tiles, task % parts, parts);
      block(first + mine.begin, mine.end - mine.begin, step, tiles.begin * kDotRanks,
            least(tiles.end * kDotRanks, adapter_.rank), buffer);
    }
  }

 private:
  // In steps of the contraction that no team changes.
  void block(int64_t row, int64_t rows, int64_t step, int64_t rank, int64_t rank_end, float* buffer) const {
    for (int64_t k = 0; k < depth_ || k == 0; k += step) {
      const int64_t count = least(step, depth_ - k), padded = round_up(count, kLanes);
      const float* x = static_cast<const float*>(element(x_, dtype_, row * row_stride_ + k));
      int64_t stride = row_stride_;
      if (packed_) {
        with_elements(dtype_, [&](auto elements) {
          using Elements = decltype(elements);
          const auto* from = static_cast<const typename Elements::Type*>(x_);
          for (int64_t r = row; r < row + rows; ++r)
            read_row<Elements>(from + r * row_stride_, r, k, count, padded, masked_ ? &mask_ : nullptr, 1,
                               buffer + (r - row) * padded);
        });
        x = buffer;
        stride = padded;
      }
      with_elements(adapter_.a_dtype, [&](auto elements) {
        using Elements = decltype(elements);
        for (int64_t j = rank, next; j < rank_end; j = next) {
          const bool whole = j + kDotRanks <= rank_end;
          next = j + (whole ? kDotRanks : 1);
          const auto* a = static_cast<const typename Elements::Type*>(adapter_.a) + j * depth_ + k;
          for (int64_t r = 0, tile; r < rows; r += tile) {
            tile = least(kDotRows, rows - r);
            float* out = adapter_.h + (row + r) * adapter_.rank + j;
#if BITFUSE_PAIRS
            if (pairs_) {
              const auto* words = static_cast<const uint16_t*>(x_) + (row + r) * row_stride_ + k;
              const auto* a_words = static_cast<const uint16_t*>(adapter_.a) + j * depth_ + k;
              (whole ? kDotsPairs<kDotRanks> : kDotsPairs<1>)[tile](words, row_stride_, a_words, depth_,
                                                                    count, out, adapter_.rank, k == 0);
              continue;
            }
#endif
            (whole ? kDots<Elements, kDotRanks> : kDots<Elements, 1>)[tile](
                x + r* stride, stride, a, depth_, count, out, adapter_.rank, k == 0);
          }
        }
      });
    }
  }

  const Adapter& adapter_;
  Mask mask_;
  bool masked_, packed_, pairs_ = false;
  const void* x_;
  Dtype dtype_;
  int64_t row_stride_, depth_;
};

// panels of P

// panel[count][Width] = scale * drop(P)[first, first + count)[out, out + valid), zeros past it; P is
// row-major.
template <int Width>
void natural_panel(const void* p, Dtype dtype, int64_t stride, int64_t first, int64_t count, int64_t out,
                   int64_t valid, const Mask* mask, float scale, float* panel) {
  with_elements(dtype, [&](auto elements) {
    using Elements = decltype(elements);
    const auto* from = static_cast<const typename Elements::Type*>(p);
    for (int64_t i = 0; i < count; ++i)
      read_row<Elements>(from + (first + i) * stride, first + i, out, valid, Width, mask, scale,
                         panel + i * Width);
  });
}

// panel[count][kWidth] = scale * P[out, out + valid)[first, first + count)^T; P is row-major. Columns past
// `valid` hold what meets no output.
inline void transposed_panel(const void* p, Dtype dtype, int64_t stride, int64_t first, int64_t count,
                             int64_t out, int64_t valid, float scale, float* panel) {
  with_elements(dtype, [&](auto elements) {
    using Elements = decltype(elements);
    const auto* from = static_cast<const typename Elements::Type*>(p) + out * stride + first;
    const Vf s = set1(scale);
    for (int v = 0; v < kWidth; v += kLanes)
      for (int64_t at = 0; at < count; at += kLanes) {
        Vi a[kLanes];
        const int steps = int(least(kLanes, count - at));
        if (steps == kLanes && v + kLanes <= valid) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            a[i] = as_dwords(mul(Elements::whole(from + (v + i) * stride + at), s));
        } else {
          for (int i = 0; i < kLanes; ++i) {
            const auto* row = from + least(v + i, valid - 1) * stride + at;
            a[i] = as_dwords(mul(steps == kLanes ? Elements::whole(row) : Elements::some(row, steps), s));
          }
        }
        transpose(a);
        for (int i = 0; i < steps; ++i) store_dwords(panel + (at + i) * kWidth + v, a[i]);
      }
  });
}

constexpr int64_t kAddendBlock = kLanes == 16 ? 128 : 512;  // ranks to a panel: 32 KiB, 16 at 4 lanes

// sums[rows][kWidth] (+)= t[rows, rank] P. fill(first, count, panel) makes a panel of P.
template <class Fill>
void add_low_rank(const float* t, int64_t rank, int64_t rows, Fill fill, float* panel, float* sums,
                  bool first) {
  const int64_t row_tiles = round_up(rows, kMaxRows) / kMaxRows;
  for (int64_t j = 0; j < rank; j += kAddendBlock) {
    const int64_t count = least(kAddendBlock, rank - j);
    fill(j, count, panel);
    for (int64_t i = 0; i < row_tiles; ++i) {
      const Range tile = share(rows, i, row_tiles);
      for (int64_t s = 0; s < count; s += kSegment)
        kTileFloat[tile.end - tile.begin](t + tile.begin * rank + j + s, rank, panel + s * kWidth,
                                          int(least(kSegment, count - s)), sums + tile.begin * kWidth,
                                          first && j + s == 0);
    }
  }
}

// out[rows] at its stride = (sums (+ base)) * scale + bias, rounded once; scale and bias are [kWidth]. base
// is null or of out's dtype, and can be out itself.
inline void finish_rows(float* sums, int64_t rows, int64_t valid, const float* scale, const float* bias,
                        const void* base, int64_t base_stride, Dtype dtype, void* out, int64_t out_stride) {
  float before[kWidth] = {};
  for (int64_t r = 0; r < rows; ++r, sums += kWidth) {
    if (base) {
      to_float(element(base, dtype, r * base_stride), dtype, before, valid);
      for (int v = 0; v < kWidth; v += kLanes) store(sums + v, add(load(sums + v), load(before + v)));
    }
    for (int v = 0; v < kWidth; v += kLanes)
      store(sums + v, fma(load(sums + v), load(scale + v), load(bias + v)));
    from_float(sums, element(out, dtype, r * out_stride), dtype, valid);
  }
}

// the expansion

// An LoraExpandArgs, shared by a team in tiles of kWidth outputs. Scratch, on each thread: 32 KiB and the
// sums of kExpandRows rows, 126 KiB.
class Expand {
 public:
  static constexpr int64_t kExpandRows = 504;

  Expand(const LoraExpandArgs& call, int threads)
      : call_(call), mask_(call.dropout), masked_(call.dropout.p > 0) {
    tiles_ = round_up(call.outs, kWidth) / kWidth;
    parts_ = most((call.rows + kExpandRows - 1) / kExpandRows,
                  least((threads + tiles_ - 1) / tiles_, (call.rows + kMaxRows - 1) / kMaxRows));
  }

  struct Worker {
    float *panel, *sums, *scale, *bias;
  };
  Worker carve_worker(Carver& carver) const {
    Worker worker;
    worker.panel = carver.take<float>(kAddendBlock * kWidth);
    worker.sums = carver.take<float>(least(kExpandRows, call_.rows) * kWidth);
    worker.scale = carver.take<float>(kWidth);
    worker.bias = carver.take<float>(kWidth);
    return worker;
  }

  void run(int thread, int team, const Worker& my) const {
    const Range tasks = share(tiles_ * parts_, thread, team);
    for (int64_t task = tasks.begin; task < tasks.end; ++task)
      tile(task / parts_ * kWidth, share(call_.rows, task % parts_, parts_), my);
  }

 private:
  void tile(int64_t out, Range rows, const Worker& my) const {
    const int64_t valid = least(kWidth, call_.outs - out), count = rows.end - rows.begin;
    auto fill = [&](int64_t first, int64_t ranks, float* panel) {
      if (call_.transposed)
        return transposed_panel(call_.p, call_.p_dtype, call_.rank, first, ranks, out, valid, call_.scale,
                                panel);
      natural_panel<kWidth>(call_.p, call_.p_dtype, call_.outs, first, ranks, out, valid, nullptr,
                            call_.scale, panel);
    };
    add_low_rank(call_.t + rows.begin * call_.rank, call_.rank, count, fill, my.panel, my.sums, true);
    for (int64_t r = 0; masked_ && r < count; ++r) {
      const Mask::Row kept = mask_.row(rows.begin + r);
      for (int v = 0; v < kWidth; v += kLanes) {
        float* at = my.sums + r * kWidth + v;
        store(at, kept.keep(out + v, load(at)));
      }
    }
    for (int i = 0; i < kWidth; ++i) my.scale[i] = 1, my.bias[i] = 0;
    if (call_.out_scale) to_float(call_.out_scale + out, Dtype::kFloat32, my.scale, valid);
    if (call_.bias) to_float(element(call_.bias, call_.bias_dtype, out), call_.bias_dtype, my.bias, valid);
    const void* base =
        call_.base ? element(call_.base, call_.dtype, rows.begin * call_.base_stride + out) : nullptr;
    finish_rows(my.sums, count, valid, my.scale, my.bias, base, call_.base_stride, call_.dtype,
                element(call_.out, call_.dtype, rows.begin * call_.outs + out), call_.outs);
  }

  const LoraExpandArgs& call_;
  Mask mask_;
  bool masked_;
  int64_t tiles_, parts_;
};

}  // namespace bitfuse::BITFUSE_ISA
