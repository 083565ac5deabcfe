// Rejection sampling along a tree of draft tokens; a chain is a tree without siblings. Which node is refused
// first takes two probabilities a node; a refusal takes the whole rows of q and p there, read once for each
// refused sibling: bound by those bytes.
//
// The weights that a node's next token has after its children were refused are integers, 42 bits of each
// probability, so that blocks of the vocabulary can be summed by any thread in any order. They are not kept:
// a block of them is made from the rows of q and p whenever it is asked for, in L1. A call of few sequences
// shares out a row's blocks among the threads, one of many the sequences.
// python/bitfuse/ops/sampling/speculative_sample_tree.py is the formula.
#include "cpu/sampling/speculative_sample.h"

#include "cpu/core/elements.h"
#include "cpu/core/threads.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kBlock = 2048;
constexpr float kOne = 4398046511104.f;  // 2^42

const void* row(const ProbabilityRows& rows, int64_t b, int64_t i, int64_t column) {
  const int64_t at = b * rows.batch_stride + i * rows.stride + column;
  return static_cast<const char*>(rows.data) + at * (rows.dtype == Dtype::kFloat32 ? 4 : 2);
}

double probability(const ProbabilityRows& rows, int64_t b, int64_t i, int64_t column) {
  float value;
  to_float(row(rows, b, i, column), rows.dtype, &value, 1);
  return value;
}

BITFUSE_INLINE int64_t fixed(float x) {
  x = x > 0 ? x : 0.f;
  x = x < 1 ? x : 1.f;
  return int64_t(x * kOne);
}

BITFUSE_INLINE double clamped(double uniform) { return uniform > 0 ? (uniform < 1 ? uniform : 1.0) : 0.0; }

// A refused child: its token, the row that it was drawn from, and what brings the weights before it to that
// row's sum.
struct Refusal {
  int64_t id, row;
  double ratio;
};

// One sequence: where its walk stands.
struct Walk {
  const SpeculativeSampleArgs& call;
  int64_t b, blocks;
  int threads;
  Refusal* refused;  // [nodes]: of the children of `node`
  int64_t* sums;     // [blocks]
  int64_t node = -1, refusals = 0;

  // The weights of up to kBlock tokens from `column`; returns their sum.
  int64_t weigh(int64_t column, int64_t count, int64_t* weights) const {
    alignas(64) float q[kBlock], p[kBlock];
    to_float(row(call.target, b, node + 1, column), call.target.dtype, q, count);
    for (int64_t r = 0; r < refusals; ++r) {
      to_float(row(call.draft, b, refused[r].row, column), call.draft.dtype, p, count);
      if (r == 0) {
        for (int64_t i = 0; i < count; ++i) weights[i] = fixed(q[i] - p[i]);
      } else {
        const double ratio = refused[r].ratio;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t left = int64_t(double(weights[i]) * ratio) - fixed(p[i]);
          weights[i] = left > 0 ? left : 0;
        }
      }
    }
    if (!refusals)
      for (int64_t i = 0; i < count; ++i) weights[i] = fixed(q[i]);
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    return sum;
  }

  int64_t width(int64_t block) const { return least(kBlock, call.vocabulary - block * kBlock); }

  // f(first column, columns) of every block, summed; each block's is left in `sums`.
  template <class F>
  int64_t sum(F f) const {
    parallel(threads, [&](int thread, int team) {
      const Range own = share(blocks, thread, team);
      for (int64_t i = own.begin; i < own.end; ++i) sums[i] = f(i * kBlock, width(i));
    });
    int64_t total = 0;
    for (int64_t i = 0; i < blocks; ++i) total += sums[i];
    return total;
  }

  int64_t sum_weights() const {
    return sum([&](int64_t column, int64_t count) {
      alignas(64) int64_t weights[kBlock];
      return weigh(column, count, weights);
    });
  }

  int64_t sum_draft(int64_t i) const {
    return sum([&](int64_t column, int64_t count) {
      alignas(64) float p[kBlock];
      to_float(row(call.draft, b, i, column), call.draft.dtype, p, count);
      int64_t total = 0;
      for (int64_t j = 0; j < count; ++j) total += fixed(p[j]);
      return total;
    });
  }

  // The token that `uniform` falls into; `sums` are the weights', `total` theirs.
  int64_t draw(double uniform, int64_t total) const {
    if (!total) return 0;
    int64_t rest = least(int64_t(clamped(uniform) * double(total)), total - 1);
    int64_t block = 0;
    while (rest >= sums[block]) rest -= sums[block++];
    alignas(64) int64_t weights[kBlock];
    weigh(block * kBlock, width(block), weights);
    int64_t i = 0;
    while (rest >= weights[i]) rest -= weights[i++];
    return block * kBlock + i;
  }

  void run() {
    const int64_t nodes = call.nodes;
    const int64_t* drawn = call.draft_ids + b * nodes;
    const double* uniforms = call.uniforms + b * (nodes + 1);
    int64_t* ids = call.ids + b * (nodes + 1);
    int64_t* path = call.path ? call.path + b * nodes : nullptr;
    int64_t accepted = 0, total = 0, draft_row = -1, draft_total = 0;
    bool summed = false;  // `sums` are those of the weights
    bool open = true;     // something is left for another child
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t id = drawn[i], at = call.draft_rows ? call.draft_rows[b * nodes + i] : i;
      const int64_t parent = call.parents ? call.parents[b * nodes + i] : i - 1;
      if (!open || parent != node || id < 0 || id >= call.vocabulary || at < 0 || at >= call.rows) continue;
      const double uniform = clamped(uniforms[i]), p = probability(call.draft, b, at, id);
      bool kept;
      double ratio = 1;
      if (!refusals) {
        kept = uniform * p < probability(call.target, b, node + 1, id);
      } else {
        if (at != draft_row) draft_total = sum_draft(draft_row = at);
        int64_t rest = draft_total;
        for (int64_t r = 0; r < refusals && !call.replacement; ++r)
          rest -= fixed(float(probability(call.draft, b, at, refused[r].id)));
        rest = most(rest, 0);
        int64_t weight;
        weigh(id, 1, &weight);
        kept = uniform * (double(fixed(float(p))) * double(total)) < double(weight) * double(rest);
        ratio = double(rest) / double(total);
      }
      if (kept) {
        node = i;
        refusals = 0;
        summed = false;
        if (path) path[accepted] = i;
        ids[accepted++] = id;
        continue;
      }
      refused[refusals++] = {id, at, ratio};
      const int64_t left = sum_weights();
      summed = open = left > 0;
      if (open)
        total = left;
      else  // q <= p everywhere, which rounded rows can come to
        --refusals;
    }
    if (!summed) total = sum_weights();
    ids[accepted] = draw(uniforms[nodes], total);
    call.accepted[b] = accepted;
    for (int64_t i = accepted + 1; i <= nodes; ++i) ids[i] = -1;
    for (int64_t i = accepted; path && i < nodes; ++i) path[i] = -1;
  }
};

}  // namespace

void speculative_sample(const SpeculativeSampleArgs& call) {
  const int64_t blocks = (call.vocabulary + kBlock - 1) / kBlock;
  // some eight multiply-adds' time a token
  const int all = threads_for(call.batch * call.vocabulary * 8);
  const int outer = call.batch < 2 * all ? 1 : all;
  Refusal* refused = nullptr;
  int64_t* sums = nullptr;
  auto carve = [&](Carver carver) {
    refused = carver.take<Refusal>(outer * call.nodes);
    sums = carver.take<int64_t>(outer * blocks);
    return carver.used();
  };
  carve(Carver(scratch(carve(Carver()))));
  parallel(outer, [&](int thread, int team) {
    const Range own = share(call.batch, thread, team);
    for (int64_t b = own.begin; b < own.end; ++b)
      Walk{call, b, blocks, outer > 1 ? 1 : all, refused + thread * call.nodes, sums + thread * blocks}.run();
  });
}

}  // namespace bitfuse::BITFUSE_ISA
