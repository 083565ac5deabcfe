// lowbit_linear on the CPU: y = x W^T + b and its gradient x' = y' W, W decoded in registers and caches only.
//
// Two kernels, picked by the number of rows M of x:
//
// Few rows (M <= 4): `few_rows`. Bound by reading W. A vector load takes 4 * kLanes bytes of one row of W as
// dwords, lane i holding kPerDword codes from kPerDword * i; step J decodes code J of every lane and
// multiplies with x, put in that order once a call. So no code moves between lanes. The sums of a block (one
// load) are scaled lane by lane into the row's total; lanes are summed once a row. Four rows of W run at
// once, which hides the latency of the multiply-adds, and the next four are prefetched. Per 64 bytes of int4:
// 8 permutes, 7 shifts, 8 multiply-adds for 128 weights in float32; a quarter of each for bfloat16 x (vpermw,
// vdpbf16ps).
//
// More rows: `multiply`, a blocked matrix product bound by multiply-adds. A tile of kWidth outputs is decoded
// block by block into a panel of 32 KiB, which stays in L1 while all rows of x pass over it (matmul.h).
// Forward, the lanes of the panel are rows of W, so dwords are transposed kLanes x kLanes, and scales are
// lane vectors; in the gradient they are columns of W, in memory order. Panels of floats hold (value - zero)
// * scale exactly as a dense float32 weight would; panels of bfloat16 pairs hold values without their scale
// where bfloat16 is exact for them, and each group's sum is scaled in float32, which is nearer to the exact
// product than a dense bfloat16 weight.
//
// Each output is summed by one thread, in an order that depends on K and group_size alone.
#include "lowbit_linear.h"

#include <type_traits>

#include "codes.h"
#include "matmul.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int kFewRows = 4;      // x rows up to which W is decoded straight into multiply-adds
constexpr int kQuad = 4;         // rows of W at once in few_rows
constexpr int kChunkRows = 504;  // x rows a panel serves: bounds the accumulators to 126 KiB a thread
constexpr int64_t kPackedBytes = 16 << 20;  // of x in panel order, unless kMaxRows rows take more

int64_t groups_of(const LowBitMatrix& w) { return w.k / w.group_size; }

template <ScaleKind Kind>
BITFUSE_INLINE float scale_at(const LowBitMatrix& w, int64_t index) {
  if constexpr (Kind == ScaleKind::kFloat32) {
    return static_cast<const float*>(w.scales)[index];
  } else if constexpr (Kind == ScaleKind::kNested) {
    // two roundings, as in the reference: never contracted to one
    float first = w.nested_code[static_cast<const uint8_t*>(w.scales)[index]] * w.scale_scales[index >> 8];
    return first + w.scale_offset;
  } else {
    const uint16_t bits = static_cast<const uint16_t*>(w.scales)[index];
    return Kind == ScaleKind::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
  }
}

// Scales [first, first + count) of the flattened array, as floats.
void read_scales(const LowBitMatrix& w, int64_t first, int64_t count, float* to) {
  switch (w.scale_kind) {
    case ScaleKind::kFloat32:
      return to_float(static_cast<const float*>(w.scales) + first, Dtype::kFloat32, to, count);
    case ScaleKind::kFloat16:
      return to_float(static_cast<const uint16_t*>(w.scales) + first, Dtype::kFloat16, to, count);
    case ScaleKind::kBfloat16:
      return to_float(static_cast<const uint16_t*>(w.scales) + first, Dtype::kBfloat16, to, count);
    case ScaleKind::kNested:
      for (int64_t i = 0; i < count; ++i) to[i] = scale_at<ScaleKind::kNested>(w, first + i);
  }
}

void read_zeros(const LowBitMatrix& w, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float(w.zeros[first + i]);
}

// The first `bytes` bytes at p, then zeros: a load that ends where the row ends.
BITFUSE_INLINE Vi load_some(const uint8_t* p, int64_t bytes) {
  alignas(64) uint8_t buffer[4 * kLanes] = {};
  std::memcpy(buffer, p, size_t(bytes));
  return load_dwords(buffer);
}

// --------------------------------------------------------------------------------------------- few rows of x

// Where the scales of a block's lanes lie in a row's scales: lane i takes scale first[block] +
// lane[block][i]. `uniform`: a block lies in one group, all its lanes take scale first[block].
struct LaneGroups {
  bool uniform;
  int32_t* first;  // [blocks]
  int32_t* lane;   // [blocks][kLanes]

  void fill(const LowBitMatrix& w, int per_dword, int64_t blocks) {
    const int64_t width = int64_t(per_dword) * kLanes;
    uniform = w.group_size % width == 0 || w.group_size == w.k;
    for (int64_t b = 0; b < blocks; ++b) {
      first[b] = int32_t(b * width / w.group_size);
      if (uniform) continue;
      for (int i = 0; i < kLanes; ++i)
        lane[b * kLanes + i] = int32_t(least(b * width + i * per_dword, w.k - 1) / w.group_size) - first[b];
    }
  }
  template <bool Uniform>
  BITFUSE_INLINE Vf pick(const float* row, int64_t block) const {
    if (Uniform) return set1(row[first[block]]);
    return permute(load(row + first[block]), load_dwords(lane + block * kLanes));
  }
};

// Steps of a block in float32: x as [block][kPerDword][kLanes] floats.
template <class Code>
struct FloatSteps {
  static constexpr int kPerDword = Code::kPerDword, kBits = Code::kBits;
  static constexpr bool kZeros = Code::kZeros;
  static constexpr int kSteps = Code::kPerDword;
  using Element = float;
  Code code;
  explicit FloatSteps(const LowBitMatrix& w) : code(w) {}

  static void arrange(const LinearCall& call, int64_t row, float* natural, float* to, int64_t blocks) {
    to_float(element(call.x, call.dtype, row * call.row_stride), call.dtype, natural, call.w.k);
    for (int64_t i = call.w.k; i < blocks * kPerDword * kLanes; ++i) natural[i] = 0;
    for (int64_t b = 0; b < blocks; ++b)
      for (int j = 0; j < kPerDword; ++j)
        for (int i = 0; i < kLanes; ++i)
          to[(b * kPerDword + j) * kLanes + i] = natural[(b * kLanes + i) * kPerDword + j];
  }
  template <int J>
  BITFUSE_INLINE Vf weight(Vi dwords, Vf zero) const {
    return code.template value<J>(dwords, zero);
  }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vf weight, const float* x) { return fma(weight, load(x), sum); }
};

#if defined(__AVX512BF16__)
// The same with two codes a lane: x as [block][kPerDword / 2][2 * kLanes] bfloat16.
template <class Code>
struct PairSteps {
  static constexpr int kPerDword = Code::kPerDword, kBits = Code::kBits;
  static constexpr bool kZeros = Code::kZeros;
  static constexpr int kSteps = Code::kPerDword / 2;
  using Element = uint32_t;
  ExactPairs<Code> code;
  explicit PairSteps(const LowBitMatrix& w) : code(w) {}

  static void arrange(const LinearCall& call, int64_t row, float*, uint32_t* to, int64_t blocks) {
    const auto* x = static_cast<const uint16_t*>(call.x) + row * call.row_stride;
    auto word = [&](int64_t k) { return k < call.w.k ? uint32_t(x[k]) : 0; };
    for (int64_t b = 0; b < blocks; ++b)
      for (int j = 0; j < kSteps; ++j)
        for (int i = 0; i < kLanes; ++i) {
          int64_t k = (b * kLanes + i) * kPerDword + j;
          to[(b * kSteps + j) * kLanes + i] = word(k) | word(k + kSteps) << 16;
        }
  }
  template <int J>
  BITFUSE_INLINE Vi weight(Vi dwords, Vf zero) const {
    return code.template pair<J>(dwords, zero);
  }
  static BITFUSE_INLINE Vf accumulate(Vf sum, Vi weight, const uint32_t* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)load_dwords(x));
  }
};
#endif

// Rows [n, n + kQuad) of W times Rows rows of x. scales and zeros: [kQuad][groups] floats.
template <class Steps, int Rows, bool Uniform>
void quad(const Steps& steps, const LowBitMatrix& w, int64_t n, const typename Steps::Element* x,
          int64_t x_stride, const LaneGroups& lanes, const float* scales, const float* zeros,
          float (&out)[Rows][kQuad]) {
  constexpr int kBytes = 4 * kLanes;
  const int64_t row_bytes = w.k * Steps::kBits / 8, groups = groups_of(w);
  const uint8_t* codes = w.codes + n * row_bytes;
  Vf total[Rows][kQuad];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) total[r][q] = zero();

  auto block = [&](int64_t b, auto load_block) __attribute__((always_inline)) {
    const auto* xb = x + b * (Steps::kSteps * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) {
      const uint8_t* at = codes + q * row_bytes + b * kBytes;
      __builtin_prefetch(at + kQuad * row_bytes);
      Vi dwords = load_block(at);
      Vf z = Steps::kZeros ? lanes.pick<Uniform>(zeros + q * groups, b) : zero();
      Vf sums[Rows][2];  // two chains a row of x, so that four rows of W make eight
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = zero();
      unrolled<Steps::kSteps>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        auto weight = steps.template weight<J>(dwords, z);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[r][J & 1] = Steps::accumulate(sums[r][J & 1], weight, xb + r * x_stride + J * kLanes);
      });
      Vf s = lanes.pick<Uniform>(scales + q * groups, b);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) total[r][q] = fma(add(sums[r][0], sums[r][1]), s, total[r][q]);
    }
  };
  const int64_t whole = row_bytes / kBytes, rest = row_bytes % kBytes;
  for (int64_t b = 0; b < whole; ++b) block(b, [](const uint8_t* at) { return load_dwords(at); });
  if (rest) block(whole, [&](const uint8_t* at) { return load_some(at, rest); });
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) out[r][q] = sum(total[r][q]);
}

template <class Steps, int Rows, bool Uniform>
void few_rows_range(const Steps& steps, const LinearCall& call, Range quads, const typename Steps::Element* x,
                    int64_t x_stride, const LaneGroups& lanes, float* scales, float* zeros) {
  const LowBitMatrix& w = call.w;
  const int64_t groups = groups_of(w);
  for (int64_t i = quads.begin; i < quads.end; ++i) {
    const int64_t n = i * kQuad;
    read_scales(w, n * groups, kQuad * groups, scales);
    if (Steps::kZeros) read_zeros(w, n * groups, kQuad * groups, zeros);
    float y[Rows][kQuad], bias[kQuad] = {};
    quad<Steps, Rows, Uniform>(steps, w, n, x, x_stride, lanes, scales, zeros, y);
    if (call.bias) to_float(element(call.bias, call.dtype, n), call.dtype, bias, kQuad);
    for (int r = 0; r < Rows; ++r) {
      for (int q = 0; q < kQuad; ++q) y[r][q] += bias[q];
      from_float(y[r], const_cast<void*>(element(call.out, call.dtype, r * w.n + n)), call.dtype, kQuad);
    }
  }
}

template <class Steps>
void few_rows(const LinearCall& call) {
  const LowBitMatrix& w = call.w;
  const Steps steps(w);
  const int64_t blocks = round_up(w.k, Steps::kPerDword * kLanes) / (Steps::kPerDword * kLanes);
  const int64_t x_stride = blocks * Steps::kSteps * kLanes, quads = w.n / kQuad;
  const int64_t row_scales = kQuad * groups_of(w) + kLanes;  // `permute` loads a whole vector
  const int threads = int(least(threads_for(w.n * w.k * call.rows), quads));

  typename Steps::Element* x = nullptr;
  float *natural = nullptr, *scales = nullptr, *zeros = nullptr;
  LaneGroups lanes{};
  auto carve = [&](Carver carver) {
    x = carver.take<typename Steps::Element>(call.rows * x_stride);
    natural = carver.take<float>(blocks * Steps::kPerDword * kLanes);
    lanes.first = carver.take<int32_t>(blocks);
    lanes.lane = carver.take<int32_t>(blocks * kLanes);
    scales = carver.take<float>(threads * round_up(row_scales, kLanes));
    zeros = carver.take<float>(Steps::kZeros ? threads * round_up(row_scales, kLanes) : 0);
    return carver.used();
  };
  carve(Carver(scratch(carve(Carver()))));  // 4 * M + 4 bytes a column of x, and 64 a group and thread
  lanes.fill(w, Steps::kPerDword, blocks);
  for (int64_t r = 0; r < call.rows; ++r) Steps::arrange(call, r, natural, x + r * x_stride, blocks);

  parallel(threads, [&](int thread, int team) {
    const Range mine = share(quads, thread, team);
    float* my_scales = scales + thread * round_up(row_scales, kLanes);
    float* my_zeros = zeros + (Steps::kZeros ? thread * round_up(row_scales, kLanes) : 0);
    for (int64_t i = 0; i < row_scales; ++i) my_scales[i] = 0;  // what lies past the end is loaded, not used
    for (int64_t i = 0; Steps::kZeros && i < row_scales; ++i) my_zeros[i] = 0;
    unrolled<kFewRows>([&](auto r) {
      constexpr int Rows = decltype(r)::value + 1;
      if (call.rows != Rows) return;
      if (lanes.uniform) {
        few_rows_range<Steps, Rows, true>(steps, call, mine, x, x_stride, lanes, my_scales, my_zeros);
      } else {
        few_rows_range<Steps, Rows, false>(steps, call, mine, x, x_stride, lanes, my_scales, my_zeros);
      }
    });
  });
}

// ------------------------------------------------------------------------------------------- panels of
// weights

// What a panel holds: floats, values as exact bfloat16 pairs (their group's scale applied to the sums), or
// value * scale rounded to bfloat16 pairs.
enum class Panel { kFloats, kExactPairs, kRoundedPairs };

constexpr int kPanelDwords = (kLanes == 16 ? 128 : 512) * kWidth;  // 32 KiB, 16 at 4 lanes: it stays in L1

template <class Code>
struct RoundedPairs {  // stands where ExactPairs does, for the panels that have no use for one
  explicit RoundedPairs(const LowBitMatrix&) {}
};
#if defined(__AVX512BF16__)
template <class Code, Panel Kind>
using PairCode = std::conditional_t<Kind == Panel::kExactPairs, ExactPairs<Code>, RoundedPairs<Code>>;
#endif

// Panels of W for y = x W^T: lanes are rows of W, depth is K.
template <class Code, Panel Kind>
class Forward {
 public:
  static constexpr Panel kPanel = Kind;
  static constexpr int kOrder =
      Kind == Panel::kFloats ? 1 : Code::kPerDword;  // x in pairs of codes of one dword
  static constexpr int64_t kBlock = kPanelDwords / kWidth * (Kind == Panel::kFloats ? 1 : 2);

  explicit Forward(const LowBitMatrix& w) : w_(w), code_(w), pairs_(w) {}
  int64_t outs() const { return w_.n; }
  int64_t depth() const { return w_.k; }

  // Scratch shared by the workers: the group of each dword of a row.
  void carve_shared(Carver& carver) { group_ = carver.take<int32_t>(w_.k / Code::kPerDword); }
  void fill_shared() const {
    for (int64_t i = 0, k = 0; k < w_.k; ++i, k += Code::kPerDword) group_[i] = int32_t(k / w_.group_size);
  }

  struct Worker {
    float *rows, *scales, *zeros, *ones;
  };
  Worker carve_worker(Carver& carver) const {
    const int64_t padded = round_up(groups_of(w_), kLanes);
    return {carver.take<float>(kWidth * groups_of(w_) + kLanes), carver.take<float>(padded * kWidth),
            carver.take<float>(Code::kZeros ? padded * kWidth : 0), carver.take<float>(kWidth)};
  }

  // Scales (and zeros) of outputs [out, out + kWidth) as [group][kWidth].
  void begin_tile(const Worker& worker, int64_t out) const {
    const int64_t groups = groups_of(w_), valid = least(kWidth, w_.n - out);
    auto spread = [&](float* to) {
      for (int64_t i = valid * groups; i < kWidth * groups + kLanes; ++i) worker.rows[i] = 0;
      for (int64_t g = 0; g < groups; g += kLanes)
        for (int v = 0; v < kVecs; ++v) {
          Vi a[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) a[i] = load_dwords(worker.rows + (v * kLanes + i) * groups + g);
          transpose(a);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store_dwords(to + (g + i) * kWidth + v * kLanes, a[i]);
        }
    };
    read_scales(w_, out * groups, valid * groups, worker.rows);
    spread(worker.scales);
    if (Code::kZeros) {
      read_zeros(w_, out * groups, valid * groups, worker.rows);
      spread(worker.zeros);
    }
    for (int i = 0; i < kWidth; ++i) worker.ones[i] = 1;
  }

  // A block ends where a group does, unless the group is longer than a block: then exact sums have few
  // segments.
  int64_t block_end(int64_t k) const {
    int64_t end = least(k + kBlock, w_.k);
    if (Kind != Panel::kExactPairs) return end;
    if (w_.group_size > kBlock) return least(end, (k / w_.group_size + 1) * w_.group_size);
    return least(k + kBlock / w_.group_size * w_.group_size, w_.k);
  }
  int64_t segment_end(int64_t k, int64_t end) const {
    if (Kind == Panel::kFloats) return least(end, k + kSegment);
    return Kind == Panel::kExactPairs ? least(end, (k / w_.group_size + 1) * w_.group_size) : end;
  }
  const float* segment_scale(const Worker& worker, int64_t k) const {
    return Kind == Panel::kExactPairs ? worker.scales + k / w_.group_size * kWidth : worker.ones;
  }

  void decode(const Worker& worker, int64_t out, int64_t k, int64_t end, void* panel) const {
    constexpr int P = Code::kPerDword;
    const int64_t row_bytes = code_bytes<Code>(w_.k), dwords = (end - k) / P;
    for (int v = 0; v < kVecs; ++v) {
      const uint8_t* row[kLanes];
      for (int i = 0; i < kLanes; ++i)
        row[i] = w_.codes + least(out + v * kLanes + i, w_.n - 1) * row_bytes + code_bytes<Code>(k);
      prefetch_after(row, k, end);
      for (int64_t at = 0; at < dwords; at += kLanes) {
        Vi a[kLanes];
        if (k + (at + kLanes) * P <= w_.k) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) a[i] = load_dwords(row[i] + 4 * at);
        } else {
          for (int i = 0; i < kLanes; ++i) a[i] = load_some(row[i] + 4 * at, 4 * (w_.k / P - k / P - at));
        }
        transpose(a);
        const int count = int(least(kLanes, dwords - at));
        for (int i = 0; i < count; ++i) {
          const int64_t group = int64_t(group_[k / P + at + i]) * kWidth + v * kLanes;
          decode_dwords(a[i], worker.scales + group, worker.zeros + group, panel, (at + i) * P, v * kLanes);
        }
      }
    }
  }

 private:
  BITFUSE_INLINE void decode_dwords(Vi dwords, const float* scale, const float* zero_at, void* panel,
                                    int64_t depth, int lane) const {
    constexpr int P = Code::kPerDword;
    const Vf z = Code::kZeros ? load(zero_at) : zero();
    if constexpr (Kind == Panel::kFloats) {
      float* to = static_cast<float*>(panel) + depth * kWidth + lane;
      const Vf s = load(scale);
      unrolled<P>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        store(to + J * kWidth, mul(code_.template value<J>(dwords, z), s));
      });
    }
#if defined(__AVX512BF16__)
    if constexpr (Kind != Panel::kFloats) {
      uint32_t* to = static_cast<uint32_t*>(panel) + depth / 2 * kWidth + lane;
      unrolled<P / 2>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        if constexpr (Kind == Panel::kExactPairs) {
          store_dwords(to + J * kWidth, pairs_.template pair<J>(dwords, z));
        } else {
          const Vf s = load(scale);
          store_dwords(to + J * kWidth, pair_of_rounded(mul(code_.template value<J>(dwords, z), s),
                                                        mul(code_.template value<J + P / 2>(dwords, z), s)));
        }
      });
    }
#endif
  }

  // The next block of these rows, or the first of the rows below, arrives while this block is used.
  BITFUSE_INLINE void prefetch_after(const uint8_t* const (&row)[kLanes], int64_t k, int64_t end) const {
    const int64_t bytes = code_bytes<Code>(end - k);
    const int64_t ahead = end < w_.k ? bytes : kWidth * code_bytes<Code>(w_.k) - code_bytes<Code>(k);
    for (int i = 0; i < kLanes; ++i)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row[i] + ahead + b);
  }

  const LowBitMatrix& w_;
  Code code_;
#if defined(__AVX512BF16__)
  PairCode<Code, Kind> pairs_;
#else
  RoundedPairs<Code> pairs_;
#endif
  int32_t* group_ = nullptr;
};

// Panels of W for x' = y' W: lanes are columns of W, depth is N, pairs are rows 2i and 2i + 1.
template <class Code, Panel Kind>
class Gradient {
 public:
  static constexpr Panel kPanel = Kind;
  static constexpr int kOrder = 1;
  static constexpr int64_t kBlock = kPanelDwords / kWidth * (Kind == Panel::kFloats ? 1 : 2);
  static constexpr int kTileGroups = kWidth / 8 + 1;  // that a tile's columns can meet

  explicit Gradient(const LowBitMatrix& w) : w_(w), code_(w) {}
  int64_t outs() const { return w_.k; }
  int64_t depth() const { return w_.n; }
  void carve_shared(Carver&) {}
  void fill_shared() const {}

  struct Worker {
    float *scales, *zeros, *ones;
  };
  Worker carve_worker(Carver& carver) const {
    return {carver.take<float>(kBlock * kTileGroups),
            carver.take<float>(Code::kZeros ? kBlock * kTileGroups : 0), carver.take<float>(kWidth)};
  }
  void begin_tile(const Worker& worker, int64_t) const {
    for (int i = 0; i < kWidth; ++i) worker.ones[i] = 1;
  }
  int64_t block_end(int64_t n) const { return least(n + kBlock, w_.n); }
  int64_t segment_end(int64_t n, int64_t end) const {
    return Kind == Panel::kFloats ? least(end, n + kSegment) : end;
  }
  const float* segment_scale(const Worker& worker, int64_t) const { return worker.ones; }

  void decode(const Worker& worker, int64_t out, int64_t n, int64_t end, void* panel) const {
    const int64_t columns = least(kWidth, w_.k - out), row_bytes = code_bytes<Code>(w_.k);
    const int64_t first = out / w_.group_size, count = (out + columns - 1) / w_.group_size + 1 - first;
    read_block(n, end, first, count, worker);
    int group[kWidth / 8 + 1];  // of each 8 columns, less `first`
    for (int i = 0; i <= kWidth / 8; ++i)
      group[i] = int(least(out + 8 * i, w_.k - 1) / w_.group_size - first);

    for (int64_t i = 0; i < end - n; i += Kind == Panel::kFloats ? 1 : 2) {
      const uint8_t* codes = w_.codes + (n + i) * row_bytes + code_bytes<Code>(out);
      __builtin_prefetch(codes + 16 * row_bytes);
      const float *scale = worker.scales + i * count, *zero_at = worker.zeros + i * count;
      if constexpr (Kind == Panel::kFloats) {
        float* to = static_cast<float*>(panel) + i * kWidth;
        row_of_floats(codes, columns, group, scale, zero_at,
                      [&](int v, Vf a) __attribute__((always_inline)) { store(to + v * kLanes, a); });
      }
#if defined(__AVX512BF16__)
      if constexpr (Kind != Panel::kFloats) {
        uint32_t* to = static_cast<uint32_t*>(panel) + i / 2 * kWidth;
        Vf even[kVecs];
        __builtin_prefetch(codes + 17 * row_bytes);
        row_of_floats(codes, columns, group, scale, zero_at,
                      [&](int v, Vf a) __attribute__((always_inline)) { even[v] = a; });
        row_of_floats(codes + row_bytes, columns, group, scale + count, zero_at + count,
                      [&](int v, Vf a) __attribute__((always_inline)) {
                        store_dwords(to + v * kLanes, pair_of_rounded(even[v], a));
                      });
      }
#endif
    }
  }

 private:
  // f(vector, weights) for the kWidth columns of one row of W; columns past the last are weights of code 0.
  template <class F>
  BITFUSE_INLINE void row_of_floats(const uint8_t* codes, int64_t columns, const int* group,
                                    const float* scale, const float* zero_at, F f) const {
    uint8_t buffer[code_bytes<Code>(kWidth)];
    if (columns < kWidth) {
      std::memset(buffer, 0, sizeof buffer);
      std::memcpy(buffer, codes, size_t(code_bytes<Code>(columns)));
      codes = buffer;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int low = group[v * kLanes / 8], high = group[v * kLanes / 8 + (kLanes > 8)];
      const Vf z = Code::kZeros ? set_halves(zero_at[low], zero_at[high]) : zero();
      const Vi code = Code::natural(codes + code_bytes<Code>(v * kLanes));
      f(v, mul(code_.template value<0>(code, z), set_halves(scale[low], scale[high])));
    }
  }

  // Scales [n, end) x [first, first + count) as floats [end - n][count], and zeros alike.
  void read_block(int64_t n, int64_t end, int64_t first, int64_t count, const Worker& worker) const {
    const int64_t groups = groups_of(w_);
    auto read = [&](auto at, float* to) {
      for (int64_t i = n; i < end; ++i)
        for (int64_t g = 0; g < count; ++g) *to++ = at(i * groups + first + g);
    };
    auto scales = [&](auto kind) {
      read([&](int64_t i) { return scale_at<decltype(kind)::value>(w_, i); }, worker.scales);
    };
    switch (w_.scale_kind) {
      case ScaleKind::kFloat32:
        scales(std::integral_constant<ScaleKind, ScaleKind::kFloat32>{});
        break;
      case ScaleKind::kFloat16:
        scales(std::integral_constant<ScaleKind, ScaleKind::kFloat16>{});
        break;
      case ScaleKind::kBfloat16:
        scales(std::integral_constant<ScaleKind, ScaleKind::kBfloat16>{});
        break;
      case ScaleKind::kNested:
        scales(std::integral_constant<ScaleKind, ScaleKind::kNested>{});
    }
    if (Code::kZeros) read([&](int64_t i) { return float(w_.zeros[i]); }, worker.zeros);
  }

  const LowBitMatrix& w_;
  Code code_;
};

// x rows [row, row + count) in the panel's terms: floats, or bfloat16 with the pairs of `order` codes made
// neighbours.
template <Panel Kind, int Order>
void pack_rows(const LinearCall& call, int64_t row, int64_t count, int64_t depth, void* to, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const void* from = element(call.x, call.dtype, (row + r) * call.row_stride);
    if constexpr (Kind == Panel::kFloats) {
      to_float(from, call.dtype, static_cast<float*>(to) + r * stride, depth);
    } else {
      const auto* x = static_cast<const uint16_t*>(from);
      auto* out = static_cast<uint16_t*>(to) + r * stride;
      int64_t k = 0;
#if defined(__AVX512BF16__)
      alignas(64) uint16_t order[32];
      for (int i = 0; i < 32; ++i)
        order[i] = uint16_t(i / Order * Order + i % Order / 2 + i % 2 * (Order / 2));
      const Vi index = load_dwords(order);
      for (; k + 32 <= depth; k += 32)
        store_dwords(out + k, _mm512_permutexvar_epi16(index, load_dwords(x + k)));
#endif
      for (; k < depth; k += Order)
        for (int i = 0; i < Order; ++i) out[k + i] = x[k + i / 2 + i % 2 * (Order / 2)];
    }
  }
}

template <class Panels>
void multiply(const LinearCall& call) {
  constexpr bool kFloats = Panels::kPanel == Panel::kFloats;
  constexpr int64_t kSize = kFloats ? 4 : 2;
  Panels panels(call.w);
  const int64_t outs = panels.outs(), depth = panels.depth(), tiles = round_up(outs, kWidth) / kWidth;

  // x is read where it is when it is in the panel's terms already
  const bool packed = kFloats ? call.dtype != Dtype::kFloat32 : Panels::kOrder != 1;
  const int64_t packed_stride = round_up(depth * kSize, 64) / 64 % 2
                                    ? round_up(depth * kSize, 64) / kSize
                                    : (round_up(depth * kSize, 64) + 64) / kSize;
  int64_t chunk = least(call.rows, kChunkRows);
  if (packed) chunk = least(chunk, most(kPackedBytes / (packed_stride * kSize) / kMaxRows, 1) * kMaxRows);
  const int threads = threads_for(call.rows * outs * depth);
  // rows are split too when there are fewer tiles than threads; each part decodes its own panels
  const int64_t parts = most(1, least((threads + tiles - 1) / tiles, chunk / (4 * kMaxRows)));

  struct Worker {
    typename Panels::Worker panels;
    void* panel;
    float *sums, *bias;
  };
  char* x = nullptr;
  auto carve_worker = [&](Carver& carver) {
    Worker worker;
    worker.panels = panels.carve_worker(carver);
    worker.panel = carver.take<uint32_t>(kPanelDwords);
    worker.sums = carver.take<float>(chunk * kWidth);
    worker.bias = carver.take<float>(kWidth);
    return worker;
  };
  auto carve_shared = [&](Carver& carver) {
    panels.carve_shared(carver);
    x = carver.take<char>(packed ? chunk * packed_stride * kSize : 0);
  };
  Carver need;
  carve_worker(need);
  const size_t worker_bytes = need.used();
  Carver shared;
  carve_shared(shared);
  const size_t shared_bytes = shared.used();
  // at most 16 MiB of x; for each thread 158 KiB and 4 bytes x kWidth x 2 for each group of a row
  char* block = scratch(shared_bytes + size_t(threads) * worker_bytes);
  Carver carver(block);
  carve_shared(carver);
  panels.fill_shared();

  for (int64_t row = 0; row < call.rows; row += chunk) {
    const int64_t rows = least(chunk, call.rows - row);
    parallel(threads, [&](int thread, int team) {
      const char* from = static_cast<const char*>(element(call.x, call.dtype, row * call.row_stride));
      int64_t stride = call.row_stride;
      if (packed) {
        const Range mine = share(rows, thread, team);
        pack_rows<Panels::kPanel, Panels::kOrder>(call, row + mine.begin, mine.end - mine.begin, depth,
                                                  x + mine.begin * packed_stride * kSize, packed_stride);
        from = x;
        stride = packed_stride;
        if (team > 1) {
#pragma omp barrier
        }
      }
      Carver mine(block + shared_bytes + size_t(thread) * worker_bytes);
      const Worker worker = carve_worker(mine);
      const Range tasks = share(tiles * parts, thread, team);
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t out = task / parts * kWidth, valid = least(kWidth, outs - out);
        const Range part = share(rows, task % parts, parts);
        const int64_t row_tiles = round_up(part.end - part.begin, kMaxRows) / kMaxRows;
        panels.begin_tile(worker.panels, out);
        for (int64_t k = 0; k < depth;) {
          const int64_t end = panels.block_end(k);
          panels.decode(worker.panels, out, k, end, worker.panel);
          for (int64_t t = 0; t < row_tiles; ++t) {
            const Range tile = share(part.end - part.begin, t, row_tiles);
            const int count = int(tile.end - tile.begin);
            float* sums = worker.sums + tile.begin * kWidth;
            const char* at = from + (part.begin + tile.begin) * stride * kSize;
            for (int64_t s = k; s < end;) {
              const int64_t segment = panels.segment_end(s, end);
              if constexpr (kFloats) {
                kTileFloat[count](reinterpret_cast<const float*>(at) + s, stride,
                                  static_cast<float*>(worker.panel) + (s - k) * kWidth, int(segment - s),
                                  sums, s == 0);
              }
#if defined(__AVX512BF16__)
              if constexpr (!kFloats) {
                kTilePairs[count](reinterpret_cast<const uint16_t*>(at) + s, stride,
                                  static_cast<uint32_t*>(worker.panel) + (s - k) / 2 * kWidth,
                                  int(segment - s) / 2, panels.segment_scale(worker.panels, s), sums, s == 0);
              }
#endif
              s = segment;
            }
          }
          k = end;
        }
        for (int i = 0; i < kWidth; ++i) worker.bias[i] = 0;
        if (call.bias) to_float(element(call.bias, call.dtype, out), call.dtype, worker.bias, valid);
        for (int64_t r = 0; r < part.end - part.begin; ++r) {
          float* sums = worker.sums + r * kWidth;
          for (int v = 0; v < kVecs; ++v)
            store(sums + v * kLanes, add(load(sums + v * kLanes), load(worker.bias + v * kLanes)));
          void* to = const_cast<void*>(element(call.out, call.dtype, (row + part.begin + r) * outs + out));
          from_float(sums, to, call.dtype, valid);
        }
      }
    });
  }
}

}  // namespace

void lowbit_linear(const LinearCall& call) {
  with_code(call.w, [&](auto code) {
    using Code = decltype(code);
#if defined(__AVX512BF16__)
    if (call.dtype == Dtype::kBfloat16) {
      const bool exact = values_are_bfloat16(call.w);
      if (call.rows <= kFewRows && Code::kBits == 4 && exact) return few_rows<PairSteps<Code>>(call);
      if (call.rows > kFewRows) {
        // below 32 a group's sum is too short to pay for its scaling
        if (exact && call.w.group_size >= 32) return multiply<Forward<Code, Panel::kExactPairs>>(call);
        return multiply<Forward<Code, Panel::kRoundedPairs>>(call);
      }
    }
#endif
    if (call.rows <= kFewRows) return few_rows<FloatSteps<Code>>(call);
    multiply<Forward<Code, Panel::kFloats>>(call);
  });
}

void lowbit_linear_grad_x(const LinearCall& call) {
  with_code(call.w, [&](auto code) {
    using Code = decltype(code);
#if defined(__AVX512BF16__)
    if (call.dtype == Dtype::kBfloat16) return multiply<Gradient<Code, Panel::kRoundedPairs>>(call);
#endif
    multiply<Gradient<Code, Panel::kFloats>>(call);
  });
}

}  // namespace bitfuse::BITFUSE_ISA
