// x W^T for so few rows of x that reading W bounds it: W is decoded straight into multiply-adds.
//
// A vector load takes 4 * kLanes bytes of one row of W as dwords, lane i holding kCodes codes from
// kCodes * i on; step J decodes code J of every lane and multiplies with x, put in that order once a call.
// So no code moves between lanes. The sums of such a block are scaled lane by lane into the row's total;
// lanes are added once a row. Four rows of W run at once, so that a vector of x serves four and multiply-adds
// do not wait for each other, and the next four are prefetched. Per 64 bytes of int4, 128 weights: 8
// permutes, 7 shifts and 8 multiply-adds in float32; 4, 3 and 4 with bfloat16 x.
#pragma once

#include <type_traits>

#include "cpu/linear/codes.h"
#include "cpu/linear/low_rank.h"
#include "cpu/linear/scales.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int kFewRows = 4;
constexpr int kQuad = 4;  // rows of W at once; the last few are copied beside rows of zeros

// Where the scales of a block's lanes lie among a row's: lane i takes scale first[block] + lane[block][i].
// Uniform: a block lies in one group, all its lanes take scale first[block].
struct LaneGroups {
  bool uniform;
  int32_t* first;  // [blocks]
  int32_t* lane;   // [blocks][kLanes]

  static bool is_uniform(const LowBitMatrix& w, int64_t width) {
    return w.group_size % width == 0 || w.group_size == w.k;
  }
  void fill(const LowBitMatrix& w, int per_lane, int64_t blocks) {
    const int64_t width = int64_t(per_lane) * kLanes;
    uniform = is_uniform(w, width);
    for (int64_t b = 0; b < blocks; ++b) {
      first[b] = int32_t(b * width / w.group_size);
      for (int i = 0; i < kLanes && !uniform; ++i)
        lane[b * kLanes + i] = int32_t(least(b * width + i * per_lane, w.k - 1) / w.group_size) - first[b];
    }
  }
  template <bool Uniform>
  BITFUSE_INLINE Vf pick(const float* row, int64_t block) const {
    if (Uniform) return set1(row[first[block]]);
    return permute(load(row + first[block]), load_dwords(lane + block * kLanes));
  }
};

// One row of x as [block][kSteps][kLanes] elements, zeros past k. `natural` is room for one row in float32.
template <class Steps>
void arrange(const LowbitLinearArgs& call, int64_t row, int64_t blocks, float* natural, float* to) {
  constexpr int64_t kBlock = Steps::Code::kCodes * kLanes;
  to_float(element(call.x, call.dtype, row * call.row_stride), call.dtype, natural, call.w.k);
  for (int64_t i = call.w.k; i < blocks * kBlock; ++i) natural[i] = 0;
  for (int64_t b = 0; b < blocks; ++b, natural += kBlock)
    for (int j = 0; j < Steps::kSteps; ++j)
      for (int i = 0; i < kLanes; ++i) *to++ = natural[Steps::column(j, i)];
}

// The same for pairs; x is bfloat16.
template <class Steps>
void arrange(const LowbitLinearArgs& call, int64_t row, int64_t blocks, float* natural, uint32_t* to) {
  constexpr int64_t kBlock = Steps::Code::kCodes * kLanes;
  auto* words = reinterpret_cast<uint16_t*>(natural);
  std::memset(words, 0, size_t(blocks * kBlock) * 2);
  std::memcpy(words, element(call.x, call.dtype, row * call.row_stride), size_t(call.w.k) * 2);
  for (int64_t b = 0; b < blocks; ++b, words += kBlock)
    for (int j = 0; j < Steps::kSteps; ++j)
      for (int i = 0; i < kLanes; ++i) {
        const int at = Steps::column(j, i);
        *to++ = words[at] | uint32_t(words[at + Steps::kSteps]) << 16;
      }
}

// What an adapter adds to row n of W: t B[n]^T, summed in the same lanes. t is [Rows][t_stride], zeros past
// rank.
struct RowAddend {
  const float* t = nullptr;  // null: no adapter
  int64_t t_stride = 0, rank = 0;
  const void* b = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// Of the rows [n, n + kQuad) of B, `valid` are there; the others' sums meet no output. Not inlined: it is long to
// compile, and soon done beside a row of W.
template <int Rows>
__attribute__((noinline)) void add_rows(const RowAddend& addend, int64_t n, int64_t valid,
                                        Vf (&total)[Rows][kQuad]) {
  with_elements(addend.dtype, [&](auto elements) __attribute__((always_inline)) {
    using Elements = decltype(elements);
    const auto* b = static_cast<const typename Elements::Type*>(addend.b) + n * addend.rank;
    for (int64_t j = 0; j < addend.rank; j += kLanes) {
      Vf row[kQuad];
#pragma GCC unroll 4
      for (int q = 0; q < kQuad; ++q) {
        const auto* at = b + least(q, valid - 1) * addend.rank + j;
        row[q] = j + kLanes <= addend.rank ? Elements::whole(at) : Elements::some(at, int(addend.rank - j));
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vf t = load(addend.t + r * addend.t_stride + j);
#pragma GCC unroll 4
        for (int q = 0; q < kQuad; ++q) total[r][q] = fma(t, row[q], total[r][q]);
      }
    }
  });
}

// What offsets meet: the sums of a row of x in each lane of a block, negated, [block][kLanes].
template <class Steps>
void sum_lanes(const typename Steps::Element* x, int64_t blocks, float* to) {
  const float minus_one = -1;
  const uint32_t minus_ones = 0xbf80bf80;  // a pair
  for (int64_t b = 0; b < blocks; ++b) {
    Vf sums = zero();
    for (int j = 0; j < Steps::kSteps; ++j, x += kLanes) {
      if constexpr (std::is_same_v<typename Steps::Element, float>) {
        sums = Steps::accumulate(sums, Steps::broadcast(&minus_one), Steps::load_x(x));
      } else {
        sums = Steps::accumulate(sums, Steps::broadcast(&minus_ones), Steps::load_x(x));
      }
    }
    store(to + b * kLanes, sums);
  }
}

// Rows [n, n + kQuad) of W, `codes` their codes, times Rows rows of x. scales and zeros: [kQuad][groups];
// x_sums: [Rows][blocks][kLanes], where offsets meet them.
template <class Steps, int Rows, bool Uniform>
void quad(const Steps& steps, const LowBitMatrix& w, const uint8_t* codes, int64_t n, int64_t valid,
          const typename Steps::Element* x, int64_t x_stride, const LaneGroups& lanes, const float* scales,
          const float* zeros, const float* x_sums, const RowAddend& addend, float (*out)[kQuad]) {
  using Code = typename Steps::Code;
  constexpr int kBytes = Code::kBytes * kLanes;
  const int64_t row_bytes = code_bytes<Code>(w.k), groups = groups_of(w);
  const int64_t sums_stride = x_stride / Steps::kSteps;
  Vf total[Rows][kQuad];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) total[r][q] = zero();

  auto block = [&](int64_t b, auto load_block) __attribute__((always_inline)) {
    Vi dwords[kQuad];
    Vf z[kQuad], sums[Rows][kQuad];
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) {
      const uint8_t* at = codes + q * row_bytes + b * kBytes;
      __builtin_prefetch(at + kQuad * row_bytes);
      dwords[q] = load_block(at);
      z[q] = Code::kZeros ? lanes.pick<Uniform>(zeros + q * groups, b) : zero();
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums[r][q] = zero();
    }
    const auto* xb = x + b * (Steps::kSteps * kLanes);
    unrolled<Steps::kSteps>([&](auto j) __attribute__((always_inline)) {
      constexpr int J = decltype(j)::value;
      typename Steps::Vector weights[kQuad];
#pragma GCC unroll 4
      for (int q = 0; q < kQuad; ++q) weights[q] = steps.template weight<J>(dwords[q], z[q]);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const auto xv = Steps::load_x(xb + r * x_stride + J * kLanes);
#pragma GCC unroll 4
        for (int q = 0; q < kQuad; ++q) sums[r][q] = Steps::accumulate(sums[r][q], weights[q], xv);
      }
    });
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) {
      Vf s = lanes.pick<Uniform>(scales + q * groups, b);
      if (Code::kNans && any_nan(dwords[q])) s = add(s, nan_lanes(dwords[q]));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) total[r][q] = fma(sums[r][q], s, total[r][q]);
      if constexpr (Steps::kOffsets) {
        const Vf offset = lanes.pick<Uniform>(zeros + q * groups, b);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          total[r][q] = fma(load(x_sums + r * sums_stride + b * kLanes), offset, total[r][q]);
      }
    }
  };
  const int64_t whole = row_bytes / kBytes, rest = row_bytes % kBytes;
  for (int64_t b = 0; b < whole; ++b) block(b, [](const uint8_t* at) { return Code::load(at); });
  if (rest) block(whole, [&](const uint8_t* at) { return load_chunks<Code>(at, rest / Code::kBytes); });
  if (addend.t) {
    Vf sums[Rows][kQuad];  // a copy, so that what is summed above stays in registers
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < kQuad; ++q) sums[r][q] = total[r][q];
    add_rows(addend, n, valid, sums);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < kQuad; ++q) total[r][q] = sums[r][q];
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kQuad; ++q) out[r][q] = sum(total[r][q]) * Steps::kUnit;
}

template <class Steps, bool Uniform>
void quads(const Steps& steps, const LowbitLinearArgs& call, Range range, const typename Steps::Element* x,
           int64_t x_stride, const LaneGroups& lanes, const float* x_sums, const RowAddend& addend,
           float* scales, float* zeros, uint8_t* last) {
  using Code = typename Steps::Code;
  constexpr int kAtOnce = Code::kBits < 4 ? 2 : kFewRows;  // of narrow codes two rows, to compile less
  const LowBitMatrix& w = call.w;
  const int64_t groups = groups_of(w), row_bytes = code_bytes<Code>(w.k);
  const int64_t sums_stride = x_stride / Steps::kSteps;
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int64_t n = i * kQuad, valid = least(kQuad, w.n - n);
    const uint8_t* codes = w.codes + n * row_bytes;
    if (valid < kQuad) {
      std::memcpy(last, codes, size_t(valid * row_bytes));
      std::memset(last + valid * row_bytes, 0, size_t((kQuad - valid) * row_bytes));
      codes = last;
    }
    read_scales(w, n, valid, scales);
    if (Code::kZeros) read_zeros(w, n, valid, zeros);
    if (Steps::kOffsets) {
      read_offsets(w, n, valid, zeros);
      for (int64_t g = 0; g < valid * groups; ++g) zeros[g] -= float(w.zero_point) * scales[g];
    }
    prefetch_scales(w, n + kQuad, kQuad);
    float y[kFewRows][kQuad], bias[kQuad] = {};
    for (int64_t r = 0, rows; r < call.rows; r += rows) {
      rows = least(kAtOnce, call.rows - r);
      RowAddend rest = addend;
      if (rest.t) rest.t += r * rest.t_stride;
      unrolled<kAtOnce>([&](auto count) __attribute__((always_inline)) {
        constexpr int Rows = decltype(count)::value + 1;
        if (rows == Rows)
          quad<Steps, Rows, Uniform>(steps, w, codes, n, valid, x + r * x_stride, x_stride, lanes, scales,
                                     zeros, x_sums + r * sums_stride, rest, y + r);
      });
    }
    if (call.bias) to_float(element(call.bias, call.dtype, n), call.dtype, bias, valid);
    for (int64_t r = 0; r < call.rows; ++r) {
      for (int q = 0; q < valid; ++q)
        y[r][q] = (call.out_scale ? y[r][q] * call.out_scale[n + q] : y[r][q]) + bias[q];
      from_float(y[r], element(call.out, call.dtype, r * w.n + n), call.dtype, valid);
    }
  }
}

// Scratch: at most 12 bytes for each column of x and, on each thread, 32 for each group of a row; kQuad rows
// of codes where n is no multiple of kQuad; with offsets a float for each 8 columns of x; with an adapter
// also what Shrink says, and 16 bytes for each rank.
template <class Steps>
void few_rows(const LowbitLinearArgs& call) {
  using Code = typename Steps::Code;
  using Element = typename Steps::Element;
  constexpr int64_t kBlock = Code::kCodes * kLanes;
  constexpr bool kZeros = Code::kZeros || Steps::kOffsets;
  const LowBitMatrix& w = call.w;
  const Steps steps(w);
  const int64_t blocks = round_up(w.k, kBlock) / kBlock, x_stride = blocks * Steps::kSteps * kLanes;
  const int64_t row_scales = round_up(kQuad * groups_of(w) + kLanes, kLanes);  // `pick` loads a whole vector
  const int64_t quad_count = (w.n + kQuad - 1) / kQuad;
  const int threads = int(least(threads_for(w.n * w.k * call.rows), quad_count));

  const Adapter none{};
  const Adapter& adapter = call.adapter ? *call.adapter : none;
  const Shrink shrink(adapter, call.x, call.dtype, call.row_stride, w.k);
  const int64_t t_stride = round_up(adapter.rank, kLanes);

  struct Worker {
    float *scales, *zeros, *t, *shrink;
    uint8_t* last;  // the last rows of W, where they are no whole quad
  };
  auto carve_worker = [&](Carver& carver) {
    Worker worker;
    worker.scales = carver.take<float>(row_scales);
    worker.zeros = carver.take<float>(kZeros ? row_scales : 0);
    worker.t = carver.take<float>(call.rows * t_stride);
    worker.shrink = call.adapter ? shrink.carve_worker(carver) : nullptr;
    worker.last = carver.take<uint8_t>(w.n % kQuad ? kQuad * code_bytes<Code>(w.k) : 0);
    return worker;
  };
  LaneGroups lanes;
  float* x_sums;
  auto carve = [&](Carver& carver, Element*& x, float*& natural) {
    x = carver.take<Element>(call.rows * x_stride);
    x_sums = carver.take<float>(Steps::kOffsets ? call.rows * blocks * kLanes : 0);
    natural = carver.take<float>(blocks * kBlock);
    lanes.first = carver.take<int32_t>(blocks);
    lanes.lane = carver.take<int32_t>(blocks * kLanes);
  };
  Element* x;
  float* natural;
  Carver shared_need, worker_need;
  carve(shared_need, x, natural);
  carve_worker(worker_need);
  char* workers = scratch(shared_need.used() + size_t(threads) * worker_need.used());
  Carver carver(workers);
  carve(carver, x, natural);
  workers += shared_need.used();
  lanes.fill(w, Code::kCodes, blocks);
  for (int64_t r = 0; r < call.rows; ++r) {
    arrange<Steps>(call, r, blocks, natural, x + r * x_stride);
    if constexpr (Steps::kOffsets) sum_lanes<Steps>(x + r * x_stride, blocks, x_sums + r * blocks * kLanes);
  }

  parallel(threads, [&](int thread, int team) {
    const Range mine = share(quad_count, thread, team);
    Carver my_carver(workers + size_t(thread) * worker_need.used());
    const Worker my = carve_worker(my_carver);
    for (int64_t i = 0; i < row_scales; ++i)
      my.scales[i] = 0;  // what lies past the last group is loaded, not used
    for (int64_t i = 0; kZeros && i < row_scales; ++i) my.zeros[i] = 0;
    RowAddend addend;
    if (call.adapter) {
      shrink.run(0, call.rows, thread, team, my.shrink);
      wait_for_team(team);
      for (int64_t r = 0; r < call.rows; ++r)
        for (int64_t j = 0; j < t_stride; ++j)
          my.t[r * t_stride + j] =
              j < adapter.rank ? adapter.h[r * adapter.rank + j] * (adapter.scale / Steps::kUnit) : 0;
      addend = {my.t, t_stride, adapter.rank, adapter.b, adapter.b_dtype};
    }
    auto run = lanes.uniform ? quads<Steps, true> : quads<Steps, false>;
    run(steps, call, mine, x, x_stride, lanes, x_sums, addend, my.scales, my.zeros, my.last);
  });
}

// With the steps that suit x, and the code type Code<zeros> of W.
template <template <bool> class Code>
void few_rows_of(const LowbitLinearArgs& call) {
#if BITFUSE_PAIRS
  if constexpr (Code<false>::kPairsInTiles) {
    if (call.dtype == Dtype::kBfloat16 && values_are_bfloat16(call.w)) {
      if (call.w.offsets) return few_rows<PairSteps<Code<false>, true>>(call);
      return call.w.zeros ? few_rows<PairSteps<Code<true>>>(call) : few_rows<PairSteps<Code<false>>>(call);
    }
  }
#endif
  if (call.w.offsets) return few_rows<FloatSteps<Code<false>, true>>(call);
  call.w.zeros ? few_rows<FloatSteps<Code<true>>>(call) : few_rows<FloatSteps<Code<false>>>(call);
}

inline void few_rows_e4m3(const LowbitLinearArgs& call) {
  LaneGroups::is_uniform(call.w, E4m3Code::kCodes * kLanes) ? few_rows<E4m3ByteSteps>(call)
                                                            : few_rows<FloatSteps<E4m3Code>>(call);
}

}  // namespace bitfuse::BITFUSE_ISA
