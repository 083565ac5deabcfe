// Span's outputs: a unit's V of one head times the probabilities, a tile of Rows x 4 vectors of channels; a
// vector of V meets Rows rows.
#pragma once

#include "cpu/attention/decode_span.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

template <class Reader>
inline void Span<Reader>::read_scales(const Unit& now, int64_t h, ValueScales& to) const {
  alignas(64) uint16_t scales[kUnit * kMostGroups], offsets[kUnit * kMostGroups];
  if (now.count < kUnit || groups_ != padded_) {
    std::memset(scales, 0, sizeof scales);
    std::memset(offsets, 0, sizeof offsets);
  }
  const int64_t half = kUnit / 2 * padded_;
  auto each = [&](auto bytes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < now.count; ++i) {
      const int64_t from = (now.row[i] * cache_.kv_heads + h) * groups_;
      const int64_t at = V::kPairs ? i / 2 * padded_ + (i & 1) * half : i * padded_;
      std::memcpy(scales + at, cache_.v_scales + from, bytes);
      std::memcpy(offsets + at, cache_.v_offsets + from, bytes);
    }
  };
  if (groups_ == 4) {
    each(std::integral_constant<size_t, 8>{});
  } else if (groups_ == 2) {
    each(std::integral_constant<size_t, 4>{});
  } else if (groups_ == 1) {
    each(std::integral_constant<size_t, 2>{});
  } else {
    each(size_t(groups_) * 2);
  }
  to_float(scales, Dtype::kFloat16, to.scale, kUnit * padded_);
  to_float(offsets, Dtype::kFloat16, to.offset, kUnit * padded_);
  centre(to.scale, to.offset, kUnit * padded_);
#if BITFUSE_PAIRS
  if constexpr (V::kWords) find_tops(to);
#endif
}

#if BITFUSE_PAIRS
template <class Reader>
inline void Span<Reader>::find_tops(ValueScales& v) const {
  const int64_t half = kUnit / 2 * padded_;
  Vf tops[2][2];  // of even tokens and of odd ones
  for (int odd = 0; odd < 2; ++odd)
    for (int i = 0; i < 2; ++i) tops[odd][i] = group_maxima(v.scale + odd * half + i * half / 2, padded_);
  for (int i = 0; i < 2; ++i) {
    store(v.top + 32 * i, interleave_low(tops[0][i], tops[1][i]));
    store(v.top + 32 * i + 16, interleave_high(tops[0][i], tops[1][i]));
  }
}
#endif

template <class Reader>
inline void Span<Reader>::fold_values(const ValueScales& v, int64_t r, int64_t count, Element* to,
                                      float* offsets, float& word) const {
  const float* p = my_.s + r * kPitch;
  const Vf rescale = set1(my_.rescale[r]);
  if (!V::kPairs && padded_ >= kLanes) {  // a vector holds groups of one token
    for (int64_t g = 0; g < padded_; g += kLanes) {
      Vf sums = mul(load(offsets + g), rescale);
      for (int64_t t = 0; t < count; ++t) {
        const Vf own = set1(p[t]);
        sums = fma(own, load(v.offset + t * padded_ + g), sums);
        if constexpr (!V::kPairs) store(to + t * padded_ + g, mul(own, load(v.scale + t * padded_ + g)));
      }
      store(offsets + g, sums);
    }
    return;
  }
  alignas(64) int32_t index[kLanes];
  Vf sums = mul(load(offsets), rescale);
  if constexpr (V::kPairs) {
#if BITFUSE_PAIRS
    const int64_t half = kUnit / 2 * padded_, tokens = 2 * kLanes / padded_;
    for (int i = 0; i < kLanes; ++i) index[i] = int32_t(i / padded_ * 2);
    const Vi even = load_dwords(index), odd = add_dwords(even, set1_dwords(1));
    Vf top = zero();
    for (int64_t t = 0; t < kUnit; t += kLanes) top = maximum(mul(load(p + t), load(v.top + t)), top);
    const float scaled = word_factor(largest_lane(top));
    const Vf factor = set1(scaled);
    word = 1 / scaled;
    Vf added = zero();
    for (int64_t t = 0, at = 0; t < count; t += tokens, at += kLanes) {
      // one group: of two vectors, which the 5 bits of an index reach; else the upper is not
      const Vf both = load(p + t), more = padded_ == 1 ? load(p + t + kLanes) : both;
      const Vf low = mul(permute(both, more, even), factor);
      const Vf high = mul(permute(both, more, odd), factor);
      added = fma(low, load(v.offset + at), added);
      added = fma(high, load(v.offset + half + at), added);
      const Vi x = to_nearest(mul(low, load(v.scale + at)));
      const Vi y = to_nearest(mul(high, load(v.scale + half + at)));
      store_dwords(to + at, or_dwords(x, shift_left<16>(y)));
    }
    sums = fma(added, set1(word), sums);
#endif
  } else {
    for (int i = 0; i < kLanes; ++i) index[i] = int32_t(i / padded_);
    const Vi each = load_dwords(index);
    for (int64_t t = 0, at = 0; t < count; t += kLanes / padded_, at += kLanes) {
      const Vf own = permute(load(p + t), each);
      sums = fma(own, load(v.offset + at), sums);
      store(to + at, mul(own, load(v.scale + at)));
    }
  }
  store(offsets, sums);
}

template <class Reader>
inline void Span<Reader>::values(const Unit& now, int64_t h, const char* const* ahead, int64_t ahead_count,
                                 int64_t ahead_at) {
  ValueScales scales;
  if constexpr (V::kGrouped) read_scales(now, h, scales);
  for (int64_t r = 0; r < rows_; r += kTile) {
    alignas(64) Element p[kTile * (kUnit * kMostGroups + kLanes)];
    const int64_t rows = least(kTile, rows_ - r);
    int64_t pitch = kUnit * most(padded_, 1) + kLanes;
    float units[kTile];
    const Element* of = p;
    if constexpr (V::kGrouped) {
      for (int64_t i = 0; i < rows; ++i)
        fold_values(scales, r + i, now.count, p + i * pitch,
                    my_.offsets + (h * plan_.row_slots + r + i) * kOffsets, units[i]);
    } else if constexpr (V::kPairs) {
#if BITFUSE_PAIRS
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t t = 0; t < now.count; t += 2 * kLanes) {
          const float* s = my_.s + (r + i) * kPitch + t;
          // past the last vector that holds a token s is not set
          const Vf high = t + kLanes < now.count ? load(s + kLanes) : zero();
          store_dwords(p + i * pitch + t / 2, bfloats_of(load(s), high));
        }
#endif
    } else {
      of = my_.s + r * kPitch;
      pitch = kPitch;
    }
    Ahead next{r == 0 ? ahead : nullptr, ahead_count, ahead_at};
    if constexpr (V::kGrouped && V::kPairs) {
      if (groups_ > 1) {
        accumulate_rows<false>(rows, now, h, r, of, pitch, units, next);
        continue;
      }
    }
    accumulate_rows<true>(rows, now, h, r, of, pitch, units, next);
  }
}

template <class Reader>
template <bool Uniform, class... Rest>
inline void Span<Reader>::accumulate_rows(int64_t rows, const Unit& now, Rest... rest) {
  if (rows == 1) return accumulate<1, Uniform>(now, rest...);
  if (rows == 2) return accumulate<2, Uniform>(now, rest...);
  if (rows == 3) return accumulate<3, Uniform>(now, rest...);
  accumulate<4, Uniform>(now, rest...);
}

template <class Reader>
template <int Rows, bool Uniform>
inline void Span<Reader>::accumulate(const Unit& now, int64_t h, int64_t r, const Element* p, int64_t pitch,
                                     const float* units, const Ahead& next) {
  float* o = my_.o + (h * plan_.row_slots + r) * o_pitch_;
  for (int64_t c = 0; c < cache_.dim_v; c += kStretch) {
    const bool ahead = next.rows && c == 0;
    Acc acc[Rows][kWide];
    auto before = [&](int row, int v) __attribute__((always_inline)) {
      return mul(load(o + row * o_pitch_ + c + v * kLanes), set1(my_.rescale[r + row]));
    };
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) {
        if constexpr (V::kWords) {
          acc[row][v] = Acc{};
        } else {
          acc[row][v] = before(row, v);
        }
      }
    if constexpr (V::kPairs) {
#if BITFUSE_PAIRS
      constexpr int kWords = kWide / V::kValueWeights;  // vectors of words in the stretch
      uint32_t masks[kWords];
      [[maybe_unused]] int64_t groups[2 * kWords] = {};
      for (int w = 0; w < kWords; ++w) {
        const int64_t at = c + w * V::kWordChannels;
        const int64_t bytes = least(32, V::bytes_of(most(0, cache_.dim_v - at)));
        masks[w] = uint32_t((uint64_t(1) << bytes) - 1);
        if constexpr (V::kGrouped) {
          groups[2 * w] = least(groups_ - 1, at / cache_.channel_group);
          groups[2 * w + 1] = least(groups_ - 1, (at + V::kWordChannels / 2) / cache_.channel_group);
        }
      }
      const int64_t at = h * v_head_ + V::bytes_of(c);
      for (int64_t t = 0; t < now.count; t += 2) {
        if (ahead) {
          prefetch_row(next.rows[least(t, next.count - 1)] + next.at, k_bytes_);
          prefetch_row(next.rows[least(t + 1, next.count - 1)] + next.at, k_bytes_);
        }
        const char *a = now.v[t] + at, *b = now.v[least(t + 1, now.count - 1)] + at;
        const Element* x = p + t / 2 * (V::kGrouped ? padded_ : 1);
        Vi own[Rows];
        if constexpr (Uniform)
#pragma GCC unroll 4
          for (int row = 0; row < Rows; ++row) own[row] = set1_dwords(x[row * pitch]);
        unrolled<kWords>([&](auto word) __attribute__((always_inline)) {
          constexpr int kWord = decltype(word)::value;
          const Vi raw = V::interleave(a + 32 * kWord, b + 32 * kWord, masks[kWord]);
          if constexpr (!Uniform) {
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) {
              const Element* y = x + row * pitch;
              own[row] = set1_dwords(y[groups[2 * kWord]]);
              if constexpr (V::kHalves) own[row] = set_high_half(own[row], y[groups[2 * kWord + 1]]);
            }
          }
          unrolled<V::kValueWeights>([&](auto step) __attribute__((always_inline)) {
            constexpr int kVec = kWord * V::kValueWeights + decltype(step)::value;
            const Vi w = reader_.template value_weight<decltype(step)::value>(raw);
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) acc[row][kVec] = V::accumulate(acc[row][kVec], w, own[row]);
          });
          if constexpr (V::kNans)
            if (any_nan(raw)) [[unlikely]]
              unrolled<V::kValueWeights>([&](auto step) {
                constexpr int kStep = decltype(step)::value, kVec = kWord * V::kValueWeights + kStep;
                const Vi one = and_dwords(shift_right<8 * kStep>(raw), set1_dwords(0x00ff00ff));
                for (int row = 0; row < Rows; ++row) acc[row][kVec] = add(acc[row][kVec], nan_lanes(one));
              });
        });
      }
#endif
    } else {
      int64_t groups[kWide] = {};
      if constexpr (V::kGrouped)
        for (int v = 0; v < kWide; ++v)
          groups[v] = least(groups_ - 1, (c + v * kLanes) / cache_.channel_group);
      auto token = [&](int64_t t, auto read) __attribute__((always_inline)) {
        if (ahead) prefetch_row(next.rows[least(t, next.count - 1)] + next.at, k_bytes_);
        const char* v_row = now.v[t] + h * v_head_;
        Vf w[kWide];
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) w[v] = read(v_row, c + v * kLanes);
        const float* x = p + t * (V::kGrouped ? padded_ : 1);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
          for (int v = 0; v < kWide; ++v)
            acc[row][v] = fma(w[v], set1(x[row * pitch + (V::kGrouped ? groups[v] : 0)]), acc[row][v]);
      };
      if (c + kStretch <= cache_.dim_v) {
        for (int64_t t = 0; t < now.count; ++t)
          token(t, [&](const char* row, int64_t at)
                       __attribute__((always_inline)) { return reader_.values(row, at, kLanes); });
      } else {
        for (int64_t t = 0; t < now.count; ++t)
          token(t, [&](const char* row, int64_t at)
                       __attribute__((always_inline)) { return reader_.values(row, at, cache_.dim_v - at); });
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) {
        float* to = o + row * o_pitch_ + c + v * kLanes;
        if constexpr (V::kWords) {
#if BITFUSE_PAIRS
          store(to, fma(to_floats(acc[row][v]), set1(units[row]), before(row, v)));
#endif
        } else {
          store(to, acc[row][v]);
        }
      }
  }
}

template <class Reader>
inline void Span<Reader>::finish(int64_t query, float* out, RowState* states) {
  for (int64_t h = 0; h < cache_.kv_heads; ++h)
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t slot = h * plan_.row_slots + r, head = h * plan_.group + r % plan_.group;
      const int64_t at = (my_.places[r].query - query) * call_.heads + head;
      const float* o = my_.o + slot * o_pitch_;
      float* to = out + at * cache_.dim_v;
      states[at] = my_.states[slot];
      constexpr int64_t kWeights = V::kValueWeights;
      if constexpr (kWeights > 1) {
        alignas(64) float channels[kDim];
        for (int64_t c = 0; c < cache_.dim_v; c += kWeights * kLanes)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            for (int64_t step = 0; step < kWeights; ++step)
              channels[c + lane * kWeights + step] = o[c + step * kLanes + lane];
        std::memcpy(to, channels, size_t(cache_.dim_v) * 4);
      } else {
        std::memcpy(to, o, size_t(cache_.dim_v) * 4);
      }
      if constexpr (V::kGrouped) {
        const float* sums = my_.offsets + slot * kOffsets;
        float of_group[kMostGroups] = {};
        for (int i = 0; i < kOffsets; ++i) of_group[i % padded_] += sums[i];
        for (int64_t g = 0, c = 0; g < groups_; ++g)
          for (const int64_t end = least(cache_.dim_v, c + cache_.channel_group); c < end; ++c)
            to[c] += of_group[g];
      }
      if (cache_.v_head_scales && !tail_)
        for (int64_t c = 0; c < cache_.dim_v; ++c) to[c] *= cache_.v_head_scales[h];
    }
}

}  // namespace
}  // namespace bitfuse::BITFUSE_ISA
