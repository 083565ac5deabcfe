// decode_attention on the CPU: a few queries of each sequence against its cache.
//
// A task is a span of one sequence's keys and a block of its queries, with all heads: the cache is
// [token][head][dim], so that a span is one stretch of memory (of a page). decode_span.h walks it. The tail of
// a sequence, in full precision, is a task of its own.
//
// Spans are cut by shapes alone (kTasks of them if they are not too short), their outputs are kept in float
// and merged in order: no bit depends on the threads.
#include <cmath>

#include "cpu/attention/decode_scores.h"
#include "cpu/attention/decode_values.h"
#include "cpu/attention/kv_cache.h"
#include "cpu/attention/merge_attention.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kTasks = 16;  // spans that a call is cut into, unless they were shorter than kLeastSpan
constexpr int64_t kLeastSpan = 2 * kUnit;
constexpr int64_t kStateBytes = 256 << 10;  // of a block's outputs, which bounds its queries

// f(reader) with the reader of rows as floats of `dtype`, or as codes.
template <class F>
void with_dense(Dtype dtype, F f) {
#if BITFUSE_PAIRS
  if (dtype == Dtype::kBfloat16) return f(DensePairs{});
#endif
  with_elements(dtype, [&](auto elements) { f(DenseFloats<decltype(elements)>{}); });
}

template <class F>
void with_reader(CacheFormat format, Dtype dtype, F f) {
#if BITFUSE_PAIRS
  if (format == CacheFormat::kFp8 && dtype == Dtype::kBfloat16) return f(Fp8Pairs{});
  // 16 bits of a query are more than float16 has
  if (format == CacheFormat::kInt8 && dtype != Dtype::kFloat32) return f(CodeWords<8>{});
  if (format == CacheFormat::kInt4 && dtype != Dtype::kFloat32) return f(CodeWords<4>{});
#endif
  switch (format) {
    case CacheFormat::kNone:
      return with_dense(dtype, f);
    case CacheFormat::kFp8:
      return f(CodeFloats<E4m3Code>{});
    case CacheFormat::kInt8:
      return f(CodeFloats<ByteCode<false>>{});
    case CacheFormat::kInt4:
      return f(CodeFloats<TableCode<4, false>>{});
  }
}

// A span of keys for a block of queries.
struct Task {
  int64_t batch, query, queries, begin, end;
  bool tail;
};

// Of one query and head: the outputs of `count` spans, `step` floats (and one state) apart, merged.
struct Part {
  const float* out;
  const RowState* state;
};

void merge_parts(const DecodeArgs& call, const Part* parts, int64_t count, int64_t head, int64_t row,
                 int64_t lse_at) {
  const KvCache& cache = call.cache;
  const float sink = call.sinks ? call.sinks[head] : -kInfinity;
  float most = sink;
  for (int64_t i = 0; i < count; ++i) most = parts[i].state->most > most ? parts[i].state->most : most;
  alignas(64) float out[kDim + kLanes] = {};
  float total = most == -kInfinity ? 0 : exp_of(sink - most);
  for (int64_t i = 0; i < count; ++i) {
    const RowState& state = *parts[i].state;
    // not !(> -inf): a sum that is NaN must be seen
    if (state.most == -kInfinity && state.sum == 0) continue;
    const float weight = exp_of(state.most - (most == -kInfinity ? 0 : most));
    total += weight * state.sum;
    for (int64_t c = 0; c < cache.dim_v; ++c) out[c] += weight * parts[i].out[c];
  }
  const bool none = total == 0;
  const float inverse = none ? 0 : 1 / total;
  for (int64_t c = 0; c < cache.dim_v; ++c) out[c] = none ? 0 : out[c] * inverse;
  from_float(out, element(call.out, cache.dtype, row * cache.dim_v), cache.dtype, cache.dim_v);
  call.lse[lse_at] = none ? -kInfinity : most + std::log(total);
}

}  // namespace

// Scratch: for each span its outputs in float, and of each thread the queries, outputs and scores of a block.
void decode_attention(const DecodeArgs& call) {
  const KvCache& cache = call.cache;
  if (cache.batch == 0 || call.queries == 0 || call.heads == 0) return;
  Plan plan;
  plan.group = call.heads / cache.kv_heads;
  plan.block = least(call.queries, most(1, kStateBytes / (call.heads * round_up(cache.dim_v, 64) * 4)));
  plan.rows = plan.block * plan.group;
  plan.row_slots = round_up(plan.rows, kTile);
  const int64_t blocks = (call.queries + plan.block - 1) / plan.block;
  const bool codes = has_codes(cache.format);

  // keys that some query of a block may see, on the grid of units; where codes end
  auto begin_of = [&](int64_t b, int64_t query) {
    const int64_t first = query + call.length(b) - call.queries;
    return call.left < 0 ? 0 : most(0, first - call.left) / kUnit * kUnit;
  };
  auto whole_of = [&](int64_t b) {
    return codes ? call.length(b) / cache.group_size * cache.group_size : call.length(b);
  };
  int64_t keys = 0, longest = 0;
  for (int64_t b = 0; b < cache.batch; ++b) {
    longest += call.length(b);
    for (int64_t i = 0; i < blocks; ++i) keys += most(0, whole_of(b) - begin_of(b, i * plan.block));
  }
  plan.span = round_up(most(kLeastSpan, (keys + kTasks - 1) / kTasks), kUnit);
  auto for_tasks = [&](auto f) {
    for (int64_t b = 0; b < cache.batch; ++b)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t query = i * plan.block, queries = least(plan.block, call.queries - query);
        const int64_t whole = whole_of(b), index = b * blocks + i;
        for (int64_t at = begin_of(b, query); at < whole; at += plan.span)
          f(index, Task{b, query, queries, at, least(whole, at + plan.span), false});
        if (whole < call.length(b)) f(index, Task{b, query, queries, whole, call.length(b), true});
      }
  };
  int64_t count = 0;
  for_tasks([&](int64_t, const Task&) { ++count; });
  const int64_t work = longest * call.heads * call.queries * (cache.dim + cache.dim_v);
  const int threads = int(least(threads_for(work), most(count, 1)));

  with_reader(cache.format, cache.dtype, [&](auto reader) {
    with_dense(cache.dtype, [&](auto dense) {
      using Main = Span<decltype(reader)>;
      using Tail = Span<decltype(dense)>;
      const int64_t rows = plan.block * call.heads, out_size = rows * cache.dim_v;
      Task* tasks;
      int64_t* starts;
      float* outs;
      RowState* states;
      typename Main::Space* spaces;
      typename Tail::Space* tails;
      auto carve = [&](Carver& carver) {
        tasks = carver.template take<Task>(count);
        starts = carver.template take<int64_t>(cache.batch * blocks + 1);
        outs = carver.template take<float>(count * out_size);
        states = carver.template take<RowState>(count * rows);
        spaces = carver.template take<typename Main::Space>(threads);
        tails = carver.template take<typename Tail::Space>(codes ? threads : 0);
        for (int t = 0; t < threads; ++t) {
          typename Main::Space space;
          Main::carve(carver, cache, plan, space);
          if (spaces) spaces[t] = space;
          if (!codes) continue;
          typename Tail::Space tail;
          Tail::carve(carver, cache, plan, tail);
          if (tails) tails[t] = tail;
        }
      };
      Carver need;
      carve(need);
      Carver carver(scratch(need.used()));
      carve(carver);
      int64_t made = 0;
      for (int64_t i = 0; i <= cache.batch * blocks; ++i) starts[i] = 0;
      for_tasks([&](int64_t index, const Task& task) {
        tasks[made++] = task;
        ++starts[index + 1];
      });
      for (int64_t i = 0; i < cache.batch * blocks; ++i) starts[i + 1] += starts[i];

      int64_t next = 0;
      parallel(threads, [&](int thread, int team) {
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) {
          const Task& t = tasks[i];
          float* out = outs + i * out_size;
          RowState* state = states + i * rows;
          if (t.tail) {
            Tail(call, plan, tails[thread], true)
                .run(t.batch, t.query, t.queries, t.begin, t.end, out, state);
          } else {
            Main(call, plan, spaces[thread], false)
                .run(t.batch, t.query, t.queries, t.begin, t.end, out, state);
          }
        }
        wait_for_team(team);
        const Range mine = share(cache.batch * call.queries * call.heads, thread, team);
        for (int64_t r = mine.begin; r < mine.end; ++r) {
          const int64_t head = r % call.heads, row = r / call.heads, b = row / call.queries;
          const int64_t query = row % call.queries, index = b * blocks + query / plan.block;
          const int64_t at = query % plan.block * call.heads + head;
          // as many as kTasks and some: a sequence's spans, and its tail
          Part parts[kTasks + 2];
          int64_t found = 0;
          for (int64_t i = starts[index]; i < starts[index + 1]; ++i)
            parts[found++] = {outs + i * out_size + at * cache.dim_v, states + i * rows + at};
          merge_parts(call, parts, found, head, r, (b * call.heads + head) * call.queries + query);
        }
      });
    });
  });
}

}  // namespace bitfuse::BITFUSE_ISA
