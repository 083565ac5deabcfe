// One token a row of logits. A row is read once, for its floats and their maximum; a second pass over the
// floats makes the weights, in the order of the ids, and lists what is within 2^-40 of the most likely. Bound
// by that pass's arithmetic, some 25 operations a token in double.
//
// The kept tokens are those up to a cut in the order (logit descending, id ascending). While weights are
// made, they are counted and summed by their distance from the most likely token, in kBins bins; what lies in
// bins past the cut's is dropped, which leaves a few thousand of a language model's tokens. Among those the
// cut is found by selection, not by sorting: top-k is one nth_element, top-p halves a range of candidates by
// nth_element until one is left, summing each half's integer weights: 2 n steps in all. A thread takes a row.
#include "cpu/sampling/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/core/elements.h"
#include "cpu/core/threads.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr double kOne = 1099511627776.;  // 2^40
constexpr double kReach = -28;           // exp of it is below 1 / kOne
constexpr int kBins = 64;
constexpr int64_t kRun = 512;  // tokens whose weights are made at a time

struct Candidate {
  float logit;
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// What a thread works in: [vocabulary] each.
struct Room {
  float* logits;
  int64_t* weights;
  Candidate *candidates, *order;
};

// exp(x) for x from kReach to 0, to its last place or so; without a call or a branch, so that lanes share it.
BITFUSE_INLINE double exponential(double x) {
  // added to a small number, it leaves the nearest integer in the lowest bits
  constexpr double kInteger = 6755399441055744.;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + kInteger, n = shifted - kInteger;
  // ln 2 in two parts: n times the first is exact
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1. / 6227020800;
  p = p * r + 1. / 479001600;
  p = p * r + 1. / 39916800;
  p = p * r + 1. / 3628800;
  p = p * r + 1. / 362880;
  p = p * r + 1. / 40320;
  p = p * r + 1. / 5040;
  p = p * r + 1. / 720;
  p = p * r + 1. / 120;
  p = p * r + 1. / 24;
  p = p * r + 1. / 6;
  p = p * r + 0.5;
  p = p * r + 1;
  p = p * r + 1;
  return std::bit_cast<double>(std::bit_cast<int64_t>(p) + (std::bit_cast<int64_t>(shifted) << 52));
}

// The bin of a logit that lies `over` above the largest, 0 to kReach: in the order of the logits.
BITFUSE_INLINE int bin(double over) { return int(over * ((kBins - 1) / kReach)); }

BITFUSE_INLINE int64_t share_of(double top_p, int64_t total) {
  return top_p < 1 ? most(int64_t((top_p > 0 ? top_p : 0.0) * double(total)), 1) : total;
}

// The last of `count` candidates, most likely first, that is kept: of the first top_k, which are all or some
// of them, what top_p keeps of their weight; with top_k 0 a weight of `needed`.
Candidate cut(const Room& room, int64_t count, int64_t top_k, double top_p, int64_t needed) {
  Candidate* order = room.order;
  std::copy(room.candidates, room.candidates + count, order);
  if (top_k > 0) {
    if (top_k < count) std::nth_element(order, order + (top_k - 1), order + count, before);
    count = top_k;
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += room.weights[order[i].id];
    needed = share_of(top_p, total);
  }
  int64_t low = 0, high = count, mass = 0;  // mass: of what lies before low
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(order + low, order + middle, order + high, before);
    int64_t half = 0;
    for (int64_t i = low; i < middle; ++i) half += room.weights[order[i].id];
    if (mass + half >= needed) {
      high = middle;
    } else {
      mass += half;
      low = middle;
    }
  }
  return order[low];
}

int64_t sample_row(const SampleArgs& call, int64_t row, const Room& room) {
  const int64_t size = call.dtype == Dtype::kFloat32 ? 4 : 2;
  to_float(static_cast<const char*>(call.logits) + row * call.stride * size, call.dtype, room.logits,
           call.vocabulary);
  int32_t likeliest = 0;
  for (int64_t i = 0; i < call.vocabulary; ++i) {
    float& z = room.logits[i];
    if (z != z) z = -INFINITY;
    if (z > room.logits[likeliest]) likeliest = int32_t(i);
  }
  const double top = room.logits[likeliest], temperature = call.temperature[row];
  const double min_p = call.min_p[row] <= 1 ? call.min_p[row] : 1.0;
  if (!(temperature > 0)) return likeliest;
  const int64_t top_k = call.top_k[row];
  const double top_p = call.top_p[row];
  const auto over = [&](double z) { return z == top ? 0.0 : (z - top) / temperature; };
  int64_t counts[kBins] = {}, masses[kBins] = {}, count = 0, mass = 0;
  for (int64_t first = 0; first < call.vocabulary; first += kRun) {
    const int64_t tokens = least(kRun, call.vocabulary - first);
    const float* logits = room.logits + first;
    int64_t* weights = room.weights + first;
    alignas(64) double distance[kRun];
    for (int64_t i = 0; i < tokens; ++i) {
      const double far = over(logits[i]);
      distance[i] = far > kReach ? far : kReach;  // whose weight is 0; NaN too
    }
    for (int64_t i = 0; i < tokens; ++i) {
      const double weight = exponential(distance[i]);
      weights[i] = weight >= min_p ? int64_t(weight * kOne) : 0;
    }
    for (int64_t i = 0; i < tokens; ++i) {
      if (!weights[i]) continue;
      room.candidates[count++] = {logits[i], int32_t(first + i)};
      ++counts[bin(distance[i])];
      masses[bin(distance[i])] += weights[i];
      mass += weights[i];
    }
  }
  const bool some = top_k > 0 && top_k < count;
  if (some || top_p < 1) {
    const int64_t needed = share_of(top_p, mass);
    int last = 0;
    for (int64_t tokens = counts[0], sum = masses[0];
         last < kBins - 1 && (some ? tokens < top_k : sum < needed);) {
      ++last;
      tokens += counts[last];
      sum += masses[last];
    }
    const auto drop = [&](auto past) {
      count = std::remove_if(room.candidates, room.candidates + count, past) - room.candidates;
    };
    drop([&](const Candidate& c) { return bin(over(c.logit)) > last; });
    const Candidate least_likely = cut(room, count, some ? top_k : 0, top_p, needed);
    drop([&](const Candidate& c) { return before(least_likely, c); });
  }
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += room.weights[room.candidates[i].id];
  const double uniform = call.uniforms[row];
  const double at = uniform > 0 ? (uniform < 1 ? uniform : 1.0) * double(total) : 0.0;
  int64_t rest = least(int64_t(at), total - 1), i = 0;
  while (rest >= room.weights[room.candidates[i].id]) rest -= room.weights[room.candidates[i++].id];
  return room.candidates[i].id;
}

}  // namespace

void sample(const SampleArgs& call) {
  const int threads = int(least(threads_for(call.rows * call.vocabulary * 16), call.rows));
  auto carve = [&](Carver& carver) {
    return Room{carver.take<float>(call.vocabulary), carver.take<int64_t>(call.vocabulary),
                carver.take<Candidate>(call.vocabulary), carver.take<Candidate>(call.vocabulary)};
  };
  Carver need;
  carve(need);
  char* block = scratch(need.used() * size_t(threads));
  parallel(threads, [&](int thread, int team) {
    Carver carver(block + need.used() * size_t(thread));
    const Room room = carve(carver);
    const Range rows = share(call.rows, thread, team);
    for (int64_t row = rows.begin; row < rows.end; ++row) call.ids[row] = sample_row(call, row, room);
  });
}

}  // namespace bitfuse::BITFUSE_ISA
