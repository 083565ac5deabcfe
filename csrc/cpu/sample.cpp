// One token a row of logits. A row is read once, for its floats and their maximum; a second pass over the
// floats makes the weights of what is within 2^-40 of the most likely, in the order of the ids. Bound by that
// pass's exponentials, in double, of the tokens that are within reach.
//
// The kept tokens are those up to a cut in the order (logit descending, id ascending). While weights are
// made, they are counted and summed by their distance from the most likely token, in kBins bins; what lies in
// bins past the cut's is dropped, which leaves a few thousand of a language model's tokens. Among those the
// cut is found by selection, not by sorting: top-k is one nth_element, top-p halves a range of candidates by
// nth_element until one is left, summing each half's integer weights: 2 n steps in all. A thread takes a row.
#include "sample.h"

#include <algorithm>
#include <cmath>

#include "matmul.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr double kOne = 1099511627776.;  // 2^40
constexpr double kReach = -28;           // exp of it is below 1 / kOne
constexpr int kBins = 64;

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

// The bin of a logit that lies `over` above the largest, 0 to kReach: in the order of the logits.
BITFUSE_INLINE int bin(double over) { return int(over * ((kBins - 1) / kReach)); }

BITFUSE_INLINE int64_t share_of(double top_p, int64_t total) {
  return top_p < 1 ? most(int64_t((top_p > 0 ? top_p : 0.0) * double(total)), 1) : total;
}

// The last of `count` candidates, most likely first, that is kept; `needed` is the weight that is, where
// there are no more than top_k of them.
Candidate cut(const Room& room, int64_t count, int64_t top_k, double top_p, int64_t needed) {
  Candidate* order = room.order;
  std::copy(room.candidates, room.candidates + count, order);
  if (top_k > 0 && top_k < count) {
    std::nth_element(order, order + (top_k - 1), order + count, before);
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

int64_t sample_row(const SampleCall& call, int64_t row, const Room& room) {
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
  for (int64_t i = 0; i < call.vocabulary; ++i) {
    const double distance = over(room.logits[i]);
    if (!(distance > kReach)) continue;
    const double weight = std::exp(distance);
    const int64_t fixed = int64_t(weight * kOne);
    if (!(weight >= min_p) || !fixed) continue;
    room.weights[i] = fixed;
    room.candidates[count++] = {room.logits[i], int32_t(i)};
    ++counts[bin(distance)];
    masses[bin(distance)] += fixed;
    mass += fixed;
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
    const Candidate least_likely = cut(room, count, top_k, top_p, needed);
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

void sample(const SampleCall& call) {
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
