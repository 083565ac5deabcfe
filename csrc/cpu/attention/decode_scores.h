// Span's scores: its queries, rotated and in the order of K's columns; their products with a unit's K of one
// head, a tile of Rows x Tokens = kLanes accumulators, which end as one vector of lane sums; a vector of K in
// registers meets Rows rows; and the softmax of each row.
#pragma once

#include <cmath>

#include "cpu/attention/decode_span.h"
#include "cpu/attention/rotary.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

template <class Reader>
inline void Span<Reader>::prepare(int64_t query) {
  const int64_t slots = cache_.kv_heads * plan_.row_slots;
  std::memset(my_.o, 0, size_t(slots * o_pitch_) * 4);
  if constexpr (V::kGrouped) std::memset(my_.offsets, 0, size_t(slots * kOffsets) * 4);
  for (int64_t i = 0; i < slots; ++i) my_.states[i] = {-kInfinity, 0};
  Turn turn;
  alignas(64) float row[kDim + kLanes];
  for (int64_t r = 0; r < plan_.row_slots; ++r) {
    const bool some = r < rows_;
    const int64_t i = query + r / plan_.group, position = i + length_ - call_.queries;
    my_.places[r] = {i, position, 0};
    if (some && r % plan_.group == 0) turn_of(call_.rotary, b_, i, most(position, 0), turn);
    for (int64_t h = 0; h < cache_.kv_heads; ++h) {
      std::memset(row, 0, size_t(used_) * 4);
      if (some) {
        to_float(row_of(call_.q, cache_.dtype, b_, i, h * plan_.group + r % plan_.group), cache_.dtype, row,
                 cache_.dim);
        if (call_.rotary.cos) {
          alignas(64) float rounded[kDim];
          rotate_row(call_.rotary, turn, row);
          from_float(row, rounded, cache_.dtype, cache_.dim);
          to_float(rounded, cache_.dtype, row, cache_.dim);
        }
      }
      const int64_t at = h * plan_.row_slots + r;
      if constexpr (K::kGrouped) {
        float* to = my_.natural + at * natural_pitch_;
        std::memcpy(to, row, size_t(used_) * 4);
        if constexpr (K::kWords) {
          to[used_] = normalise(to);
        } else {
          reorder(row, to + used_, nullptr);
        }
      } else {
        alignas(64) float low[kDim], high[kDim];
        reorder(row, low, high);
        join(low, high, my_.q + at * q_pitch_);
      }
    }
  }
}

template <class Reader>
inline float Span<Reader>::normalise(float* q) const {
  Vf top = zero();
  for (int64_t c = 0; c < cache_.dim; c += kLanes) top = maximum(absolute(load(q + c)), top);
  const float largest = largest_lane(top);
  const bool finite = largest < kInfinity;
  int power = 1;
  if (finite && largest > 0) std::frexp(largest, &power);
  // in two steps: that of a denormal number is beyond float
  const int half = (1 - power) / 2;
  const Vf first = set1(finite ? std::ldexp(1.0f, half) : 0);
  const Vf second = set1(std::ldexp(1.0f, 1 - power - half));
  for (int64_t c = 0; c < cache_.dim; c += kLanes) store(q + c, mul(mul(load(q + c), first), second));
  return std::ldexp(1.0f, power - 1);
}

template <class Reader>
inline void Span<Reader>::reorder(const float* row, float* low, float* high) const {
  for (int64_t at = 0, c = 0; at < q_pitch_; c += K::kBlock)
    for (int j = 0; j < K::kWeights; ++j)
      for (int lane = 0; lane < kLanes; ++lane, ++at) {
        low[at] = row[c + K::column(j, lane)];
        if constexpr (K::kPairs) high[at] = row[c + K::column(j, lane) + K::kWeights];
      }
}

template <class Reader>
inline void Span<Reader>::join(const float* low, const float* high, Element* to) const {
  for (int64_t at = 0; at < q_pitch_; at += kLanes) {
#if BITFUSE_PAIRS
    if constexpr (K::kPairs) {
      store_dwords(to + at, pair_words(load(low + at), load(high + at)));
      continue;
    } else
#endif
      store(to + at, load(low + at));
  }
}

template <class Reader>
inline void Span<Reader>::keys(const Unit& now, int64_t h) {
  if constexpr (!K::kGrouped) {
    for (int64_t r = 0; r < rows_; r += kTile) {
      const Element* q = my_.q + (h * plan_.row_slots + r) * q_pitch_;
      dots(now, h, r, 0, now.count, q, nullptr);
    }
  } else {
    alignas(64) float scale[2 * kDim], offset[kDim];
    const int64_t padded = round_up(cache_.dim, 64);
    for (int64_t c = cache_.dim; c < padded; ++c) scale[c] = offset[c] = 0;
    if constexpr (!K::kWords) std::memset(scale, 0, size_t(used_) * 4);
    for (int64_t i = 0; i < now.count;) {
      const int64_t size = cache_.group_size;
      const int64_t count = least(now.count - i, size - now.row[i] % size);
      const int64_t at = (now.row[i] / size * cache_.kv_heads + h) * cache_.dim;
      to_float(cache_.k_scales + at, Dtype::kFloat16, scale, cache_.dim);
      to_float(cache_.k_offsets + at, Dtype::kFloat16, offset, cache_.dim);
      centre(scale, offset, cache_.dim);
      if constexpr (!K::kWords) reorder(scale, scale + kDim, nullptr);
      for (int64_t r = 0; r < rows_; r += kTile) {
        alignas(64) Element q[kTile * kDim];
        Folded folded;
        const int64_t rows = rows_ - r <= 2 ? rows_ - r : kTile;
        fold_keys(scale, offset, h, r, rows, q, folded);
        dots(now, h, r, i, count, q, &folded);
      }
      i += count;
    }
  }
}

template <class Reader>
inline void Span<Reader>::centre(const float* scale, float* offset, int64_t count) {
  if constexpr (K::kMiddle != 0)
    for (int64_t c = 0; c < count; ++c) offset[c] += K::kMiddle * scale[c];
}

template <class Reader>
inline void Span<Reader>::fold_keys(const float* scale, const float* offset, int64_t h, int64_t r,
                                    int64_t rows, Element* q, Folded& to) const {
  const float* natural = my_.natural + (h * plan_.row_slots + r) * natural_pitch_;
  [[maybe_unused]] alignas(64) float products[kTile * kDim];
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = natural + t * natural_pitch_;
    Vf bias = zero();
    for (int64_t c = 0; c < cache_.dim; c += kLanes) bias = fma(load(row + c), load(offset + c), bias);
    to.bias[t] = sum(bias);
    if constexpr (K::kWords) {
#if BITFUSE_PAIRS
      float* product = products + t * kDim;
      Vf top[2] = {zero(), zero()};
      for (int64_t c = 0; c < round_up(cache_.dim, K::kBlock); c += 2 * kLanes)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t at = c + i * kLanes;
          const Vf x = mul(load(row + at), load(scale + at));
          store(product + at, x);
          top[i] = larger_magnitude(x, top[i]);
        }
      to.unit[t] = word_factor(largest_lane(maximum(top[0], top[1])));
#endif
    } else {
      for (int64_t a = 0; a < q_pitch_; a += kLanes)
        store(q + t * q_pitch_ + a, mul(load(row + used_ + a), load(scale + kDim + a)));
    }
  }
  if constexpr (K::kWords) {
#if BITFUSE_PAIRS
    for (int64_t t = 0; t < rows; ++t) {
      const Vf factor = set1(to.unit[t]);
      const float unit = 1 / to.unit[t], power = natural[t * natural_pitch_ + used_];
      Vf lost = zero();
      for (int64_t c = 0; c < cache_.dim; c += K::kBlock)
        lost = K::put_q(products + t * kDim + c, factor, q + t * q_pitch_ + c / 2, lost);
      to.bias[t] = (to.bias[t] + K::kMean * unit * sum(lost)) * power;
      to.unit[t] = unit * power;
    }
#endif
  }
}

template <class Reader>
inline void Span<Reader>::dots(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count,
                               const Element* q, const Folded* folded) {
  const int64_t rows = least(kTile, rows_ - r);
  if (rows == 1) return dot<1>(now, h, r, from, count, q, folded);
  if (rows == 2) return dot<2>(now, h, r, from, count, q, folded);
  dot<4>(now, h, r, from, count, q, folded);
}

template <class Reader>
template <int Rows>
inline void Span<Reader>::dot(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count,
                              const Element* q, const Folded* folded) {
  constexpr int Tokens = kLanes / Rows;
  const bool ahead = r == 0;
  Vf plus = zero(), unit = zero();
  if constexpr (K::kGrouped) {
    alignas(64) float biases[kLanes], units[kLanes];
    for (int i = 0; i < kLanes; ++i)
      biases[i] = folded->bias[i / Tokens], units[i] = folded->unit[i / Tokens];
    plus = load(biases);
    unit = load(units);
  }
  for (int64_t t = from; t < from + count; t += Tokens) {
    const char* rows[Tokens];
#pragma GCC unroll 16
    for (int i = 0; i < Tokens; ++i) {
      const int64_t token = least(t + i, from + count - 1);
      rows[i] = now.k[token] + h * k_head_;
      if (ahead) prefetch_row(now.v[token] + h * v_head_, v_bytes_);
    }
    Acc acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = Acc{};
    const Element* x = q;
    auto block = [&](auto load) __attribute__((always_inline)) {
      typename K::Raw raw[Tokens];
#pragma GCC unroll 16
      for (int i = 0; i < Tokens; ++i) raw[i] = load(rows[i]);
      unrolled<K::kWeights>([&](auto step) __attribute__((always_inline)) {
        typename K::Vector w[Tokens];
#pragma GCC unroll 16
        for (int i = 0; i < Tokens; ++i) w[i] = reader_.template weight<decltype(step)::value>(raw[i]);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
          const auto a = K::load_q(x + row * q_pitch_);
#pragma GCC unroll 16
          for (int i = 0; i < Tokens; ++i)
            acc[row * Tokens + i] = K::accumulate(acc[row * Tokens + i], w[i], a);
        }
        x += kLanes;
      });
#pragma GCC unroll 16
      for (int i = 0; i < Tokens; ++i)
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) acc[row * Tokens + i] = K::poison(acc[row * Tokens + i], raw[i]);
    };
    for (int64_t c = 0; c < blocks_; ++c)
      block([&](const char* p) { return reader_.load_block(p + c * K::kBlockBytes); });
    if (rest_) block([&](const char* p) { return reader_.load_part(p + blocks_ * K::kBlockBytes, rest_); });
    alignas(64) float sums[kLanes];
    if constexpr (K::kWords) {
#if BITFUSE_PAIRS
      store(sums, fma(to_floats(lane_sums(acc)), unit, plus));
#endif
    } else {
      store(sums, add(lane_sums(acc), plus));
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row)
      std::memcpy(my_.s + (r + row) * kPitch + t, sums + row * Tokens, Tokens * 4);
  }
}

BITFUSE_INLINE Vf lane_floats() {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = float(i);
  return load(lanes);
}

template <class Reader>
inline void Span<Reader>::softmax(const Unit& now, int64_t h, int64_t r) {
  float* s = my_.s + r * kPitch;
  const RowPlace& place = my_.places[r];
  const int64_t count = now.count, head = h * plan_.group + r % plan_.group;
  const float scale = call_.scale * (cache_.k_head_scales && !tail_ ? cache_.k_head_scales[h] : 1);
  const int64_t distance = now.first - place.position;  // of the unit's first key
  const bool edge =
      (call_.left >= 0 && distance < -call_.left) || (call_.right >= 0 && distance + count - 1 > call_.right);
  const Vf lanes = lane_floats();
  Vf top = set1(-kInfinity);
  for (int64_t t = 0; t < count; t += kLanes) {
    Vf z = mul(load(s + t), set1(scale));
    if (call_.softcap != 0) z = mul(tanh_of(div(z, set1(call_.softcap))).value, set1(call_.softcap));
    if (edge || call_.alibi) {
      const Vf d = add(lanes, set1(float(distance + t)));
      if (call_.alibi) z = fma(absolute(d), set1(-call_.alibi[b_ * call_.alibi_batch + head]), z);
      if (call_.left >= 0) z = by_sign(add(d, set1(float(call_.left))), z, set1(-kInfinity));
      if (call_.right >= 0) z = by_sign(sub(set1(float(call_.right)), d), z, set1(-kInfinity));
    }
    if (t + kLanes > count) z = by_sign(sub(set1(float(count - t) - 0.5f), lanes), z, set1(-kInfinity));
    store(s + t, z);
    top = maximum(z, top);
  }
  const int64_t tree = length_ - call_.queries;  // the tree's first key
  if (call_.tree && now.first + count > tree) {
    const uint8_t* seen = call_.tree + b_ * call_.tree_batch + place.query * call_.queries - tree;
    for (int64_t t = most(0, tree - now.first); t < count; ++t)
      if (!seen[now.first + t]) s[t] = -kInfinity;
    top = set1(-kInfinity);
    for (int64_t t = 0; t < count; t += kLanes) top = maximum(load(s + t), top);
  }
  RowState& state = my_.states[h * plan_.row_slots + r];
  const float largest = largest_lane(top);
  const float raised = largest > state.most ? largest : state.most;
  const Vf shift = set1(raised == -kInfinity ? 0 : raised);
  Vf total = zero();
  for (int64_t t = 0; t < round_up(count, kLanes); t += kLanes) {
    const Vf p = exponential(sub(load(s + t), shift));
    store(s + t, p);
    total = add(total, p);
  }
  for (int64_t t = round_up(count, kLanes); t < kUnit; t += kLanes) store(s + t, zero());
  alignas(64) float before[kLanes];
  store(before, exponential(sub(set1(state.most), shift)));
  state.most = raised;
  state.sum = state.sum * before[0] + sum(total);
  my_.rescale[r] = before[0];
}

}  // namespace
}  // namespace bitfuse::BITFUSE_ISA
