// rms_norm and layer_norm, with a residual added before, and their gradients: all that a row needs in one
// visit, float32 between.
//
// Bytes an element, of 16 bits: 4 forward, 8 with a residual (two read, two written); gradients 6 (s and grad
// in, dx out), 8 with a gradient of s. A row is gone through two times, three where its mean is taken off
// first, and only the first time comes from memory: a row of 16,384 bfloat16 is 32 KB, as much as the nearest
// cache. What bounds it is memory from some two threads on, before that the sums, at a multiply-add and a
// conversion a vector.
//
// The weight is read as floats, plus offset, made once a call. Sums are taken over kBlock elements in four
// vectors and those added in double, so that rounding does not grow with the row. Gradients of weight and bias
// are sums over rows: of up to kMaxParts ranges of rows first, which depend on the number of rows alone, then
// of those in order. So no bit depends on the number of threads.
#include "cpu/norm/norm.h"

#include <cstring>

#include "cpu/core/elements.h"
#include "cpu/linear/matmul.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kMaxParts = 64, kPartRows = 16;
constexpr int64_t kColumns = 1024;  // of a task that adds up parts

// Of kLanes elements at p, or the first `count` and zeros.
template <class Elements>
BITFUSE_INLINE Vf get(const typename Elements::Type* p, int count) {
  return count == kLanes ? Elements::whole(p) : Elements::some(p, count);
}
template <class Elements>
BITFUSE_INLINE void put(typename Elements::Type* p, Vf a, int count) {
  count == kLanes ? Elements::put(p, a) : put_some<Elements>(p, a, count);
}
BITFUSE_INLINE Vf get(const float* p, int count) { return get<Floats>(p, count); }

// 1 in the first `count` lanes.
BITFUSE_INLINE Vf ones(int count) {
  alignas(64) float all[kLanes];
  store(all, set1(1));
  return count == kLanes ? set1(1) : load_first(all, count);
}

// each(i, count) for vectors of a row.
template <class F>
BITFUSE_INLINE void over(int64_t columns, F each) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) each(i, kLanes);
  if (i < columns) each(i, int(columns - i));
}

// What each(i, count, sums) adds to vectors of sums, summed over the row.
template <int Sums, class F>
BITFUSE_INLINE void add_up(int64_t columns, double (&total)[Sums], F each) {
  for (double& t : total) t = 0;
  for (int64_t from = 0; from < columns; from += kBlock) {
    const int64_t to = least(from + kBlock, columns);
    Vf sums[4][Sums];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u)
#pragma GCC unroll 4
      for (int s = 0; s < Sums; ++s) sums[u][s] = zero();
    int64_t i = from;
    for (; i + 4 * kLanes <= to; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) each(i + u * kLanes, kLanes, sums[u]);
    for (; i + kLanes <= to; i += kLanes) each(i, kLanes, sums[0]);
    if (i < to) each(i, int(to - i), sums[1]);
#pragma GCC unroll 4
    for (int s = 0; s < Sums; ++s)
      total[s] += sum(add(add(sums[0][s], sums[1][s]), add(sums[2][s], sums[3][s])));
  }
}

BITFUSE_INLINE float scale_of(double squares, const NormArgs& call) {
  return float(1 / __builtin_sqrt(squares / double(call.columns) + double(call.eps)));
}

// s of the row at `x`: there, or written to `sum`.
template <class Elements>
void forward(const NormArgs& call, int64_t row, const float* weight, const float* bias) {
  using Type = typename Elements::Type;
  const int64_t n = call.columns;
  const auto* x = static_cast<const Type*>(call.x) + row * call.x_stride;
  auto* out = static_cast<Type*>(call.out) + row * n;
  auto* made = static_cast<Type*>(call.sum);
  const Type* residual = nullptr;
  if (made) {
    made += row * n;
    residual = static_cast<const Type*>(call.residual) + row * call.residual_stride;
  }
  auto first = [&](int64_t i, int count) __attribute__((always_inline)) {
    if (!made) return get<Elements>(x + i, count);
    put<Elements>(made + i, add(get<Elements>(x + i, count), get<Elements>(residual + i, count)), count);
    return get<Elements>(made + i, count);
  };
  const Type* s = made ? made : x;
  float mean = 0;
  double total[1];
  if (call.centered) {
    add_up(n, total, [&](int64_t i, int count, Vf(&sums)[1]) __attribute__((always_inline)) {
      sums[0] = add(sums[0], first(i, count));
    });
    mean = float(total[0] / double(n));
    add_up(n, total, [&](int64_t i, int count, Vf(&sums)[1]) __attribute__((always_inline)) {
      const Vf z = mul(sub(get<Elements>(s + i, count), set1(mean)), ones(count));
      sums[0] = fma(z, z, sums[0]);
    });
  } else {
    add_up(n, total, [&](int64_t i, int count, Vf(&sums)[1]) __attribute__((always_inline)) {
      const Vf z = first(i, count);
      sums[0] = fma(z, z, sums[0]);
    });
  }
  const Vf r = set1(scale_of(total[0], call)), m = set1(mean);
  over(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Vf z = get<Elements>(s + i, count);
    if (call.centered) z = sub(z, m);
    z = mul(z, r);
    const Vf w = get(weight + i, count);
    put<Elements>(out + i, bias ? fma(z, w, get(bias + i, count)) : mul(z, w), count);
  });
}

// d_weight and d_bias [columns]: added to, or null.
template <class Elements>
void backward(const NormArgs& call, int64_t row, const float* weight, float* d_weight, float* d_bias) {
  using Type = typename Elements::Type;
  const int64_t n = call.columns;
  const auto* s = static_cast<const Type*>(call.x) + row * call.x_stride;
  const auto* grad = static_cast<const Type*>(call.grad) + row * call.grad_stride;
  const auto* more = static_cast<const Type*>(call.grad_sum);
  if (more) more += row * call.grad_sum_stride;
  auto* dx = static_cast<Type*>(call.dx) + row * n;
  float mean = 0, mean_g = 0, mean_gz;
  double squares;
  if (call.centered) {
    double total[1], three[3];
    add_up(n, total, [&](int64_t i, int count, Vf(&sums)[1]) __attribute__((always_inline)) {
      sums[0] = add(sums[0], get<Elements>(s + i, count));
    });
    mean = float(total[0] / double(n));
    add_up(n, three, [&](int64_t i, int count, Vf(&sums)[3]) __attribute__((always_inline)) {
      const Vf z = mul(sub(get<Elements>(s + i, count), set1(mean)), ones(count));
      const Vf g = mul(get<Elements>(grad + i, count), get(weight + i, count));
      sums[0] = fma(z, z, sums[0]);
      sums[1] = add(sums[1], g);
      sums[2] = fma(g, z, sums[2]);
    });
    squares = three[0];
    mean_g = float(three[1] / double(n));
    mean_gz = float(three[2] / double(n));
  } else {
    double two[2];
    add_up(n, two, [&](int64_t i, int count, Vf(&sums)[2]) __attribute__((always_inline)) {
      const Vf z = get<Elements>(s + i, count);
      const Vf g = mul(get<Elements>(grad + i, count), get(weight + i, count));
      sums[0] = fma(z, z, sums[0]);
      sums[1] = fma(g, z, sums[1]);
    });
    squares = two[0];
    mean_gz = float(two[1] / double(n));
  }
  const float scale = scale_of(squares, call);
  // z r is the normalised row, so it is multiplied with r mean(g z) and not z with r^2 mean(g z)
  const Vf r = set1(scale), m = set1(mean), less = set1(mean_g), along = set1(-scale * mean_gz);
  over(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Vf z = get<Elements>(s + i, count);
    if (call.centered) z = sub(z, m);
    z = mul(z, r);
    const Vf dy = get<Elements>(grad + i, count);
    Vf g = mul(dy, get(weight + i, count));
    if (call.centered) g = sub(g, less);
    const Vf d = fma(z, along, g);
    put<Elements>(dx + i, more ? fma(d, r, get<Elements>(more + i, count)) : mul(d, r), count);
    if (d_weight) put<Floats>(d_weight + i, fma(dy, z, get(d_weight + i, count)), count);
    if (d_bias) put<Floats>(d_bias + i, add(dy, get(d_bias + i, count)), count);
  });
}

// The weight and its offset as floats.
void read_weight(const NormArgs& call, float* weight) {
  to_float(call.weight, call.weight_dtype, weight, call.columns);
  if (call.offset == 0) return;
  over(call.columns, [&](int64_t i, int count) __attribute__((always_inline)) {
    put<Floats>(weight + i, add(get(weight + i, count), set1(call.offset)), count);
  });
}

// Parts [parts][columns] added up in their order.
void write_sum(const float* parts, int64_t count, int64_t columns, void* out, Dtype dtype) {
  const int64_t tasks = (columns + kColumns - 1) / kColumns;
  parallel(int(least(threads_for(count * columns), most(tasks, 1))), [&](int thread, int team) {
    const Range mine = share(tasks, thread, team);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t from = task * kColumns, width = least(kColumns, columns - from);
      alignas(64) float total[kColumns];
      std::memcpy(total, parts + from, size_t(width) * 4);
      for (int64_t p = 1; p < count; ++p)
        over(width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
          put<Floats>(total + i, add(get(total + i, lanes), get(parts + p * columns + from + i, lanes)),
                      lanes);
        });
      from_float(total, element(out, dtype, from), dtype, width);
    }
  });
}

int threads_of(const NormArgs& call, int64_t tasks) {
  return int(least(threads_for(call.rows * call.columns * 8), most(tasks, 1)));
}

}  // namespace

void norm(const NormArgs& call) {
  const int64_t n = call.columns;
  auto carve = [&](Carver carver, float** arrays) {
    arrays[0] = carver.take<float>(n);
    arrays[1] = call.bias ? carver.take<float>(n) : nullptr;
    return carver.used();
  };
  float* arrays[2];
  carve(Carver(scratch(carve(Carver(), arrays))), arrays);
  float *weight = arrays[0], *bias = arrays[1];
  read_weight(call, weight);
  if (bias) to_float(call.bias, call.bias_dtype, bias, n);
  with_elements(call.dtype, [&](auto elements) {
    parallel(threads_of(call, call.rows), [&](int thread, int team) {
      const Range rows = share(call.rows, thread, team);
      for (int64_t row = rows.begin; row < rows.end; ++row)
        forward<decltype(elements)>(call, row, weight, bias);
    });
  });
}

void norm_backward(const NormArgs& call) {
  const int64_t n = call.columns;
  const bool learns = call.d_weight || call.d_bias;
  const int64_t parts = learns ? most(least(call.rows / kPartRows, kMaxParts), 1) : call.rows;
  auto carve = [&](Carver carver, float** arrays) {
    arrays[0] = carver.take<float>(n);
    arrays[1] = call.d_weight ? carver.take<float>(parts * n) : nullptr;
    arrays[2] = call.d_bias ? carver.take<float>(parts * n) : nullptr;
    return carver.used();
  };
  float* arrays[3];
  carve(Carver(scratch(carve(Carver(), arrays))), arrays);
  float *weight = arrays[0], *d_weight = arrays[1], *d_bias = arrays[2];
  read_weight(call, weight);
  with_elements(call.dtype, [&](auto elements) {
    parallel(threads_of(call, parts), [&](int thread, int team) {
      const Range mine = share(parts, thread, team);
      for (int64_t part = mine.begin; part < mine.end; ++part) {
        float* dw = d_weight ? d_weight + part * n : nullptr;
        float* db = d_bias ? d_bias + part * n : nullptr;
        if (dw) std::memset(dw, 0, size_t(n) * 4);
        if (db) std::memset(db, 0, size_t(n) * 4);
        const Range rows = share(call.rows, part, parts);
        for (int64_t row = rows.begin; row < rows.end; ++row)
          backward<decltype(elements)>(call, row, weight, dw, db);
      }
    });
  });
  if (d_weight) write_sum(d_weight, parts, n, call.d_weight, call.weight_dtype);
  if (d_bias) write_sum(d_bias, parts, n, call.d_bias, call.bias_dtype);
}

}  // namespace bitfuse::BITFUSE_ISA
