// multi_lora_linear on the CPU: y[m] += s (x[m] A^T) B^T, each row with the adapter of its segment.
//
// One parallel region of two halves with a barrier between them:
//   shrink  h = x A^T, float. A task is kBlockRows rows of a segment times kBlockRanks rows of A, both read
//           along K, lane i summing the columns i, i + kLanes, ... Vectors of A serve the rows, vectors of x
//           the ranks: 4 x 4 sums and 8 vectors of operands in registers.
//   expand  a thread owns a stretch of y's columns, of all segments. Of kWidth rows of B, transposed block by
//           block in registers, it makes a panel [rank][kWidth] of floats, over which the segment's rows of h
//           pass with the tiles of matmul.h; the sums are scaled and added to y.
//
// With a row an adapter, reading A and B bounds it, each once: 2 (K + N) rank bytes a row in 16 bits, where
// the base reads N K / 2 (int4) to 4 N K in all. With many rows an adapter, reading and writing y: the
// products are rank (1 / N + 1 / K) of the base's. Each output is summed by one thread in an order that does
// not depend on the threads: the same bits from run to run.
#include "cpu/linear/multi_lora_linear.h"

#include <type_traits>

#include "cpu/linear/matmul.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int kBlockRows = 4;
constexpr int kBlockRanks = 4;
constexpr int64_t kChain = 64;  // vectors that a sum adds in a row; then it goes to a total

// kLanes elements of a dtype as floats; of a row's last ones, `count` and zeros.
template <Dtype D>
BITFUSE_INLINE Vf load_at(const void* p, int64_t i) {
  if constexpr (D == Dtype::kFloat32) {
    return load(static_cast<const float*>(p) + i);
  } else if constexpr (D == Dtype::kFloat16) {
    return load_half(static_cast<const uint16_t*>(p) + i);
  } else {
    return load_bfloat(static_cast<const uint16_t*>(p) + i);
  }
}
template <Dtype D>
BITFUSE_INLINE Vf load_some_at(const void* p, int64_t i, int64_t count) {
  float floats[kLanes] = {};
  to_float(element(p, D, i), D, floats, count);
  return load(floats);
}

// What a dot product multiplies: floats, x converted beforehand and padded with zeros.
template <Dtype D>
struct FloatDots {
  using Element = float;
  using Vector = Vf;
  static constexpr int64_t kStep = kLanes;
  static BITFUSE_INLINE Vf load_x(const float* x, int64_t i) { return load(x + i); }
  static BITFUSE_INLINE Vf load_a(const void* a, int64_t i) { return load_at<D>(a, i); }
  static BITFUSE_INLINE Vf load_last_a(const void* a, int64_t i, int64_t count) {
    return load_some_at<D>(a, i, count);
  }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vf a, Vf x) { return fma(a, x, sum); }
};

#if BITFUSE_PAIRS
// The same for x and A in bfloat16: products of pairs.
struct PairDots {
  using Element = uint16_t;
  using Vector = Vi;
  static constexpr int64_t kStep = 2 * kLanes;
  static BITFUSE_INLINE Vi load_x(const uint16_t* x, int64_t i) { return load_dwords(x + i); }
  static BITFUSE_INLINE Vi load_a(const void* a, int64_t i) {
    return load_dwords(static_cast<const uint16_t*>(a) + i);
  }
  static BITFUSE_INLINE Vi load_last_a(const void* a, int64_t i, int64_t count) {
    return load_bytes(static_cast<const uint16_t*>(a) + i, 2 * count);
  }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vi a, Vi x) { return dot_pairs(sum, a, x); }
};
#endif

// h[Rows][ranks] = x[Rows] a[ranks]^T; x is padded with zeros to whole steps, ranks is at most kBlockRanks.
template <class Dots, int Rows>
void dots(const typename Dots::Element* x, int64_t x_stride, const void* a, Dtype a_dtype, int64_t k,
          int ranks, float* h, int64_t h_stride) {
  const void* row[kBlockRanks];
  for (int j = 0; j < kBlockRanks; ++j) row[j] = element(a, a_dtype, k * (j < ranks ? j : 0));
  Vf total[Rows][kBlockRanks], sums[Rows][kBlockRanks];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kBlockRanks; ++j) total[r][j] = sums[r][j] = zero();
  auto step = [&](int64_t i, auto load_row) __attribute__((always_inline)) {
    typename Dots::Vector xs[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) xs[r] = Dots::load_x(x + r * x_stride, i);
#pragma GCC unroll 4
    for (int j = 0; j < kBlockRanks; ++j) {
      const auto as = load_row(row[j], i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[r][j] = Dots::accumulate(sums[r][j], as, xs[r]);
    }
  };
  auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kBlockRanks; ++j) total[r][j] = add(total[r][j], sums[r][j]), sums[r][j] = zero();
  };
  const int64_t whole = k / Dots::kStep * Dots::kStep;
  for (int64_t begin = 0; begin < whole; begin += kChain * Dots::kStep) {
    const int64_t end = least(begin + kChain * Dots::kStep, whole);
    for (int64_t i = begin; i < end; i += Dots::kStep) step(i, Dots::load_a);
    fold();
  }
  if (k > whole) {
    step(whole, [&](const void* p, int64_t i) { return Dots::load_last_a(p, i, k - whole); });
    fold();
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < ranks; ++j) h[r * h_stride + j] = sum(total[r][j]);
}

BITFUSE_INLINE int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }
BITFUSE_INLINE int64_t tasks_of(const LoraSegment& s) {
  return blocks_of(s.end - s.begin, kBlockRows) * blocks_of(s.rank, kBlockRanks);
}

// Tasks [mine.begin, mine.end) of the shrink, counted through all segments, ranks before rows. `natural` is
// room for kBlockRows rows of x, x_stride apart.
template <class Dots>
void shrink(const MultiLoraSegments& call, Range mine, typename Dots::Element* natural, int64_t x_stride,
            float* h) {
  int64_t first = 0;  // of the segment's tasks
  for (int64_t i = 0; i < call.segment_count && first < mine.end; first += tasks_of(call.segments[i++])) {
    const LoraSegment& s = call.segments[i];
    const int64_t rank_blocks = blocks_of(s.rank, kBlockRanks);
    int64_t filled = -1;  // the row block that `natural` holds
    for (int64_t t = most(mine.begin - first, 0); t < least(tasks_of(s), mine.end - first); ++t) {
      const int64_t block = t / rank_blocks, at = s.begin + block * kBlockRows,
                    rank = t % rank_blocks * kBlockRanks;
      const int rows = int(least(kBlockRows, s.end - at)), ranks = int(least(kBlockRanks, s.rank - rank));
      for (int r = 0; r < rows && filled != block; ++r) {
        const void* from = element(call.x, call.dtype, call.order[at + r] * call.row_stride);
        typename Dots::Element* to = natural + r * x_stride;
        if constexpr (sizeof(typename Dots::Element) == 2) {
          std::memcpy(to, from, size_t(call.k) * 2);
        } else {
          to_float(from, call.dtype, to, call.k);
        }
      }
      filled = block;
      const void* a = element(s.a, call.a_dtype, rank * call.k);
      float* to = h + at * call.most_rank + rank;
      auto run = [&](auto fixed) {
        constexpr int Rows = decltype(fixed)::value;
        if (rows == Rows)
          dots<Dots, Rows>(natural, x_stride, a, call.a_dtype, call.k, ranks, to, call.most_rank);
      };
      run(std::integral_constant<int, 1>{});
      run(std::integral_constant<int, 2>{});
      run(std::integral_constant<int, 3>{});
      run(std::integral_constant<int, 4>{});
    }
  }
}

// panel[rank][kWidth] = the transpose of `valid` rows of b [valid][rank]; what lies past them is zero.
template <Dtype D>
void make_panel(const void* b, int64_t rank, int64_t valid, float* panel) {
  for (int64_t n = 0; n < kWidth; n += kLanes) {
    for (int64_t j = 0; j < rank; j += kLanes) {
      const int64_t ranks = least(kLanes, rank - j);
      Vi block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = (n + i) * rank + j;
        block[i] = as_dwords(n + i >= valid    ? zero()
                             : ranks == kLanes ? load_at<D>(b, at)
                                               : load_some_at<D>(b, at, ranks));
      }
      transpose(block);
      for (int i = 0; i < ranks; ++i) store_dwords(panel + (j + i) * kWidth + n, block[i]);
    }
  }
}

// y's columns of the tiles [mine.begin, mine.end), kWidth columns each, of every segment.
template <Dtype D>
void expand(const MultiLoraSegments& call, Range mine, const float* h, float* panel) {
  float c[kMaxRows * kWidth], y[kWidth];
  for (int64_t i = 0; i < call.segment_count; ++i) {
    const LoraSegment& s = call.segments[i];
    const Vf scale = set1(s.scale);
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
      const int64_t n = tile * kWidth, valid = least(kWidth, call.n - n);
      make_panel<D>(element(s.b, D, n * s.rank), s.rank, valid, panel);
      for (int64_t at = s.begin; at < s.end; at += kMaxRows) {
        const int rows = int(least(kMaxRows, s.end - at));
        for (int64_t j = 0; j < s.rank; j += kSegment)
          kTileFloat[rows](h + at * call.most_rank + j, call.most_rank, panel + j * kWidth,
                           int(least(kSegment, s.rank - j)), c, j == 0);
        for (int r = 0; r < rows; ++r) {
          void* to = element(call.y, call.dtype, call.order[at + r] * call.n + n);
          to_float(to, call.dtype, y, valid);
          for (int v = 0; v < kWidth; v += kLanes)
            store(y + v, fma(load(c + r * kWidth + v), scale, load(y + v)));
          from_float(y, to, call.dtype, valid);
        }
      }
    }
  }
}

// Scratch: rank floats for each row with an adapter; on each thread kBlockRows rows of x and a panel.
template <class Dots>
void add_adapters(const MultiLoraSegments& call) {
  using Element = typename Dots::Element;
  int64_t tasks = 0, ranks = 0, rows = 0;
  for (int64_t i = 0; i < call.segment_count; ++i) {
    const LoraSegment& s = call.segments[i];
    tasks += tasks_of(s);
    ranks += (s.end - s.begin) * s.rank;
    rows = most(rows, s.end);
  }
  const int64_t tiles = blocks_of(call.n, kWidth), x_stride = round_up(call.k, Dots::kStep);
  const int threads = int(least(threads_for(ranks * (call.k + call.n)), most(tiles, tasks)));
  const int64_t panel_size = call.most_rank * kWidth;

  float *h, *panels;
  Element* natural;
  auto carve = [&](Carver& carver) {
    h = carver.take<float>(rows * call.most_rank);
    natural = carver.take<Element>(threads * kBlockRows * x_stride);
    panels = carver.take<float>(threads * panel_size);
  };
  Carver need;
  carve(need);
  Carver carver(scratch(need.used()));
  carve(carver);

  parallel(threads, [&](int thread, int team) {
    Element* mine = natural + thread * kBlockRows * x_stride;
    for (int r = 0; r < kBlockRows; ++r)
      for (int64_t i = call.k; i < x_stride; ++i) mine[r * x_stride + i] = 0;
    shrink<Dots>(call, share(tasks, thread, team), mine, x_stride, h);
    wait_for_team(team);
    const Range columns = share(tiles, thread, team);
    float* panel = panels + thread * panel_size;
    if (call.b_dtype == Dtype::kFloat32) {
      expand<Dtype::kFloat32>(call, columns, h, panel);
    } else if (call.b_dtype == Dtype::kFloat16) {
      expand<Dtype::kFloat16>(call, columns, h, panel);
    } else {
      expand<Dtype::kBfloat16>(call, columns, h, panel);
    }
  });
}

}  // namespace

void multi_lora_add(const MultiLoraSegments& call) {
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16 && call.a_dtype == Dtype::kBfloat16) return add_adapters<PairDots>(call);
#endif
  if (call.a_dtype == Dtype::kFloat32) {
    add_adapters<FloatDots<Dtype::kFloat32>>(call);
  } else if (call.a_dtype == Dtype::kFloat16) {
    add_adapters<FloatDots<Dtype::kFloat16>>(call);
  } else {
    add_adapters<FloatDots<Dtype::kBfloat16>>(call);
  }
}

}  // namespace bitfuse::BITFUSE_ISA
