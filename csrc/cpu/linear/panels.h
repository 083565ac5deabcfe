// Matrix products with W decoded block by block into a panel that stays in L1 while all rows of x pass over
// it.
//
// Bound by multiply-adds. A task is a tile of kWidth outputs; its panel covers kBlock steps of the
// contraction:
//   forward   lanes are rows of W: 4 * kLanes bytes of kLanes rows are transposed as dwords, so that one
//             dword vector holds the codes of kCodes steps, and scales are lane vectors;
//   gradient  lanes are columns of W, read in memory order; the scale of a row's group is a broadcast.
// The sums of a task, [rows][kWidth] floats, stay in L2; an adapter's ranks, which are a few more steps of
// the contraction, bias and rounding come at its end.
#pragma once

#include "cpu/linear/codes.h"
#include "cpu/linear/low_rank.h"
#include "cpu/linear/scales.h"

namespace bitfuse::BITFUSE_ISA {

// What a panel holds:
//   kFloats        (value - zero) * scale, as in a dense float32 weight;
//   kExactPairs    value - zero as bfloat16 pairs, exact; each group's sum is scaled in float32, which is
//                  nearer to the exact product than a dense bfloat16 weight;
//   kRoundedPairs  (value - zero) * scale rounded to bfloat16, as in a dense bfloat16 weight;
//   kCodes,        codes still packed, decoded in registers by each tile; sums are scaled. For few rows of
//   kCodePairs     x, where writing and reading a panel of numbers would cost as much as the products.
enum class Panel { kFloats, kExactPairs, kRoundedPairs, kCodes, kCodePairs };

constexpr bool in_pairs(Panel kind) {
  return kind == Panel::kExactPairs || kind == Panel::kRoundedPairs || kind == Panel::kCodePairs;
}
constexpr bool in_codes(Panel kind) { return kind == Panel::kCodes || kind == Panel::kCodePairs; }
constexpr bool scales_sums(Panel kind) { return kind == Panel::kExactPairs || in_codes(kind); }

constexpr int64_t kPanelDwords = (kLanes == 16 ? 128 : 512) * kWidth;  // 32 KiB, 16 at 4 lanes
constexpr int64_t kChunkRows = 504;         // x rows that a panel serves: a task's sums take 126 KiB
constexpr int64_t kPackedBytes = 16 << 20;  // of x in panel order, unless kMaxRows rows take more

// Steps that are summed apart. Where float32 sums are all the error that there is, short ones, as torch has
// them; but not of formats that version 0.1 served, whose numbers stay.
BITFUSE_INLINE int64_t segment_of(const LowBitMatrix& w, Panel kind) {
  if (in_pairs(kind)) return 2 * kSegment;
  const bool since_then = w.offsets || w.scale_rows > 1 || bits_of(w.code_kind) < 4;
  return since_then ? kSegment / 4 : kSegment;
}

// c[Rows][kWidth] (+)= scale[kWidth] * (x[Rows] panel), the panel being packed codes [dwords][kWidth].
template <class Steps, int Rows>
void tile_codes(const Steps& steps, const typename Steps::Element* x, int64_t x_stride, const uint32_t* panel,
                int dwords, const float* scale, const float* zero_at, float* c, bool first) {
  Vf acc[Rows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = zero();
  for (int i = 0; i < dwords; ++i) {
    unrolled<Steps::kSteps>([&](auto j) __attribute__((always_inline)) {
      constexpr int J = decltype(j)::value;
      typename Steps::Vector b[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const Vf z = Steps::Code::kZeros ? load(zero_at + v * kLanes) : zero();
        b[v] = steps.template weight<J>(load_dwords(panel + i * kWidth + v * kLanes), z);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const auto a = Steps::broadcast(x + r * x_stride + i * Steps::kSteps + J);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[r][v] = Steps::accumulate(acc[r][v], b[v], a);
      }
    });
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    const Vf s = load(scale + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      float* at = c + r * kWidth + v * kLanes;
      store(at, first ? mul(acc[r][v], s) : fma(acc[r][v], s, load(at)));
    }
  }
}

template <class Steps>
using TileCodes = void (*)(const Steps&, const typename Steps::Element*, int64_t, const uint32_t*, int,
                           const float*, const float*, float*, bool);
template <class Steps>
constexpr TileCodes<Steps> kTileCodes[kMaxRows + 1] = {
    nullptr,
    tile_codes<Steps, 1>,
    tile_codes<Steps, 2>,
    tile_codes<Steps, 3>,
    tile_codes<Steps, 4>,
    tile_codes<Steps, 5>,
    tile_codes<Steps, 6>,
};

// One segment of a panel of numbers: x and panel at steps `at` and `within` of the contraction, `count`
// steps.
template <Panel Kind>
BITFUSE_INLINE void tile_numbers(int rows, const void* x, int64_t x_stride, int64_t at, const void* panel,
                                 int64_t within, int64_t count, [[maybe_unused]] const float* scale,
                                 float* sums) {
  if constexpr (Kind == Panel::kFloats) {
    kTileFloat[rows](static_cast<const float*>(x) + at, x_stride,
                     static_cast<const float*>(panel) + within * kWidth, int(count), sums, at == 0);
  }
#if BITFUSE_PAIRS
  if constexpr (in_pairs(Kind)) {
    kTilePairs[rows](static_cast<const uint16_t*>(x) + at, x_stride,
                     static_cast<const uint32_t*>(panel) + within / 2 * kWidth, int((count + 1) / 2), scale,
                     sums, at == 0);
  }
#endif
}

// Lines of memory that the next block will read, asked for a few at a time between tiles: all at once they
// would fill the core's miss buffers and stop it for as long as the memory takes.
class Prefetch {
 public:
  Prefetch() = default;
  // A block of `rows` rows, `bytes` of each.
  Prefetch(const uint8_t* base, int64_t row_bytes, int64_t rows, int64_t bytes)
      : at_(base), row_bytes_(row_bytes), rows_(rows), left_(rows * ((bytes + 63) / 64)) {}

  void spread(int64_t calls) { each_ = (left_ + calls - 1) / calls; }
  // The next lines; `calls` of this ask for all.
  BITFUSE_INLINE void ask() {
    int64_t lines = least(each_, left_);
    left_ -= lines;
    for (; lines > 0; --lines) {
      __builtin_prefetch(at_, 0, 2);
      at_ += row_bytes_;
      if (++row_ == rows_) row_ = 0, at_ += 64 - rows_ * row_bytes_;
    }
  }

 private:
  const uint8_t* at_ = nullptr;
  int64_t row_bytes_ = 0, rows_ = 0, left_ = 0, row_ = 0, each_ = 0;
};

// The steps of a forward panel: what decodes it, with and without pairs.
template <class Code, Panel Kind>
struct StepsOf {
  using type = FloatSteps<Code>;
};
#if BITFUSE_PAIRS
template <class Code>
struct StepsOf<Code, Panel::kExactPairs> {
  using type = PairSteps<Code>;
};
template <class Code>
struct StepsOf<Code, Panel::kCodePairs> {
  using type = PairSteps<Code>;
};
#endif

// Panels of W for y = x W^T: outputs are rows of W, the contraction runs over K.
template <class Code, Panel Kind>
class Forward {
 public:
  using Steps = typename StepsOf<Code, Kind>::type;
  static constexpr Panel kKind = Kind;
  static constexpr bool kGradient = false;
  static constexpr int P = Code::kCodes;
  static constexpr int kOrder = in_pairs(Kind) ? P : 1;  // codes whose pairs x follows
  static constexpr int64_t kBlock = kPanelDwords / kWidth *
                                    (in_codes(Kind)   ? P / 2
                                     : in_pairs(Kind) ? 2
                                                      : 1);  // codes half fill it

  explicit Forward(const LowBitMatrix& w) : w_(w), bits_(bits_of(w.code_kind)), steps_(w) {}
  int64_t outs() const { return w_.n; }
  int64_t depth() const { return w_.k; }

  // Shared by the workers: the group of each dword of a row.
  void carve_shared(Carver& carver) { group_ = carver.take<int32_t>(w_.k / P); }
  void fill_shared() const {
    for (int64_t i = 0; i < w_.k / P; ++i) group_[i] = int32_t(i * P / w_.group_size);
  }

  struct Worker {
    float *rows, *scales, *zeros;     // zeros: or offsets, negated
    float *ones, *none, *minus_none;  // [kWidth]: 1, 0, -0
  };
  Worker carve_worker(Carver& carver) const {
    const int64_t padded = round_up(groups_of(w_), kLanes);
    Worker worker;
    worker.rows = carver.take<float>(kWidth * groups_of(w_) + kLanes);
    worker.scales = carver.take<float>(padded * kWidth);
    worker.zeros = carver.take<float>(Code::kZeros ? padded * kWidth : 0);
    worker.ones = carver.take<float>(kWidth);
    worker.none = carver.take<float>(kWidth);
    worker.minus_none = carver.take<float>(kWidth);
    return worker;
  }

  // Scales (and zeros) of outputs [out, out + kWidth) as [group][kWidth].
  void begin_tile(const Worker& worker, int64_t out) const {
    const int64_t groups = groups_of(w_), valid = least(kWidth, w_.n - out);
    read_scales(w_, out, valid, worker.rows);
    spread(worker.rows, valid, worker.scales);
    if (Code::kZeros) {
      if (w_.offsets) {
        read_offsets(w_, out, valid, worker.rows);
        for (int64_t i = 0; i < valid * groups; ++i) worker.rows[i] = -worker.rows[i];
      } else {
        read_zeros(w_, out, valid, worker.rows);
      }
      spread(worker.rows, valid, worker.zeros);
    }
    for (int i = 0; i < kWidth; ++i) worker.ones[i] = 1, worker.none[i] = 0, worker.minus_none[i] = -0.0f;
  }

  // Where sums are scaled, a block ends where a group does, unless a group is longer than a block.
  int64_t block_end(int64_t k) const {
    if (!scales_sums(Kind)) return least(k + kBlock, w_.k);
    if (w_.group_size > kBlock) return least(k + kBlock, group_end(k));
    return least(k + kBlock / w_.group_size * w_.group_size, w_.k);
  }

  void decode(const Worker& worker, int64_t out, int64_t k, int64_t end, void* panel) const {
    const int64_t row_bytes = bytes_of(w_.k), dwords = (end - k) / P;
    for (int v = 0; v < kVecs; ++v) {
      const uint8_t* row[kLanes];
      for (int i = 0; i < kLanes; ++i)
        row[i] = w_.codes + least(out + v * kLanes + i, w_.n - 1) * row_bytes + bytes_of(k);
      for (int64_t at = 0; at < dwords; at += kLanes) {
        Vi a[kLanes];
        with_chunk<Code>(bits_, [&](auto chunk) __attribute__((always_inline)) {
          using Chunk = decltype(chunk);
          const int64_t left = (w_.k - k) / P - at;
          if (left >= kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) a[i] = Chunk::load(row[i] + Chunk::kBytes * at);
          } else {
            for (int i = 0; i < kLanes; ++i) a[i] = load_chunks<Chunk>(row[i] + Chunk::kBytes * at, left);
          }
        });
        transpose(a);
        const int count = int(least(kLanes, dwords - at));
        if constexpr (Code::kNans) poison(a, count, worker, k / P + at, v * kLanes);
        if constexpr (in_codes(Kind)) {
          uint32_t* to = static_cast<uint32_t*>(panel) + at * kWidth + v * kLanes;
          if (count == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store_dwords(to + i * kWidth, a[i]);
          } else {
            for (int i = 0; i < count; ++i) store_dwords(to + i * kWidth, a[i]);
          }
        } else {
          for (int i = 0; i < count; ++i) {
            const int64_t group = int64_t(group_[k / P + at + i]) * kWidth + v * kLanes;
            const float* other = worker.zeros + group;
            decode_dwords(a[i], worker.scales + group, w_.offsets ? worker.none : other,
                          w_.offsets ? other : worker.minus_none, panel, (at + i) * P, v * kLanes);
          }
        }
      }
    }
  }

  // What follows the block that ends at `end` of the tile at `out`: its next block, or the first one of the
  // tile below.
  Prefetch after(int64_t out, int64_t end) const {
    const int64_t row_bytes = bytes_of(w_.k);
    if (end == w_.k) out += kWidth, end = 0;
    const int64_t next = block_end(end);
    return {w_.codes + out * row_bytes + bytes_of(end), row_bytes, most(least(kWidth, w_.n - out), 0),
            bytes_of(next - end)};
  }

  // A segment is summed apart: at most kSegment steps, and one group where its sum is scaled.
  int64_t segment_end(int64_t k, int64_t end) const {
    const int64_t next = least(end, k + segment_of(w_, Kind));
    return scales_sums(Kind) ? least(next, group_end(k)) : next;
  }

  // sums[rows][kWidth] (+)= x[rows][k, end) W, the panel holding [k, end); x points at row 0 of the tile,
  // column 0.
  void tile(const Worker& worker, int rows, const void* x, int64_t x_stride, int64_t k, int64_t end,
            const void* panel, float* sums, Prefetch& ahead) const {
    for (int64_t s = k, next; s < end; s = next) {
      next = segment_end(s, end);
      ahead.ask();
      const int64_t group = scales_sums(Kind) ? s / w_.group_size * kWidth : 0;
      const float* scale = scales_sums(Kind) ? worker.scales + group : worker.ones;
      if constexpr (in_codes(Kind)) {
        using Element = typename Steps::Element;
        kTileCodes<Steps>[rows](steps_, static_cast<const Element*>(x) + s / P* Steps::kSteps,
                                x_stride / (P / Steps::kSteps),
                                static_cast<const uint32_t*>(panel) + (s - k) / P* kWidth,
                                int((next - s) / P), scale, worker.zeros + group, sums, s == 0);
      } else {
        tile_numbers<Kind>(rows, x, x_stride, s, panel, s - k, next - s, scale, sums);
      }
    }
  }

 private:
  int64_t bytes_of(int64_t codes) const { return codes * bits_ / 8; }
  int64_t group_end(int64_t k) const { return (k / w_.group_size + 1) * w_.group_size; }

  // [valid][groups] to [group][kWidth], zeros for the rows past `valid`.
  void spread(float* rows, int64_t valid, float* to) const {
    const int64_t groups = groups_of(w_);
    for (int64_t i = valid * groups; i < kWidth * groups + kLanes; ++i) rows[i] = 0;
    for (int64_t g = 0; g < groups; g += kLanes)
      for (int v = 0; v < kVecs; ++v) {
        Vi a[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) a[i] = load_dwords(rows + (v * kLanes + i) * groups + g);
        transpose(a);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_dwords(to + (g + i) * kWidth + v * kLanes, a[i]);
      }
  }

  // An output whose weights hold a NaN is NaN for every x: its scale becomes one.
  BITFUSE_INLINE void poison(const Vi (&dwords)[kLanes], int count, const Worker& worker, int64_t at,
                             int lane) const {
    for (int i = 0; i < count; ++i)
      if (any_nan(dwords[i])) {
        float* scale = worker.scales + int64_t(group_[at + i]) * kWidth + lane;
        store(scale, add(load(scale), nan_lanes(dwords[i])));
      }
  }

  // (value - zero) * scale - offset; adding -0 changes nothing.
  BITFUSE_INLINE void decode_dwords(Vi dwords, const float* scale, const float* zero_at,
                                    const float* minus_offset, void* panel, int64_t depth, int lane) const {
    const Vf z = Code::kZeros ? load(zero_at) : zero();
    [[maybe_unused]] auto scaled = [&](Vf v) __attribute__((always_inline)) {
      return Code::kZeros ? fma(v, load(scale), load(minus_offset)) : mul(v, load(scale));
    };
    if constexpr (Kind == Panel::kFloats) {
      float* to = static_cast<float*>(panel) + depth * kWidth + lane;
      unrolled<P>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        store(to + J * kWidth, scaled(steps_.template weight<J>(dwords, z)));
      });
    }
#if BITFUSE_PAIRS
    if constexpr (in_pairs(Kind)) {
      uint32_t* to = static_cast<uint32_t*>(panel) + depth / 2 * kWidth + lane;
      unrolled<P / 2>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        if constexpr (Kind == Panel::kExactPairs) {
          store_dwords(to + J * kWidth, steps_.template weight<J>(dwords, z));
        } else {
          store_dwords(to + J * kWidth,
                       pair_of_rounded(scaled(steps_.template weight<J>(dwords, z)),
                                       scaled(steps_.template weight<J + P / 2>(dwords, z))));
        }
      });
    }
#endif
  }

  const LowBitMatrix& w_;
  const int bits_;
  Steps steps_;
  int32_t* group_ = nullptr;
};

// Panels of W for x' = y' W: outputs are columns of W, the contraction runs over N, pairs are rows 2i and 2i
// + 1. The last of an odd number of rows is paired with zeros, and so is y'.
template <class Code, Panel Kind>
class Gradient {
 public:
  static_assert(Kind == Panel::kFloats || Kind == Panel::kRoundedPairs);
  static constexpr Panel kKind = Kind;
  static constexpr bool kGradient = true;
  static constexpr int kOrder = 1;
  static constexpr int64_t kBlock = kPanelDwords / kWidth * (in_pairs(Kind) ? 2 : 1);
  static constexpr int kTileGroups = kWidth / 8 + 1;  // that a tile's columns can meet

  explicit Gradient(const LowBitMatrix& w) : w_(w), bits_(bits_of(w.code_kind)), code_(w) {}
  int64_t outs() const { return w_.k; }
  int64_t depth() const { return w_.n; }
  void carve_shared(Carver&) {}
  void fill_shared() const {}

  struct Worker {
    float *scales, *zeros, *ones;
  };
  Worker carve_worker(Carver& carver) const {
    Worker worker;
    worker.scales = carver.take<float>(kBlock * kTileGroups);
    worker.zeros = carver.take<float>(Code::kZeros ? kBlock * kTileGroups : 0);
    worker.ones = carver.take<float>(kWidth);
    return worker;
  }
  void begin_tile(const Worker& worker, int64_t) const {
    for (int i = 0; i < kWidth; ++i) worker.ones[i] = 1;
  }
  int64_t block_end(int64_t n) const { return least(n + kBlock, w_.n); }

  void decode(const Worker& worker, int64_t out, int64_t n, int64_t end, void* panel) const {
    const int64_t columns = least(kWidth, w_.k - out), row_bytes = bytes_of(w_.k);
    const int64_t first = out / w_.group_size, count = (out + columns - 1) / w_.group_size + 1 - first;
    read_block(n, end, first, count, worker);
    int group[kTileGroups];  // of each 8 columns, less `first`
    for (int i = 0; i < kTileGroups; ++i)
      group[i] = int(least(out + 8 * i, w_.k - 1) / w_.group_size - first);

    for (int64_t i = 0; i < end - n; ++i) {
      const uint8_t* codes = w_.codes + (n + i) * row_bytes + bytes_of(out);
      __builtin_prefetch(codes + 16 * row_bytes);
      const float *scale = worker.scales + i * count, *zero_at = worker.zeros + i * count;
      Vf row[kVecs];
      decode_row(codes, columns, group, scale, zero_at, row);
      if constexpr (Kind == Panel::kFloats) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(static_cast<float*>(panel) + i * kWidth + v * kLanes, row[v]);
      }
#if BITFUSE_PAIRS
      if constexpr (Kind == Panel::kRoundedPairs) {
        Vf odd[kVecs];
        if (++i < end - n) {
          __builtin_prefetch(codes + 17 * row_bytes);
          decode_row(codes + row_bytes, columns, group, scale + count, zero_at + count, odd);
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) odd[v] = zero();
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          store_dwords(static_cast<uint32_t*>(panel) + i / 2 * kWidth + v * kLanes,
                       pair_of_rounded(row[v], odd[v]));
      }
#endif
    }
  }

  Prefetch after(int64_t, int64_t) const { return {}; }  // `decode` asks for rows as it goes

  int64_t segment_end(int64_t n, int64_t end) const { return least(end, n + segment_of(w_, Kind)); }

  void tile(const Worker& worker, int rows, const void* x, int64_t x_stride, int64_t n, int64_t end,
            const void* panel, float* sums, Prefetch&) const {
    for (int64_t s = n, next; s < end; s = next) {
      next = segment_end(s, end);
      tile_numbers<Kind>(rows, x, x_stride, s, panel, s - n, next - s, worker.ones, sums);
    }
  }

 private:
  int64_t bytes_of(int64_t codes) const { return codes * bits_ / 8; }

  // The kWidth columns of one row of W; those past the last come from code 0 and meet no output.
  BITFUSE_INLINE void decode_row(const uint8_t* codes, int64_t columns, const int* group, const float* scale,
                                 const float* zero_at, Vf (&row)[kVecs]) const {
    constexpr int64_t kBytes = code_bytes<Code>(kWidth);
    uint8_t buffer[kBytes > 4 * kLanes ? kBytes : 4 * kLanes];
    if (Code::kBits == 4 && bits_ < 4) {
      with_chunk<Code>(bits_, [&](auto chunk) __attribute__((always_inline)) {
        using Chunk = decltype(chunk);
        static_assert(Code::kBits == 8 || kWidth / 8 <= kLanes);
        store_dwords(buffer, load_chunks<Chunk>(codes, columns / 8));
      });
      codes = buffer;
    } else if (columns < kWidth) {
      std::memset(buffer, 0, sizeof buffer);
      std::memcpy(buffer, codes, size_t(code_bytes<Code>(columns)));
      codes = buffer;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int low = group[v * kLanes / 8], high = group[v * kLanes / 8 + (kLanes > 8)];
      const Vf other = Code::kZeros ? set_halves(zero_at[low], zero_at[high]) : zero();
      const Vf s = set_halves(scale[low], scale[high]);
      const Vi code = Code::natural(codes + code_bytes<Code>(v * kLanes));
      row[v] = Code::kZeros && w_.offsets ? fma(code_.template value<0>(code, zero()), s, other)
                                          : mul(code_.template value<0>(code, other), s);
      if constexpr (Code::kNans) row[v] = add(row[v], nan_lanes(code));
    }
  }

  // Scales [n, end) x [first, first + count) as [end - n][count], and zeros alike.
  void read_block(int64_t n, int64_t end, int64_t first, int64_t count, const Worker& worker) const {
    auto read = [&](auto at, float* to) {
      for (int64_t i = n; i < end; ++i) {
        const int64_t row = scales_of_row(w_, i) + first;
        for (int64_t g = 0; g < count; ++g) *to++ = at(row + g);
      }
    };
    with_scale_kind(w_.scale_kind, [&](auto kind) {
      read([&](int64_t i) { return scale_at<decltype(kind)::value>(w_, i); }, worker.scales);
    });
    if (!Code::kZeros) return;
    if (w_.offsets) {
      for (int64_t i = n; i < end; ++i)
        read_offset_run(w_, scales_of_row(w_, i) + first, count, worker.zeros + (i - n) * count);
      for (int64_t i = 0; i < (end - n) * count; ++i) worker.zeros[i] = -worker.zeros[i];
    } else {
      read([&](int64_t i) { return float(w_.zeros[i]); }, worker.zeros);
    }
  }

  const LowBitMatrix& w_;
  const int bits_;
  Code code_;
};

// x rows [row, row + count) in the panel's terms: floats, or bfloat16 in which the pairs of each `Order`
// codes are neighbours, and the last of an odd depth has a zero for one.
template <bool Pairs, int Order>
void pack_rows(const LowbitLinearArgs& call, int64_t row, int64_t count, int64_t depth, void* to,
               int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const void* from = element(call.x, call.dtype, (row + r) * call.row_stride);
    if constexpr (!Pairs) {
      to_float(from, call.dtype, static_cast<float*>(to) + r * stride, depth);
    } else {
      const auto* x = static_cast<const uint16_t*>(from);
      auto* out = static_cast<uint16_t*>(to) + r * stride;
      int64_t k = 0;
#if BITFUSE_PAIRS
      alignas(64) uint16_t order[32];
      for (int i = 0; i < 32; ++i)
        order[i] = uint16_t(i / Order * Order + i % Order / 2 + i % 2 * (Order / 2));
      const Vi index = load_dwords(order);
      for (; k + 32 <= depth; k += 32) store_dwords(out + k, permute_words(load_dwords(x + k), index));
#endif
      for (; k < depth; k += Order)
        for (int i = 0; i < Order; ++i) out[k + i] = x[k + i / 2 + i % 2 * (Order / 2)];
      if (depth % 2) out[depth] = 0;
    }
  }
}

// Ask for the rows of B that the end of a tile reads, as much of them as a part of L2 holds: they are a short
// run far from the tile's before.
inline void prefetch_rows(const void* b, Dtype dtype, int64_t rank, int64_t row, int64_t rows) {
  const auto* from = static_cast<const char*>(element(b, dtype, row * rank));
  const int64_t bytes = least(rows * rank * size_of(dtype), 16 << 10);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// The adapter's share of a tile of outputs: t B^T, or drop'(t A).
template <bool Gradient>
void add_adapter(const Adapter& adapter, int64_t outs, int64_t row, int64_t rows, int64_t out, float* panel,
                 float* sums, [[maybe_unused]] float* apart) {
  const int64_t valid = least(kWidth, outs - out), rank = adapter.rank;
  const float* t = adapter.h + row * rank;
  if constexpr (!Gradient) {
    auto fill = [&](int64_t first, int64_t count, float* to) {
      transposed_panel(adapter.b, adapter.b_dtype, rank, first, count, out, valid, adapter.scale, to);
    };
    add_low_rank(t, rank, rows, fill, panel, sums, false);
  } else {
    const bool masked = adapter.dropout.p > 0;
    const Mask mask(adapter.dropout);
    auto fill = [&](int64_t first, int64_t count, float* to) {
      natural_panel<kWidth>(adapter.a, adapter.a_dtype, outs, first, count, out, valid, nullptr, 1, to);
    };
    add_low_rank(t, rank, rows, fill, panel, masked ? apart : sums, masked);
    for (int64_t r = 0; masked && r < rows; ++r) {
      const Mask::Row kept = mask.row(row + r);
      for (int v = 0; v < kWidth; v += kLanes) {
        float* at = sums + r * kWidth + v;
        store(at, add(load(at), kept.keep(out + v, load(apart + r * kWidth + v))));
      }
    }
  }
}

// Scratch: at most kPackedBytes of x (or kMaxRows rows); on each thread 158 KiB, and 4 to 12 bytes x kWidth
// for each group of a row; with an adapter what Shrink says, or 126 KiB for a gradient with dropout.
template <class Panels>
void multiply(const LowbitLinearArgs& call) {
  constexpr bool kPairs = in_pairs(Panels::kKind);
  constexpr int64_t kSize = kPairs ? 2 : 4;
  Panels panels(call.w);
  const int64_t outs = panels.outs(), depth = panels.depth(), tiles = round_up(outs, kWidth) / kWidth;

  // x is read where it is when it is in the panel's terms already; an odd number of lines to a row else, so
  // that the rows of a tile do not meet in one set of L1
  const bool packed = kPairs ? Panels::kOrder != 1 || depth % 2 : call.dtype != Dtype::kFloat32;
  const int64_t packed_stride = ((depth * kSize + 63) / 64 | 1) * 64 / kSize;
  int64_t chunk = least(call.rows, kChunkRows);
  if (packed) chunk = least(chunk, most(kPackedBytes / (packed_stride * kSize) / kMaxRows, 1) * kMaxRows);
  const int threads = threads_for(call.rows * outs * depth);
  // rows are split too when there are fewer tiles than threads; each part decodes its own panels
  const int64_t parts = most(1, least((threads + tiles - 1) / tiles, chunk / (4 * kMaxRows)));

  constexpr bool kGradient = Panels::kGradient;
  const Adapter none{};
  const Adapter& adapter = call.adapter ? *call.adapter : none;
  const Shrink shrink(adapter, call.x, call.dtype, call.row_stride, depth);
  const bool shrinks = call.adapter && !kGradient, apart = call.adapter && kGradient && adapter.dropout.p > 0;
  static_assert(kAddendBlock * kWidth <= kPanelDwords);

  struct Worker {
    typename Panels::Worker panels;
    uint32_t* panel;
    float *sums, *bias, *scale, *shrink, *apart;
  };
  auto carve_worker = [&](Carver& carver) {
    Worker worker;
    worker.panels = panels.carve_worker(carver);
    worker.panel = carver.take<uint32_t>(kPanelDwords);
    worker.sums = carver.take<float>(chunk * kWidth);
    worker.bias = carver.take<float>(kWidth);
    worker.scale = carver.take<float>(kWidth);
    worker.shrink = shrinks ? shrink.carve_worker(carver) : nullptr;
    worker.apart = carver.take<float>(apart ? chunk * kWidth : 0);
    return worker;
  };
  auto carve_shared = [&](Carver& carver) {
    panels.carve_shared(carver);
    return carver.take<char>(packed ? chunk * packed_stride * kSize : 0);
  };
  Carver worker_need, shared_need;
  carve_worker(worker_need);
  carve_shared(shared_need);
  const size_t worker_bytes = worker_need.used(), shared_bytes = shared_need.used();
  char* block = scratch(shared_bytes + size_t(threads) * worker_bytes);
  Carver shared(block);
  char* x = carve_shared(shared);
  panels.fill_shared();

  for (int64_t row = 0; row < call.rows; row += chunk) {
    const int64_t rows = least(chunk, call.rows - row);
    parallel(threads, [&](int thread, int team) {
      const char* from = static_cast<const char*>(element(call.x, call.dtype, row * call.row_stride));
      int64_t stride = call.row_stride;
      Carver mine(block + shared_bytes + size_t(thread) * worker_bytes);
      const Worker worker = carve_worker(mine);
      if (shrinks) shrink.run(row, rows, thread, team, worker.shrink);
      if (packed) {
        const Range own = share(rows, thread, team);
        pack_rows<kPairs, Panels::kOrder>(call, row + own.begin, own.end - own.begin, depth,
                                          x + own.begin * packed_stride * kSize, packed_stride);
        from = x;
        stride = packed_stride;
      }
      if (packed || shrinks) wait_for_team(team);
      const Range tasks = share(tiles * parts, thread, team);
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t out = task / parts * kWidth, valid = least(kWidth, outs - out);
        const Range part = share(rows, task % parts, parts);
        const int64_t part_rows = part.end - part.begin, row_tiles = round_up(part_rows, kMaxRows) / kMaxRows;
        panels.begin_tile(worker.panels, out);
        if (shrinks) prefetch_rows(adapter.b, adapter.b_dtype, adapter.rank, out, valid);
        for (int64_t k = 0, end; k < depth; k = end) {
          end = panels.block_end(k);
          panels.decode(worker.panels, out, k, end, worker.panel);
          Prefetch ahead = panels.after(out, end);
          int64_t segments = 0;
          for (int64_t at = k; at < end; at = panels.segment_end(at, end)) ++segments;
          ahead.spread(row_tiles * segments);
          for (int64_t t = 0; t < row_tiles; ++t) {
            const Range tile = share(part_rows, t, row_tiles);
            panels.tile(worker.panels, int(tile.end - tile.begin),
                        from + (part.begin + tile.begin) * stride * kSize, stride, k, end, worker.panel,
                        worker.sums + tile.begin * kWidth, ahead);
          }
        }
        if (call.adapter)
          add_adapter<kGradient>(adapter, outs, row + part.begin, part_rows, out,
                                 reinterpret_cast<float*>(worker.panel), worker.sums, worker.apart);
        for (int i = 0; i < kWidth; ++i) worker.bias[i] = 0, worker.scale[i] = 1;
        if (call.bias) to_float(element(call.bias, call.dtype, out), call.dtype, worker.bias, valid);
        if (call.out_scale) to_float(call.out_scale + out, Dtype::kFloat32, worker.scale, valid);
        void* to = element(call.out, call.dtype, (row + part.begin) * outs + out);
        finish_rows(worker.sums, part_rows, valid, worker.scale, worker.bias, call.accumulate ? to : nullptr,
                    outs, call.dtype, to, outs);
      }
    });
  }
}

}  // namespace bitfuse::BITFUSE_ISA
