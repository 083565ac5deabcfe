// merge_attention on the CPU: two sets of keys' outputs of the same queries, weighed by their shares of the sum.
// Bound by bytes.
#include "cpu/attention/merge_attention.h"

#include <cmath>

#include "cpu/attention/attention_scores.h"
#include "cpu/attention/kv_cache.h"

namespace bitfuse::BITFUSE_ISA {

void merge_attention(const MergeArgs& call) {
  const int64_t rows = call.batch * call.queries * call.heads;
  if (rows == 0) return;
  const int threads = int(least(threads_for(rows * (call.dim + 8) * 4), rows));
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(rows, thread, team);
    alignas(64) float a[kLanes * 4], b[kLanes * 4];
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t head = r % call.heads, row = r / call.heads, batch = row / call.queries;
      const int64_t at = (batch * call.heads + head) * call.queries + row % call.queries;
      const float x = call.lse1[at], y = call.lse2[at], most = x > y ? x : y;
      const float shift = most == -kInfinity ? 0 : most;
      const float u = exp_of(x - shift), v = exp_of(y - shift), total = u + v;
      const bool none = most == -kInfinity && !(total != 0);
      const float first = none ? 0 : u / total, second = none ? 0 : v / total;
      call.lse[at] = none ? -kInfinity : most + std::log(total);
      for (int64_t c = 0; c < call.dim; c += kLanes * 4) {
        const int64_t part = least(kLanes * 4, call.dim - c), from = r * call.dim + c;
        // what a set without keys has as output is not looked at: it may never have been written
        std::fill(a, a + part, 0.0f);
        std::fill(b, b + part, 0.0f);
        if (x != -kInfinity) to_float(element(call.o1, call.dtype, from), call.dtype, a, part);
        if (y != -kInfinity) to_float(element(call.o2, call.dtype, from), call.dtype, b, part);
        for (int64_t i = 0; i < part; ++i) a[i] = first * a[i] + second * b[i];
        from_float(a, element(call.out, call.dtype, from), call.dtype, part);
      }
    }
  });
}

}  // namespace bitfuse::BITFUSE_ISA
