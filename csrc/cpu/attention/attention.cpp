// attention on the CPU: an online softmax over blocks of keys (FlashAttention), forward.
//
// A task is a group of tiles of one (batch, kv head); the queries of all its heads are that head's rows, so K
// and V are packed once for all of them. Of its tiles a task holds Q^T as a panel, the running maximum and
// sum of each row, and O^T [dim_v][row] in float; of K and V a chunk at a time, K natural and V turned. Each
// tile goes over its part of the chunk by blocks of kBlockKeys keys:
//
//     S^T = K Q^T                  [key][row]
//     P^T = e^(S^T - maximum)      in words, in the place of S^T; the running maximum and sum of each row
//     O^T = O^T * rescale + V^T P^T
//
// S^T of a block (24 KiB at 16 lanes) stays in L1; the chunk and the tiles' state have budgets that fit L2
// together. Keys that no row of a tile may see are not visited; masks are computed where an edge of the
// window crosses a block.
//
// Bound by the multiply-adds, 2 (dim + dim_v) rows keys at 64 (bfloat16 pairs) or 32 (floats) FLOPs an
// instruction; the softmax adds some 16 instructions per 16 scores, against (dim + dim_v) / 2 for the
// products of pairs. Tasks are dealt out in descending order of work; blocks are cut the same way whoever
// gets them, so that no bit depends on the threads.
#include "cpu/attention/attention.h"

#include "cpu/attention/attention_scores.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // of packed K and V
constexpr int64_t kGroupBytes = 512 << 10;  // of the tiles' panels and outputs

// What a tile keeps from block to block.
struct State {
  Lanes lanes;
  alignas(64) float most[kWidth];  // of the scores so far; logits are `factor` times scores
  alignas(64) float sums[kWidth];  // of e^(factor (score - most))
  bool begun;                      // the output holds something
};

// P^T of a block in words, over S^T; adds each row's to sums. unit: what a score is in powers of two.
template <class Dot, int Vecs, bool Dropped>
void exponentiate(const Scores& scores, const Lanes& lanes, int64_t count, int64_t column, float unit,
                  const float* shifts, float* s, float* sums) {
  constexpr int kDegree = Dot::kDepth == 2 ? 5 : 6;
  constexpr int kPitch = Vecs * kLanes;
  Vf shift[Vecs], sum[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) shift[v] = load(shifts + v * kLanes), sum[v] = zero();
  const Vf f = set1(unit);
  auto one = [&](int64_t j, int v) __attribute__((always_inline)) {
    Vf p = exp2_of<kDegree>(mul(sub(load(s + j * kPitch + v * kLanes), shift[v]), f));
    sum[v] = add(sum[v], p);
    if constexpr (Dropped) p = scores.keep(lanes, column + j, v * kLanes, p);
    return p;
  };
#if BITFUSE_PAIRS
  if constexpr (Dot::kDepth == 2) {
    int64_t j = 0;
    for (; j + 2 <= count; j += 2)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) {
        const Vf low = one(j, v), high = one(j + 1, v);
        store_dwords(s + j / 2 * kPitch + v * kLanes, Dot::words(low, high));
      }
    if (j < count)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v)
        store_dwords(s + j / 2 * kPitch + v * kLanes, Dot::words(one(j, v), zero()));
  } else
#endif
    for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) store(s + j * kPitch + v * kLanes, one(j, v));
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) store(sums + v * kLanes, add(load(sums + v * kLanes), sum[v]));
}

// most = the larger of most and the block's; rescale = 2^(unit (most before - most)), of what sums holds too;
// shifts: most, 0 where nothing was seen yet.
template <int Vecs>
void raise(const float* s, int64_t count, float unit, float* most, float* sums, float* rescale,
           float* shifts) {
  constexpr int kPitch = Vecs * kLanes;
  Vf top[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) top[v] = set1(-kInfinity);
  for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) top[v] = maximum(load(s + j * kPitch + v * kLanes), top[v]);
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v) {
    const int at = v * kLanes;
    const Vf before = load(most + at), after = maximum(top[v], before);
    const Vf shift = by_sign(sub(after, set1(kLowest)), after, zero());
    const Vf scale = exp2_of<6>(mul(sub(before, shift), set1(unit)));
    store(most + at, after);
    store(shifts + at, shift);
    store(rescale + at, scale);
    store(sums + at, mul(load(sums + at), scale));
  }
}

template <class Dot, class Elements>
class Forward {
  using Type = typename Elements::Type;

 public:
  explicit Forward(const AttentionArgs& call)
      : call_(call),
        scores_(call),
        unit_(in_powers_of_two(scores_.factor())),
        words_(ceil_div(call.dim, Dot::kDepth)),
        k_pitch_(natural_pitch<Dot>(call.dim)),
        v_pitch_(turned_pitch(call.dim_v)) {
    const int64_t key_bytes = k_pitch_ * 4 + v_pitch_ * 4 / Dot::kDepth;
    chunk_ = most(1, kChunkBytes / key_bytes / kBlockKeys) * kBlockKeys;
    panel_size_ = words_ * kWidth;
    out_size_ = v_pitch_ * kWidth;
  }

  // Scratch: on each thread at most kChunkBytes and kGroupBytes, or a block of keys and a tile where those
  // are more; S^T; 40 bytes a task.
  void run() {
    int64_t multiply_adds = 0, tiles = 0, longest = 0;
    for (int64_t b = 0; b < call_.batch; ++b) {
      const AttentionSequence& s = call_.sequences[b];
      const int64_t rows = s.q_length * scores_.group();
      tiles += ceil_div(rows, kWidth) * call_.kv_heads;
      longest = most(longest, ceil_div(rows, kWidth));
      multiply_adds += rows * (s.k_length + call_.prefix) * (call_.dim + call_.dim_v) * call_.kv_heads;
    }
    if (tiles == 0) return;
    const int wanted = int(least(threads_for(multiply_adds), tiles));
    // four groups a thread balance well enough
    group_ = least(longest, most(1, kGroupBytes / ((panel_size_ + out_size_) * 4)));
    group_ = least(group_, ceil_div(tiles, int64_t(wanted) * 4));
    int64_t count = 0;
    for (int64_t b = 0; b < call_.batch; ++b) count += groups(call_.sequences[b]) * call_.kv_heads;
    const int threads = int(least(wanted, count));

    Task* tasks;
    Space* spaces;
    auto carve = [&](Carver& carver) {
      tasks = carver.take<Task>(count);
      spaces = carver.take<Space>(threads);
      for (int t = 0; t < threads; ++t) {
        Space space;
        space.states = carver.take<State>(group_);
        space.panels = carver.take<uint32_t>(group_ * panel_size_);
        space.outs = carver.take<float>(group_ * out_size_);
        space.natural = carver.take<uint32_t>(kWidth * k_pitch_);
        space.k = carver.take<uint32_t>(chunk_ * k_pitch_);
        space.v = carver.take<uint32_t>(chunk_ / Dot::kDepth * v_pitch_);
        space.s = carver.take<float>(kBlockKeys * kWidth);
        if (spaces) spaces[t] = space;
      }
    };
    Carver need;
    carve(need);
    Carver carver(scratch(need.used()));
    carve(carver);

    Task* task = tasks;
    for (int64_t b = 0; b < call_.batch; ++b)
      for (int64_t h = 0; h < call_.kv_heads; ++h)
        for (int64_t g = groups(call_.sequences[b]); g-- > 0;) *task++ = {b, h, g};

    int64_t next = 0;
    parallel(threads, [&](int thread, int) {
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;)
        work(tasks[i], spaces[thread]);
    });
  }

 private:
  struct Task {
    int64_t batch, kv_head, group;
  };
  struct Space {
    State* states;
    uint32_t *panels, *natural, *k, *v;
    float *outs, *s;
  };

  int64_t groups(const AttentionSequence& s) const {
    return ceil_div(ceil_div(s.q_length * scores_.group(), kWidth), group_);
  }

  void work(const Task& task, const Space& my) const {
    const AttentionSequence& s = call_.sequences[task.batch];
    const int64_t group = scores_.group(), rows = s.q_length * group, tiles = ceil_div(rows, kWidth);
    const Range mine = share(tiles, task.group, groups(s));
    const int64_t of_q = call_.packed ? 0 : task.batch;
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      State& state = my.states[t - mine.begin];
      const int64_t row = t * kWidth, count = least(kWidth, rows - row);
      scores_.set_lanes(task.batch, task.kv_head, s, row, count, state.lanes);
      for (int lane = 0; lane < state.lanes.vecs * kLanes; ++lane) {
        state.most[lane] = scores_.most_of(state.lanes.head[lane]);
        state.sums[lane] = state.most[lane] == -kInfinity ? 0 : 1;
      }
      state.begun = false;
      auto query = [&](int64_t r) {
        return row_of<Type>(call_.q, of_q, state.lanes.query[r], state.lanes.head[r]);
      };
      pack_natural<Dot, Elements>(query, count, call_.dim, my.natural);
      turn(my.natural, count, k_pitch_, words_, state.lanes.vecs, my.panels + (t - mine.begin) * panel_size_);
    }
    if (call_.prefix)
      segment(s, my, mine.end - mine.begin, {0, call_.prefix}, false, task.kv_head, task.batch, 0,
              call_.prefix_k, call_.prefix_v);
    const Lanes &first = my.states[0].lanes, &last = my.states[mine.end - mine.begin - 1].lanes;
    segment(s, my, mine.end - mine.begin, scores_.visible(s, first.first, last.last), true, task.kv_head,
            of_q, s.k_begin, call_.k, call_.v);
    for (int64_t t = mine.begin; t < mine.end; ++t)
      finish(my.states[t - mine.begin], my.outs + (t - mine.begin) * out_size_, of_q);
  }

  // Keys `keys` of the prefix or of the sequence, chunk by chunk.
  void segment(const AttentionSequence& s, const Space& my, int64_t tiles, Range keys, bool own, int64_t head,
               int64_t batch, int64_t k_begin, const HeadRows& k, const HeadRows& v) const {
    for (int64_t c = keys.begin / chunk_ * chunk_; c < keys.end; c += chunk_) {
      const Range chunk{most(c, keys.begin), least(c + chunk_, keys.end)};
      const int64_t count = chunk.end - chunk.begin, from = k_begin + chunk.begin;
      pack_natural<Dot, Elements>([&](int64_t j) { return row_of<Type>(k, batch, from + j, head); }, count,
                                  call_.dim, my.k);
      pack_turned<Dot, Elements>([&](int64_t j) { return row_of<Type>(v, batch, from + j, head); }, count,
                                 call_.dim_v, 0, v_pitch_, my.v);
      for (int64_t t = 0; t < tiles; ++t) {
        State& state = my.states[t];
        const Range seen = own ? scores_.visible(s, state.lanes.first, state.lanes.last) : keys;
        const int64_t end = least(chunk.end, seen.end);
        for (int64_t j = most(chunk.begin, seen.begin); j < end; j += kBlockKeys) {
          const Block block{j, least(kBlockKeys, end - j), own};
          if (!scores_.seen(state.lanes, block)) continue;
          update(s, state, block, my.panels + t * panel_size_, my.k + (j - chunk.begin) * k_pitch_,
                 my.v + (j - chunk.begin) / Dot::kDepth * v_pitch_, my.s, my.outs + t * out_size_);
        }
      }
    }
  }

  void update(const AttentionSequence& s, State& state, const Block& block, const uint32_t* panel,
              const uint32_t* k, const uint32_t* v, float* products, float* out) const {
    alignas(64) float rescale[kWidth], shifts[kWidth];
    const Lanes& lanes = state.lanes;
    const int64_t pitch = lanes.vecs * kLanes, count = block.count;
    product<Dot, false>(k, k_pitch_, round_up(count, 2), panel, lanes.vecs, words_, products, pitch,
                        Into::kSet);
    scores_.adjust(s, lanes, block, products, nullptr);
    with_vecs(lanes.vecs, [&](auto fixed) {
      constexpr int Vecs = decltype(fixed)::value;
      raise<Vecs>(products, count, unit_, state.most, state.sums, rescale, shifts);
      if (scores_.dropout()) {
        exponentiate<Dot, Vecs, true>(scores_, lanes, count, scores_.column(block), unit_, shifts, products,
                                      state.sums);
      } else {
        exponentiate<Dot, Vecs, false>(scores_, lanes, count, 0, unit_, shifts, products, state.sums);
      }
    });
    product<Dot, true>(v, v_pitch_, round_up(call_.dim_v, 2), reinterpret_cast<const uint32_t*>(products),
                       lanes.vecs, ceil_div(count, Dot::kDepth), out, pitch,
                       state.begun ? Into::kRescale : Into::kSet, rescale);
    state.begun = true;
  }

  void finish(State& state, float* out, int64_t batch) const {
    const Lanes& lanes = state.lanes;
    alignas(64) float inverse[kWidth];
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const float sum = state.sums[lane];
      inverse[lane] = sum != 0 ? scores_.keep_scale() / sum : 0;
      call_.lse[lanes.place[lane]] =
          sum != 0 ? float(double(state.most[lane]) * double(scores_.factor()) + __builtin_log(double(sum)))
                   : -kInfinity;
    }
    if (!state.begun) std::memset(out, 0, size_t(out_size_) * 4);
    write_turned<Elements>(out, call_.dim_v, lanes.count, lanes.vecs, inverse, [&](int64_t r) {
      const int64_t row = batch * call_.rows + lanes.query[r];
      return static_cast<Type*>(call_.out) + (row * call_.heads + lanes.head[r]) * call_.dim_v;
    });
  }

  const AttentionArgs& call_;
  Scores scores_;
  float unit_;  // a score in powers of two
  int64_t words_, k_pitch_, v_pitch_, chunk_, panel_size_, out_size_, group_ = 1;
};

}  // namespace

void attention(const AttentionArgs& call) {
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16) return Forward<Pairs, Bfloats>(call).run();
#endif
  with_elements(call.dtype, [&](auto elements) { Forward<Singles, decltype(elements)>(call).run(); });
}

}  // namespace bitfuse::BITFUSE_ISA
