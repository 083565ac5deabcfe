// Chain rejection sampling. Which draft token is refused first takes two probabilities a token; the token in
// its place takes the whole rows of q and p there, read once: bound by those bytes.
//
// Weights are integers, max(q - p, 0) cut off after 42 bits, so that blocks of the vocabulary can be summed
// by any thread in any order: task (b, block) sums kBlock tokens, then each row walks its block sums to the
// one that the uniform falls into, and only that block is made again.
// python/bitfuse/ops/speculative_sample.py says why.
#include "speculative_sample.h"

#include "matmul.h"

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

// What the last token of a sequence is drawn from.
struct Last {
  int64_t place;  // the row of the target
  bool residual;  // less the draft's row there
};

// The weights of up to kBlock tokens from `column`; returns their sum.
int64_t weigh(const SpeculativeCall& call, int64_t b, Last last, int64_t column, int64_t count,
              int64_t* weights) {
  alignas(64) float q[kBlock], p[kBlock];
  to_float(row(call.target, b, last.place, column), call.target.dtype, q, count);
  if (last.residual) {
    to_float(row(call.draft, b, last.place, column), call.draft.dtype, p, count);
    for (int64_t i = 0; i < count; ++i) q[i] -= p[i];
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    float x = q[i] > 0 ? q[i] : 0.f;
    x = x < 1 ? x : 1.f;
    weights[i] = int64_t(x * kOne);
    sum += weights[i];
  }
  return sum;
}

// The token that the last uniform falls into; `sums` are the blocks' and `total` is theirs.
int64_t draw(const SpeculativeCall& call, int64_t b, Last last, const int64_t* sums, int64_t total) {
  if (!total) return 0;
  const double uniform = call.uniforms[b * (call.drafted + 1) + call.drafted];
  const double at = uniform > 0 ? (uniform < 1 ? uniform : 1.0) * double(total) : 0.0;
  int64_t rest = least(int64_t(at), total - 1);
  int64_t block = 0;
  while (rest >= sums[block]) rest -= sums[block++];
  alignas(64) int64_t weights[kBlock];
  weigh(call, b, last, block * kBlock, least(kBlock, call.vocabulary - block * kBlock), weights);
  int64_t i = 0;
  while (rest >= weights[i]) rest -= weights[i++];
  return block * kBlock + i;
}

}  // namespace

void speculative_sample(const SpeculativeCall& call) {
  const int64_t blocks = (call.vocabulary + kBlock - 1) / kBlock;
  Last* lasts = nullptr;
  int64_t* sums = nullptr;
  auto carve = [&](Carver carver) {
    lasts = carver.take<Last>(call.batch);
    sums = carver.take<int64_t>(call.batch * blocks);
    return carver.used();
  };
  carve(Carver(scratch(carve(Carver()))));
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t* drawn = call.draft_ids + b * call.drafted;
    int64_t* ids = call.ids + b * (call.drafted + 1);
    Last last{0, false};
    for (; last.place < call.drafted; ++last.place) {
      const int64_t i = last.place, id = drawn[i];
      if (id < 0 || id >= call.vocabulary) break;
      const double uniform = call.uniforms[b * (call.drafted + 1) + i];
      if (!(uniform * probability(call.draft, b, i, id) < probability(call.target, b, i, id))) {
        last.residual = true;
        break;
      }
      ids[i] = id;
    }
    lasts[b] = last;
    call.accepted[b] = last.place;
    for (int64_t i = last.place; i <= call.drafted; ++i) ids[i] = -1;
  }
  // some eight multiply-adds' time a token
  parallel(threads_for(call.batch * call.vocabulary * 8), [&](int thread, int team) {
    alignas(64) int64_t weights[kBlock];
    const Range tasks = share(call.batch * blocks, thread, team);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t b = task / blocks, column = task % blocks * kBlock;
      sums[task] = weigh(call, b, lasts[b], column, least(kBlock, call.vocabulary - column), weights);
    }
  });
  for (int64_t b = 0; b < call.batch; ++b) {
    int64_t* own = sums + b * blocks;
    int64_t total = 0;
    for (int64_t i = 0; i < blocks; ++i) total += own[i];
    if (!total && lasts[b].residual) {
      // q <= p everywhere, which rounded rows can come to
      lasts[b].residual = false;
      alignas(64) int64_t weights[kBlock];
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t column = i * kBlock;
        total += own[i] = weigh(call, b, lasts[b], column, least(kBlock, call.vocabulary - column), weights);
      }
    }
    call.ids[b * (call.drafted + 1) + lasts[b].place] = draw(call, b, lasts[b], own, total);
  }
}

}  // namespace bitfuse::BITFUSE_ISA
