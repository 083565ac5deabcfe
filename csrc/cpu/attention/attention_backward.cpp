// attention on the CPU, backward: probabilities are made again from lse, P = e^(logit - lse), and with delta
// = sum(out * grad) - grad_lse of a row
//
//     dV = P^T dO     dP = dO V^T     dS = P (dP - delta)     dQ = scale dS K     dK = scale dS^T Q
//
// A task is the rows of one (batch, kv head), or a share of them where there are few such: all five products
// of a tile of rows and a block of keys are made in one visit, so that nothing is computed twice. Of its rows
// a task holds, for a part of them at a time, q and grad as panels [dim][row] and [row][dim], and dQ^T
// [dim][row] in float; of the keys a chunk, K natural and turned, V natural. dK and dV [key][dim] in float
// belong to the task: sums of rows are added in their order, and those of shares in theirs, so that no bit depends
// on the threads. In a chunk each tile goes over its blocks of kBlockKeys keys; S^T, dP^T and the words of P
// and dS, made in place, stay in L1.
//
// Bound by the multiply-adds, (3 dim + 2 dim_v) rows keys; the elementwise pass is some 25 instructions per
// 16 scores. Scratch is bounded by the keys of one head: 4 (dim + dim_v) bytes a key on each thread (or for
// each of at most kShares shares), and the budgets below.
//
// lse has 24 bits: of logits in the thousands they leave too few behind the point, and of billions none.
// There the largest score of a row and the sum over it are measured again first, as the forward has them
// (Levels): a product more of five, in such calls alone.
//
// The gradient of a bias is a pass of its own, with S and dP again: a task owns what it sums, over whatever
// the bias is broadcast.
#include <vector>

#include "cpu/attention/attention_scores.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kChunkBytes = 512 << 10;  // of packed K and V, dK and dV
constexpr int64_t kPartBytes = 4 << 20;     // of the rows' panels and dQ
constexpr int64_t kShares = 16;             // tasks, where (batch, kv head) are fewer
constexpr int64_t kBiasKeys = 4 * kBlockKeys;
// Magnitudes of lse that are measured again: there its rounding shows in float32, and in 16 bits.
constexpr float kFar = 16, kFarIn16Bits = 4096;

// What a row's probabilities are made from: P = 2^(unit (score - most) + rest).
struct Level {
  float most, rest;
};
constexpr Level kUnseen{kInfinity, 0};  // of a row that sees nothing: its probabilities come out 0

struct State {
  Lanes lanes;
  alignas(64) float most[kWidth], rest[kWidth];  // Level
  alignas(64) float delta[kWidth];
  alignas(64) float dots[kWidth];  // sum of P dP: delta without the rounding of the output
};

// Of S^T and dP^T: P^T, dropped, over S^T, and dS^T over dP^T, both in words natural along the rows, [key]
// [Vecs * kLanes] (pairs fill half of it); with pairs also dS^T in words along the keys, to `panel`. An odd
// count is filled up with zeros.
template <class Dot, int Vecs, bool Dropped, bool Dots>
void differentiate(const Scores& scores, State& state, int64_t count, int64_t column, float unit, float* s,
                   float* dp, const float* slopes, [[maybe_unused]] uint32_t* panel) {
  constexpr int kDegree = Dot::kDepth == 2 ? 5 : 6;
  constexpr int kPitch = Vecs * kLanes;
  const Vf f = set1(unit), kept = set1(scores.keep_scale());
  struct Both {
    Vf p, ds;
  };
  [[maybe_unused]] Vf dots[Vecs];
  if constexpr (Dots)
    for (int v = 0; v < Vecs; ++v) dots[v] = load(state.dots + v * kLanes);
  auto one = [&](int64_t j, int v) __attribute__((always_inline)) {
    const int64_t at = j * kPitch + v * kLanes;
    const Vf over = sub(load(s + at), load(state.most + v * kLanes));
    Vf p = exp2_of<kDegree>(fma(over, f, load(state.rest + v * kLanes)));
    Vf g = load(dp + at);
    if constexpr (Dropped) g = mul(scores.keep(state.lanes, column + j, v * kLanes, g), kept);
    Vf ds = mul(p, sub(g, load(state.delta + v * kLanes)));
    if constexpr (Dots) dots[v] = fma(p, g, dots[v]);
    if (slopes) ds = mul(ds, load(slopes + at));
    if constexpr (Dropped) p = mul(scores.keep(state.lanes, column + j, v * kLanes, p), kept);
    return Both{p, ds};
  };
#if BITFUSE_PAIRS
  if constexpr (Dot::kDepth == 2) {
    for (int64_t j = 0; j < count; j += 2) {
      const bool odd = j + 1 == count;
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; v += 2) {
        const bool two = v + 1 < Vecs;
        const Both none{zero(), zero()};
        const Both a = one(j, v), b = two ? one(j, v + 1) : none;
        const Both c = odd ? none : one(j + 1, v), d = odd || !two ? none : one(j + 1, v + 1);
        store_dwords(panel + j / 2 * kPitch + v * kLanes, Dot::words(a.ds, c.ds));
        if (two) store_dwords(panel + j / 2 * kPitch + (v + 1) * kLanes, Dot::words(b.ds, d.ds));
        // below what is still to be read, and within the row: behind a lone vector lies its unused half
        auto put = [&](float* to, Vf low, Vf high) __attribute__((always_inline)) {
          store_dwords(to + j * kPitch + v * (kLanes / 2), bfloats_of(low, high));
        };
        put(s, a.p, b.p), put(s + kPitch, c.p, d.p);
        put(dp, a.ds, b.ds), put(dp + kPitch, c.ds, d.ds);
      }
    }
  } else
#endif
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) {
        const Both both = one(j, v);
        store(s + j * kPitch + v * kLanes, both.p);
        store(dp + j * kPitch + v * kLanes, both.ds);
      }
  if constexpr (Dots)
    for (int v = 0; v < Vecs; ++v) store(state.dots + v * kLanes, dots[v]);
  if (Dot::kDepth == 1 && count % 2) {
    std::memset(s + count * kPitch, 0, kPitch * 4);
    std::memset(dp + count * kPitch, 0, kPitch * 4);
  }
}

// Of a block: most = the larger of most and its scores, sums follow it and take its own.
template <int Vecs>
void add_sums(const float* s, int64_t count, float unit, float* most, float* sums) {
  constexpr int kPitch = Vecs * kLanes;
  for (int at = 0; at < kPitch; at += kLanes) {
    const Vf before = load(most + at);
    Vf top = before;
    for (int64_t j = 0; j < count; ++j) top = maximum(load(s + j * kPitch + at), top);
    const Vf shift = by_sign(sub(top, set1(kLowest)), top, zero());
    Vf sum = mul(load(sums + at), exp2_of<6>(mul(sub(before, shift), set1(unit))));
    for (int64_t j = 0; j < count; ++j)
      sum = add(sum, exp2_of<6>(mul(sub(load(s + j * kPitch + at), shift), set1(unit))));
    store(most + at, top);
    store(sums + at, sum);
  }
}

template <class Dot, class Elements>
class Backward {
  using Type = typename Elements::Type;

 public:
  explicit Backward(const AttentionBackwardArgs& call)
      : call_(call),
        scores_(call),
        unit_(in_powers_of_two(scores_.factor())),
        words_(ceil_div(call.dim, Dot::kDepth)),
        words_v_(ceil_div(call.dim_v, Dot::kDepth)),
        natural_(natural_pitch<Dot>(call.dim)),
        natural_v_(natural_pitch<Dot>(call.dim_v)),
        turned_(turned_pitch(call.dim)),
        turned_v_(turned_pitch(call.dim_v)),
        need_ds_(call.grad_q || call.grad_k || call.grad_prefix_k || call.grad_sinks) {
    const int64_t key_bytes = (natural_ + natural_v_ + turned_ / Dot::kDepth + turned_ + turned_v_) * 4;
    chunk_ = most(1, kChunkBytes / key_bytes / kBlockKeys) * kBlockKeys;
    tile_words_ = (words_ + words_v_) * kWidth + kWidth / Dot::kDepth * (turned_ + turned_v_);
    for (int64_t b = 0; b < call.batch; ++b) {
      const AttentionSequence& s = call.sequences[b];
      most_tiles_ = most(most_tiles_, ceil_div(s.q_length * scores_.group(), kWidth));
      most_keys_ = most(most_keys_, round_up(s.k_length, 2));
      multiply_adds_ +=
          s.q_length * call.heads * (s.k_length + call.prefix) * (3 * call.dim + 2 * call.dim_v);
    }
    prefix_ = round_up(call.prefix, 2);
  }

  void run() {
    const int64_t units = call_.batch * call_.kv_heads;
    if (units == 0) return;
    const int64_t shares = units < kShares ? most(1, least(ceil_div(kShares, units), most_tiles_)) : 1;
    const int threads = int(least(threads_for(multiply_adds_), units * shares));
    const int64_t part =
        most(1, least(ceil_div(most_tiles_, shares), kPartBytes / ((tile_words_ + turned_ * kWidth) * 4)));
    const int64_t sums = (prefix_ + most_keys_) * (turned_ + turned_v_);

    Space* spaces;
    float* totals;
    double* sinks;
    auto carve = [&](Carver& carver) {
      spaces = carver.take<Space>(threads);
      totals = carver.take<float>((shares > 1 ? units * shares : threads) * sums);
      sinks = carver.take<double>(units * shares * scores_.group());
      for (int t = 0; t < threads; ++t) {
        Space space;
        take(carver, space, part, chunk_);
        if (spaces) spaces[t] = space;
      }
    };
    Carver need;
    carve(need);
    Carver carver(scratch(need.used()));
    carve(carver);

    if (far()) {
      std::vector<Level> levels(static_cast<size_t>(all_rows()), kUnseen);
      parallel(threads, [&](int thread, int team) {
        const Range mine = share(units, thread, team);
        for (int64_t unit = mine.begin; unit < mine.end; ++unit) measure(unit, spaces[thread], levels.data());
      });
      levels_ = std::move(levels);
    }
    int64_t next = 0;
    parallel(threads, [&](int thread, int team) {
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < units * shares;) {
        const int64_t unit = i / shares;
        float* own = totals + (shares > 1 ? i : thread) * sums;
        work(unit, i % shares, shares, part, spaces[thread], own, sinks + i * scores_.group());
        if (shares == 1) write_keys(unit, own, 1, {0, prefix_ + most_keys_});
      }
      if (shares > 1) {
        wait_for_team(team);
        for (int64_t unit = 0; unit < units; ++unit)
          write_keys(unit, totals + unit * shares * sums, shares, share(prefix_ + most_keys_, thread, team));
      }
    });
    if (call_.grad_sinks) {
      for (int64_t head = 0; head < call_.heads; ++head) {
        const int64_t kv_head = head / scores_.group(), g = head % scores_.group();
        double sum = 0;
        for (int64_t b = 0; b < call_.batch; ++b)
          for (int64_t i = 0; i < shares; ++i)
            sum += sinks[((b * call_.kv_heads + kv_head) * shares + i) * scores_.group() + g];
        call_.grad_sinks[head] = float(-sum);
      }
    }
    if (call_.grad_bias) bias();
  }

 private:
  struct Space {
    State* states;
    uint32_t *rows, *staged, *k, *k_turned, *v, *panel;  // rows: a tile's q, grad, q turned, grad turned
    float *dq, *s, *dp, *slopes;
  };

  void take(Carver& carver, Space& space, int64_t tiles, int64_t keys) const {
    space.states = carver.take<State>(tiles);
    space.rows = carver.take<uint32_t>(tiles * tile_words_);
    space.dq = carver.take<float>(tiles * turned_ * kWidth);
    space.staged = carver.take<uint32_t>(kWidth * most(natural_, natural_v_));
    space.k = carver.take<uint32_t>(keys * natural_);
    space.k_turned = carver.take<uint32_t>(keys / Dot::kDepth * turned_);
    space.v = carver.take<uint32_t>(keys * natural_v_);
    space.s = carver.take<float>(kBlockKeys * kWidth);
    space.dp = carver.take<float>(kBlockKeys * kWidth);
    space.slopes = carver.take<float>(scores_.capped() ? kBlockKeys * kWidth : 0);
    space.panel = carver.take<uint32_t>(kBlockKeys * kWidth);
  }

  Level level_of(int64_t place) const {
    if (!levels_.empty()) return levels_[size_t(place)];
    const float lse = call_.lse[place];
    if (__builtin_isinf(lse)) return kUnseen;
    const double factor = scores_.factor();
    const float score = float(double(lse) / factor);
    const float most = __builtin_isinf(score) ? __builtin_copysignf(kLowest, score) : score;
    return {most, float((double(most) * factor - double(lse)) * kExactLog2e)};
  }

  int64_t all_rows() const { return (call_.packed ? 1 : call_.batch) * call_.heads * call_.rows; }

  bool far() const {
    const float bound = call_.dtype == Dtype::kFloat32 ? kFar : kFarIn16Bits;
    bool found = false;
    for (int64_t i = 0; i < all_rows(); ++i) {
      const float lse = __builtin_fabsf(call_.lse[i]);
      found |= lse > bound && lse < kInfinity;
    }
    return found;
  }

  // The largest score of each row and the sum over it, of all rows of a unit.
  void measure(int64_t unit, const Space& my, Level* levels) const {
    const int64_t batch = unit / call_.kv_heads, kv_head = unit % call_.kv_heads;
    const AttentionSequence& s = call_.sequences[batch];
    const int64_t rows = s.q_length * scores_.group();
    alignas(64) float most[kWidth], sums[kWidth];
    State& state = my.states[0];
    Lanes& lanes = state.lanes;
    auto segment = [&](Range keys, bool own, int64_t of, int64_t begin, const HeadRows& k) {
      for (int64_t j = keys.begin; j < keys.end; j += kBlockKeys) {
        const Block block{j, least(kBlockKeys, keys.end - j), own};
        if (!scores_.seen(lanes, block)) continue;
        pack_keys(my, k, k, of, begin + j, block.count, kv_head, false, false);
        make_scores(s, state, block, my.rows, my.k, nullptr, my, false);
        with_vecs(lanes.vecs, [&](auto fixed) {
          add_sums<decltype(fixed)::value>(my.s, block.count, unit_, most, sums);
        });
      }
    };
    for (int64_t row = 0; row < rows; row += kWidth) {
      const int64_t count = least(kWidth, rows - row);
      scores_.set_lanes(batch, kv_head, s, row, count, lanes);
      pack_q(batch, count, lanes, my, my.rows);
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        most[lane] = lane < count ? scores_.most_of(lanes.head[lane]) : -kInfinity;
        sums[lane] = most[lane] == -kInfinity ? 0 : 1;
      }
      if (call_.prefix) segment({0, call_.prefix}, false, batch, 0, call_.prefix_k);
      segment(scores_.visible(s, lanes.first, lanes.last), true, call_.packed ? 0 : batch, s.k_begin,
              call_.k);
      for (int64_t lane = 0; lane < count; ++lane)
        levels[lanes.place[lane]] =
            sums[lane] == 0 ? kUnseen : Level{most[lane], float(-__builtin_log2(double(sums[lane])))};
    }
  }

  void pack_q(int64_t batch, int64_t count, const Lanes& lanes, const Space& my, uint32_t* to) const {
    auto q = [&](int64_t r) {
      return row_of<Type>(call_.q, call_.packed ? 0 : batch, lanes.query[r], lanes.head[r]);
    };
    pack_natural<Dot, Elements>(q, count, call_.dim, my.staged);
    turn(my.staged, count, natural_, words_, lanes.vecs, to);
  }

  // q and grad of rows [row, row + count) of a head, packed; what of them does not depend on the keys.
  void set_tile(int64_t batch, int64_t kv_head, int64_t row, int64_t count, const Space& my, State& state,
                uint32_t* to, bool turned) const {
    const AttentionSequence& s = call_.sequences[batch];
    const int64_t of = call_.packed ? 0 : batch;
    Lanes& lanes = state.lanes;
    scores_.set_lanes(batch, kv_head, s, row, count, lanes);
    auto of_view = [&](const HeadRows& view) {
      return [&view, &lanes, of](int64_t r) { return row_of<Type>(view, of, lanes.query[r], lanes.head[r]); };
    };
    const auto q = of_view(call_.q), grad = of_view(call_.grad), out = of_view(call_.output);
    pack_q(batch, count, lanes, my, to);
    to += words_ * kWidth;
    pack_natural<Dot, Elements>(grad, count, call_.dim_v, my.staged);
    turn(my.staged, count, natural_v_, words_v_, lanes.vecs, to);
    to += words_v_ * kWidth;
    if (turned) {
      pack_columns(q, count, call_.dim, turned_, to);
      pack_columns(grad, count, call_.dim_v, turned_v_, to + kWidth / Dot::kDepth * turned_);
    }
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      state.most[lane] = kUnseen.most, state.rest[lane] = kUnseen.rest;
      state.delta[lane] = state.dots[lane] = 0;
      if (lane >= count) continue;
      const Level level = level_of(lanes.place[lane]);
      state.most[lane] = level.most, state.rest[lane] = level.rest;
      Vf sum4 = zero();
      const Type *g = grad(lane), *o = out(lane);
      for (int64_t i = 0; i < call_.dim_v; i += kLanes)
        sum4 = fma(load_row<Elements>(g, i, call_.dim_v), load_row<Elements>(o, i, call_.dim_v), sum4);
      state.delta[lane] = sum(sum4) - (call_.grad_lse ? call_.grad_lse[lanes.place[lane]] : 0);
    }
  }

  // Panels of at most kWidth columns, [rows in words][width] each.
  template <class Row>
  void pack_columns(Row row, int64_t rows, int64_t dim, int64_t pitch, uint32_t* to) const {
    for (int64_t i = 0; i < pitch; i += kWidth) {
      const int64_t width = least(kWidth, pitch - i);
      pack_turned<Dot, Elements>(row, rows, dim, i, width, to + i * ceil_div(rows, Dot::kDepth));
    }
  }

  void pack_keys(const Space& my, const HeadRows& k, const HeadRows& v, int64_t batch, int64_t from,
                 int64_t count, int64_t head, bool turned, bool natural_v) const {
    auto key = [&](int64_t j) { return row_of<Type>(k, batch, from + j, head); };
    pack_natural<Dot, Elements>(key, count, call_.dim, my.k);
    if (turned) pack_turned<Dot, Elements>(key, count, call_.dim, 0, turned_, my.k_turned);
    if (natural_v)
      pack_natural<Dot, Elements>([&](int64_t j) { return row_of<Type>(v, batch, from + j, head); }, count,
                                  call_.dim_v, my.v);
  }

  // S^T and dP^T of a block, and the derivative of the cap.
  void make_scores(const AttentionSequence& s, const State& state, const Block& block, const uint32_t* rows,
                   const uint32_t* k, const uint32_t* v, const Space& my, bool need_dp) const {
    const int64_t pitch = state.lanes.vecs * kLanes, count = round_up(block.count, 2);
    product<Dot, false>(k, natural_, count, rows, state.lanes.vecs, words_, my.s, pitch, Into::kSet);
    if (need_dp)
      product<Dot, false>(v, natural_v_, count, rows + words_ * kWidth, state.lanes.vecs, words_v_, my.dp,
                          pitch, Into::kSet);
    scores_.adjust(s, state.lanes, block, my.s, my.slopes);
  }

  template <class Words>
  void make_gradients(State& state, const Block& block, const Space& my, const float* slopes,
                      bool dots) const {
    with_vecs(state.lanes.vecs, [&](auto fixed) {
      auto run = [&](auto dropped, auto dotted) {
        differentiate<Words, decltype(fixed)::value, decltype(dropped)::value, decltype(dotted)::value>(
            scores_, state, block.count, scores_.column(block), unit_, my.s, my.dp, slopes, my.panel);
      };
      const std::true_type yes;
      const std::false_type no;
      if (scores_.dropout()) {
        dots ? run(yes, yes) : run(yes, no);
      } else {
        dots ? run(no, yes) : run(no, no);
      }
    });
  }

  void work(int64_t unit, int64_t nth, int64_t shares, int64_t part, const Space& my, float* totals,
            double* sinks) const {
    const int64_t batch = unit / call_.kv_heads, kv_head = unit % call_.kv_heads;
    const AttentionSequence& s = call_.sequences[batch];
    const int64_t group = scores_.group(), rows = s.q_length * group, of = call_.packed ? 0 : batch;
    const Range mine = share(ceil_div(rows, kWidth), nth, shares);
    std::memset(totals, 0, size_t((prefix_ + most_keys_) * (turned_ + turned_v_)) * 4);
    for (int64_t g = 0; g < group; ++g) sinks[g] = 0;
    for (int64_t begin = mine.begin; begin < mine.end; begin += part) {
      const int64_t tiles = least(part, mine.end - begin);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = (begin + t) * kWidth, count = least(kWidth, rows - row);
        set_tile(batch, kv_head, row, count, my, my.states[t], my.rows + t * tile_words_, true);
      }
      std::memset(my.dq, 0, size_t(tiles * turned_ * kWidth) * 4);
      if (call_.prefix)
        segment(s, my, tiles, {0, call_.prefix}, false, kv_head, batch, 0, call_.prefix_k, call_.prefix_v,
                totals);
      segment(s, my, tiles, scores_.visible(s, my.states[0].lanes.first, my.states[tiles - 1].lanes.last),
              true, kv_head, of, s.k_begin, call_.k, call_.v, totals + prefix_ * (turned_ + turned_v_));
      if (call_.grad_sinks)
        for (int64_t t = 0; t < tiles; ++t) add_sinks(my.states[t], kv_head, sinks);
      if (!call_.grad_q) continue;
      alignas(64) float factor[kWidth];
      for (float& f : factor) f = call_.scale;
      for (int64_t t = 0; t < tiles; ++t) {
        const Lanes& lanes = my.states[t].lanes;
        write_turned<Elements>(
            my.dq + t * turned_ * kWidth, call_.dim, lanes.count, lanes.vecs, factor, [&](int64_t r) {
              const int64_t row = of * call_.rows + lanes.query[r];
              return static_cast<Type*>(call_.grad_q) + (row * call_.heads + lanes.head[r]) * call_.dim;
            });
      }
    }
  }

  // totals: [key][dK, dV], of this segment's keys.
  void segment(const AttentionSequence& s, const Space& my, int64_t tiles, Range keys, bool own, int64_t head,
               int64_t batch, int64_t k_begin, const HeadRows& k, const HeadRows& v, float* totals) const {
    const int64_t pitch = turned_ + turned_v_;
    const bool want_k = own ? call_.grad_k : call_.grad_prefix_k;
    const bool want_v = own ? call_.grad_v : call_.grad_prefix_v;
    for (int64_t c = keys.begin / chunk_ * chunk_; c < keys.end; c += chunk_) {
      const Range chunk{most(c, keys.begin), least(c + chunk_, keys.end)};
      pack_keys(my, k, v, batch, k_begin + chunk.begin, chunk.end - chunk.begin, head, call_.grad_q,
                need_ds_);
      for (int64_t t = 0; t < tiles; ++t) {
        State& state = my.states[t];
        const int vecs = state.lanes.vecs;
        const int64_t width = vecs * kLanes, row_words = ceil_div(state.lanes.count, Dot::kDepth);
        const uint32_t* rows = my.rows + t * tile_words_;
        const uint32_t* q_turned = rows + (words_ + words_v_) * kWidth;
        const uint32_t* grad_turned = q_turned + kWidth / Dot::kDepth * turned_;
        const Range seen = own ? scores_.visible(s, state.lanes.first, state.lanes.last) : keys;
        const int64_t end = least(chunk.end, seen.end);
        for (int64_t j = most(chunk.begin, seen.begin); j < end; j += kBlockKeys) {
          const Block block{j, least(kBlockKeys, end - j), own};
          if (!scores_.seen(state.lanes, block)) continue;
          const int64_t at = j - chunk.begin, count = round_up(block.count, 2);
          make_scores(s, state, block, rows, my.k + at * natural_, my.v + at * natural_v_, my, need_ds_);
          make_gradients<Dot>(state, block, my, scores_.capped() ? my.slopes : nullptr, call_.grad_sinks);
          const auto* p = reinterpret_cast<const uint32_t*>(my.s);
          const auto* ds = reinterpret_cast<const uint32_t*>(my.dp);
          float* to = totals + j * pitch;
          if (want_k) add_rows(ds, width, count, q_turned, turned_, row_words, to, pitch);
          if (want_v) add_rows(p, width, count, grad_turned, turned_v_, row_words, to + turned_, pitch);
          if (call_.grad_q)
            product<Dot, true>(my.k_turned + at / Dot::kDepth * turned_, turned_, round_up(call_.dim, 2),
                               Dot::kDepth == 2 ? my.panel : ds, vecs, ceil_div(block.count, Dot::kDepth),
                               my.dq + t * turned_ * kWidth, width, Into::kAdd);
        }
      }
    }
  }

  // to[key][columns] += a[key][rows in words] b, the panels of pack_columns.
  void add_rows(const uint32_t* a, int64_t a_stride, int64_t keys, const uint32_t* b, int64_t columns,
                int64_t row_words, float* to, int64_t to_stride) const {
    for (int64_t i = 0; i < columns; i += kWidth)
      product<Dot, false>(a, a_stride, keys, b + i * row_words, int(least(kWidth, columns - i) / kLanes),
                          row_words, to + i, to_stride, Into::kAdd);
  }

  void add_sinks(const State& state, int64_t kv_head, double* sinks) const {
    const Lanes& lanes = state.lanes;
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const double over = double(scores_.most_of(lanes.head[lane])) - double(state.most[lane]);
      const double p =
          __builtin_exp2(over * double(scores_.factor()) * kExactLog2e + double(state.rest[lane]));
      const float of_lse = call_.grad_lse ? call_.grad_lse[lanes.place[lane]] : 0;
      sinks[lanes.head[lane] - kv_head * scores_.group()] += p * (double(state.dots[lane]) - double(of_lse));
    }
  }

  // dK and dV of `keys`, the prefix first, the sum of `shares`.
  void write_keys(int64_t unit, const float* totals, int64_t shares, Range keys) const {
    const int64_t batch = unit / call_.kv_heads, kv_head = unit % call_.kv_heads;
    const int64_t pitch = turned_ + turned_v_, size = (prefix_ + most_keys_) * pitch;
    const AttentionSequence& s = call_.sequences[batch];
    alignas(64) float row[2 * kMaxHeadDim];
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const bool own = j >= prefix_;
      const int64_t key = own ? j - prefix_ : j;
      if (key >= (own ? s.k_length : call_.prefix)) continue;
      for (int64_t i = 0; i < pitch; i += kLanes) {
        Vf total = load(totals + j * pitch + i);
        for (int64_t n = 1; n < shares; ++n) total = add(total, load(totals + n * size + j * pitch + i));
        store(row + i, i < turned_ ? mul(total, set1(call_.scale)) : total);
      }
      const int64_t at =
          own ? (call_.packed ? 0 : batch) * call_.keys + s.k_begin + key : batch * call_.prefix + key;
      void* to_k = own ? call_.grad_k : call_.grad_prefix_k;
      void* to_v = own ? call_.grad_v : call_.grad_prefix_v;
      const int64_t head = at * call_.kv_heads + kv_head;
      if (to_k) from_float(row, element(to_k, call_.dtype, head * call_.dim), call_.dtype, call_.dim);
      if (to_v)
        from_float(row + turned_, element(to_v, call_.dtype, head * call_.dim_v), call_.dtype, call_.dim_v);
    }
  }

  // The gradient of the bias. Sequences are not packed.
  void bias() const {
    const int64_t group = scores_.group();
    const bool batches = call_.bias_sizes[0] == call_.batch, heads = call_.bias_sizes[1] == call_.heads;
    const bool rows = call_.bias_sizes[2] == call_.rows, keys = call_.bias_sizes[3] == call_.keys;
    const int64_t rows_each = rows ? kWidth : call_.rows, keys_each = keys ? kBiasKeys : call_.keys;
    const int64_t of_batch = batches ? call_.batch : 1, of_head = heads ? call_.kv_heads : 1;
    const int64_t of_row = rows ? ceil_div(call_.rows, rows_each) : 1;
    const int64_t of_key = keys ? ceil_div(call_.keys, keys_each) : 1;
    const int64_t tasks = of_batch * of_head * of_row * of_key;
    const int threads = int(least(threads_for(multiply_adds_ / 2), most(1, tasks)));
    const int64_t sum_rows = rows ? kWidth : 1, sum_pitch = keys ? kBiasKeys : kLanes;
    const int64_t sums = (heads ? group : 1) * sum_rows * sum_pitch;

    Space* spaces;
    float* totals;
    auto carve = [&](Carver& carver) {
      spaces = carver.take<Space>(threads);
      totals = carver.take<float>(threads * sums);
      for (int t = 0; t < threads; ++t) {
        Space space;
        take(carver, space, 1, kBiasKeys);
        if (spaces) spaces[t] = space;
      }
    };
    Carver need;
    carve(need);
    Carver carver(scratch(need.used()));
    carve(carver);

    int64_t next = 0;
    parallel(threads, [&](int thread, int) {
      const Space& my = spaces[thread];
      float* own = totals + thread * sums;
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
        const int64_t key = i % of_key * keys_each, row = i / of_key % of_row * rows_each;
        const int64_t head = i / of_key / of_row % of_head, batch = i / of_key / of_row / of_head;
        const Range of_rows{row, least(call_.rows, row + rows_each)};
        const Range of_keys{key, least(call_.keys, key + keys_each)};
        std::memset(own, 0, size_t(sums) * 4);
        for (int64_t b = batches ? batch : 0; b < (batches ? batch + 1 : call_.batch); ++b)
          for (int64_t h = heads ? head : 0; h < (heads ? head + 1 : call_.kv_heads); ++h)
            for (int64_t j = of_keys.begin; j < of_keys.end; j += kBiasKeys)
              add_bias(
                  b, h, of_rows, {j, least(of_keys.end, j + kBiasKeys)}, my,
                  [&](int64_t i, int64_t g) {
                    return own + ((heads ? g : 0) * sum_rows + (rows ? i - row : 0)) * sum_pitch;
                  },
                  keys);
        const int64_t count = keys ? of_keys.end - of_keys.begin : 1;
        for (int64_t g = 0; g < (heads ? group : 1); ++g)
          for (int64_t r = 0; r < (rows ? of_rows.end - of_rows.begin : 1); ++r) {
            float* from = own + (g * sum_rows + r) * sum_pitch;
            if (!keys) *from = sum(load(from));
            const int64_t of = (batches ? batch : 0) * call_.bias_sizes[1] + (heads ? head * group + g : 0);
            const int64_t at =
                (of * call_.bias_sizes[2] + (rows ? row + r : 0)) * call_.bias_sizes[3] + (keys ? key : 0);
            from_float(from, element(call_.grad_bias, call_.bias.dtype, at), call_.bias.dtype, count);
          }
      }
    });
  }

  // Adds dS of the positions and keys of one head to row(position, query head of the group): each key its own
  // sum, or all in a vector.
  template <class Row>
  void add_bias(int64_t batch, int64_t kv_head, Range positions, Range keys, const Space& my, Row row,
                bool each) const {
    const AttentionSequence& s = call_.sequences[batch];
    const int64_t group = scores_.group(), end = positions.end * group;
    pack_keys(my, call_.k, call_.v, batch, keys.begin, keys.end - keys.begin, kv_head, false, true);
    State& state = my.states[0];
    for (int64_t r = positions.begin * group; r < end; r += kWidth) {
      set_tile(batch, kv_head, r, least(kWidth, end - r), my, state, my.rows, false);
      const Lanes& lanes = state.lanes;
      const int64_t width = lanes.vecs * kLanes;
      const Range seen = scores_.visible(s, lanes.first, lanes.last);
      const int64_t last = least(keys.end, seen.end);
      for (int64_t j = most(keys.begin, seen.begin); j < last; j += kBlockKeys) {
        const Block block{j, least(kBlockKeys, last - j), true};
        const int64_t at = j - keys.begin;
        make_scores(s, state, block, my.rows, my.k + at * natural_, my.v + at * natural_v_, my, true);
        make_gradients<Singles>(state, block, my, nullptr, false);
        for (int64_t v = 0; v < lanes.count; v += kLanes)
          for (int64_t i = 0; i < block.count; i += kLanes) {
            Vi turned[kLanes];
            for (int n = 0; n < kLanes; ++n)
              turned[n] = i + n < block.count ? load_dwords(my.dp + (i + n) * width + v) : set1_dwords(0);
            transpose(turned);
            for (int64_t lane = 0; lane < least(kLanes, lanes.count - v); ++lane) {
              float* to =
                  row(lanes.query[v + lane], lanes.head[v + lane] - kv_head * group) + (each ? at + i : 0);
              store(to, add(load(to), as_float(turned[lane])));
            }
          }
      }
    }
  }

  const AttentionBackwardArgs& call_;
  Scores scores_;
  float unit_;                 // a score in powers of two
  std::vector<Level> levels_;  // laid out as lse; empty: lse says enough
  int64_t words_, words_v_, natural_, natural_v_, turned_, turned_v_, chunk_, tile_words_, prefix_;
  bool need_ds_;
  int64_t most_tiles_ = 0, most_keys_ = 0, multiply_adds_ = 0;
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& call) {
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16) return Backward<Pairs, Bfloats>(call).run();
#endif
  with_elements(call.dtype, [&](auto elements) { Backward<Singles, decltype(elements)>(call).run(); });
}

}  // namespace bitfuse::BITFUSE_ISA
