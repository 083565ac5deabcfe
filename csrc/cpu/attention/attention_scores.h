// From products q k to probabilities: scale, cap, slopes, bias and window of a block of scores, its
// exponentials, its dropout.
//
// A block is S^T [key][row] of one tile of rows: what belongs to a query is a vector, what belongs to a key a
// number. Without cap, slopes and bias a block is left as the product gave it: the largest of a row is
// subtracted first, and the difference meets scale and log2(e) as one factor. So the largest has an exponent
// of exactly 0, however large it is, and the others lose no more than the product's own rounding.
#pragma once

#include "cpu/attention/attention_tiles.h"
#include "cpu/core/dropout.h"

namespace bitfuse::BITFUSE_ISA {

constexpr int64_t kBlockKeys = kLanes == 16 ? 96 : 64;
constexpr float kLog2e = 1.44269504f;
constexpr double kExactLog2e = 1.4426950408889634;
constexpr float kLowest = -3.40282347e38f;
constexpr float kInfinity = __builtin_inff();

// 2^r for r from -1/2 to 1/2: 1 + r (c + r rest), minimax. Degree 5 errs by 9e-8, degree 6 by 2e-9.
template <int Degree>
constexpr float kExp2Linear = Degree == 5 ? 0.6931470036506653f : 0.6931471824645996f;
template <int Degree>
BITFUSE_INLINE Vf exp2_rest(Vf r) {
  if constexpr (Degree == 5) {
    Vf p = set1(0.001326472731307149f);
    p = fma(p, r, set1(0.009671512991189957f));
    p = fma(p, r, set1(0.05550733581185341f));
    return fma(p, r, set1(0.24022242426872253f));
  } else {
    Vf p = set1(0.00015353361959569156f);
    p = fma(p, r, set1(0.0013398875016719103f));
    p = fma(p, r, set1(0.00961843691766262f));
    p = fma(p, r, set1(0.055503323674201965f));
    return fma(p, r, set1(0.24022647738456726f));
  }
}

constexpr float kMagic = 12582912;  // 1.5 * 2^23, whose last place is 1: added, the low bits are the rounded

// 2^t for t < 127; exactly 0 from -127 down, where n = -127 moves the 1 of 2^0 to an exponent of 0.
template <int Degree>
BITFUSE_INLINE Vf exp2_of(Vf t) {
  t = maximum(set1(-127), t);
  const Vf whole = add(t, set1(kMagic)), r = sub(t, sub(whole, set1(kMagic)));
  const Vf p = fma(fma(exp2_rest<Degree>(r), r, set1(kExp2Linear<Degree>)), r, set1(1));
  return as_float(add_dwords(as_dwords(p), shift_left<23>(as_dwords(whole))));
}

// A logit's scale in powers of two.
BITFUSE_INLINE float in_powers_of_two(float scale) { return float(double(scale) * kExactLog2e); }

// tanh, and 1 - tanh^2: -e / (e + 2) and 4 (e + 1) / (e + 2)^2 of e = expm1(-2 |x|), none of which cancels.
struct Tanh {
  Vf value, slope;
};
BITFUSE_INLINE Tanh tanh_of(Vf x) {
  const Vf one = set1(1), log2e = set1(kLog2e), linear = set1(kExp2Linear<6>);
  const Vf y = maximum(set1(-87), mul(absolute(x), set1(-2))), t = mul(y, log2e);
  const Vf lost = fma(y, log2e, sub(zero(), t));  // by the rounding of t
  const Vf whole = add(t, set1(kMagic)), r = sub(t, sub(whole, set1(kMagic)));
  const Vf p = fma(r, linear, fma(lost, linear, mul(mul(r, r), exp2_rest<6>(r))));
  const Vf power = as_float(add_dwords(as_dwords(one), shift_left<23>(as_dwords(whole))));
  const Vf e = fma(power, p, sub(power, one)), sum = add(e, set1(2)), value = div(e, sum);
  return {by_sign(x, sub(zero(), value), value), div(mul(add(e, one), set1(4)), mul(sum, sum))};
}

// The rows of a tile. All have one batch and one kv head; row r of that head's is query r / group of query
// head r % group.
struct Lanes {
  int64_t count, first, last;  // rows; positions of the first's query and the last's
  int vecs;
  alignas(64) float offset[kWidth];     // of the query from the first
  alignas(64) float slope[kWidth];      // ALiBi's
  alignas(64) uint32_t hash[kWidth];    // of a row in the dropout mask
  alignas(64) uint32_t other[kWidth];   // its second
  int64_t query[kWidth], head[kWidth];  // of q's tensor
  const char* bias[kWidth];
  int64_t place[kWidth];  // in lse
};

struct Block {
  int64_t first, count;  // keys
  bool own;              // not of the prefix
};

class Scores {
 public:
  explicit Scores(const AttentionArgs& call)
      : call_(call),
        group_(call.heads / call.kv_heads),
        keep_scale_(float(1 / (1 - call.dropout.p))),
        threshold_(dropout_threshold(call.dropout.p)),
        // -inf and the maximum go before the scale only if that is positive
        scaled_(call.softcap != 0 || call.bias.data || call.alibi || !(call.scale > 0)) {
    for (int64_t h = 0; call.sinks && h < call.heads; ++h)
      scaled_ = scaled_ || __builtin_isinf(most_of(h)) != __builtin_isinf(call.sinks[h]);
  }

  int64_t group() const { return group_; }
  bool dropout() const { return call_.dropout.p > 0; }
  float keep_scale() const { return keep_scale_; }
  bool capped() const { return call_.softcap != 0; }
  // The scale that scores lack after `adjust`: the same for all blocks of a call.
  float factor() const { return scaled_ ? 1 : call_.scale; }
  // What a row of query head h begins with, as a score: its sink.
  float most_of(int64_t h) const { return call_.sinks ? call_.sinks[h] / factor() : -kInfinity; }

  int64_t shift(const AttentionSequence& s) const { return call_.top_left ? 0 : s.k_length - s.q_length; }

  void set_lanes(int64_t batch, int64_t kv_head, const AttentionSequence& s, int64_t row, int64_t count,
                 Lanes& to) const {
    to.count = count;
    to.vecs = int(ceil_div(count, kLanes));
    to.first = row / group_;
    to.last = (row + count - 1) / group_;
    int64_t i = to.first, g = row % group_;
    for (int64_t lane = 0; lane < to.vecs * kLanes; ++lane) {
      const int64_t head = kv_head * group_ + g;
      to.query[lane] = s.q_begin + i;
      to.head[lane] = head;
      to.offset[lane] = float(i - to.first);
      to.place[lane] = ((call_.packed ? 0 : batch * call_.heads) + head) * call_.rows + s.q_begin + i;
      if (call_.alibi) to.slope[lane] = call_.alibi[batch * call_.alibi_batch + head];
      if (dropout()) {
        const DropoutRow words(call_.dropout.seed, uint32_t(to.place[lane]));
        to.hash[lane] = words.first, to.other[lane] = words.second;
      }
      const AttentionBias& bias = call_.bias;
      if (bias.data) {
        const int64_t at = batch * bias.batch + head * bias.head + i * bias.row;
        to.bias[lane] = static_cast<const char*>(bias.data) + at * (bias.mask ? 1 : size_of(bias.dtype));
      }
      // lanes past the last repeat it: what they read is there
      if (lane + 1 < count && ++g == group_) g = 0, ++i;
    }
  }

  // The keys that some query of [first, last] sees, from an even one on.
  Range visible(const AttentionSequence& s, int64_t first, int64_t last) const {
    Range keys{0, s.k_length};
    if (call_.left >= 0) keys.begin = most(0, first + shift(s) - call_.left) & ~int64_t(1);
    if (call_.right >= 0) keys.end = least(s.k_length, last + shift(s) + call_.right + 1);
    return keys.begin < keys.end ? keys : Range{0, 0};
  }

  // False where a mask hides the whole block.
  bool seen(const Lanes& lanes, const Block& block) const {
    const AttentionBias& bias = call_.bias;
    if (!bias.data || !bias.mask || !block.own) return true;
    const int64_t rows = bias.row == 0 && bias.head == 0 ? 1 : lanes.count;
    for (int64_t r = 0; r < rows; ++r) {
      const char* p = lanes.bias[r] + block.first * bias.column;
      if (bias.column == 1) {
        uint8_t any = 0;
        for (int64_t j = 0; j < block.count; ++j) any |= uint8_t(p[j]);
        if (any) return true;
      } else {
        for (int64_t j = 0; j < block.count; ++j)
          if (p[j * bias.column]) return true;
      }
    }
    return false;
  }

  // From products to logits but for `factor`, -inf for a key that is not seen. With a cap, slopes (or null)
  // receives its derivative.
  void adjust(const AttentionSequence& s, const Lanes& lanes, const Block& block, float* scores,
              float* slopes) const {
    const int64_t place =
        block.first - lanes.first - shift(s);  // the first key's distance to the first query
    const bool low = block.own && call_.left >= 0 && place + lanes.first - lanes.last < -call_.left;
    const bool high = block.own && call_.right >= 0 && place + block.count - 1 > call_.right;
    const bool biased = block.own && call_.bias.data, sloped = block.own && call_.alibi;
    if (capped()) {
      cap(lanes, block, scores, slopes);
    } else if (scaled_) {
      each(lanes, block, scores, [&](int64_t, int, Vf z) { return mul(z, set1(call_.scale)); });
    }
    if (sloped) {
      each(lanes, block, scores, [&](int64_t j, int v, Vf z) {
        const Vf distance = sub(set1(float(place + j)), load(lanes.offset + v));
        return fma(sub(zero(), load(lanes.slope + v)), absolute(distance), z);
      });
    }
    if (biased) {
      if (call_.bias.row == 0 && call_.bias.head == 0) {
        each(lanes, block, scores, [&](int64_t j, int, Vf z) {
          return add(z, read_bias(lanes.bias[0], (block.first + j) * call_.bias.column, 1));
        });
      } else {
        add_bias(lanes, block, scores);
      }
    }
    if (low || high) {
      const float left = call_.left < 0 ? kInfinity : float(call_.left);
      const float right = call_.right < 0 ? kInfinity : float(call_.right);
      each(lanes, block, scores, [&](int64_t j, int v, Vf z) {
        const Vf distance = sub(set1(float(place + j)), load(lanes.offset + v)), hidden = set1(-kInfinity);
        z = by_sign(add(set1(left), distance), z, hidden);
        return by_sign(sub(set1(right), distance), z, hidden);
      });
    }
  }

  // value in the lanes of a vector whose pair with key `column` (the prefix counts) survives.
  BITFUSE_INLINE Vf keep(const Lanes& lanes, int64_t column, int v, Vf value) const {
    const Vi bits = dropout_bits(set1_dwords(uint32_t(column)), load_dwords(lanes.hash + v),
                                 load_dwords(lanes.other + v));
    return where_at_least(bits, set1_dwords(threshold_), value);
  }
  int64_t column(const Block& block) const { return block.first + (block.own ? call_.prefix : 0); }

 private:
  // scores[j][v] = f(j, v, scores[j][v]); v counts lanes.
  template <class F>
  BITFUSE_INLINE static void each(const Lanes& lanes, const Block& block, float* scores, F f) {
    const int width = lanes.vecs * kLanes;
    for (int64_t j = 0; j < block.count; ++j)
      for (int v = 0; v < width; v += kLanes)
        store(scores + j * width + v, f(j, v, load(scores + j * width + v)));
  }

  void cap(const Lanes& lanes, const Block& block, float* scores, float* slopes) const {
    const Vf scale = set1(call_.scale), softcap = set1(call_.softcap);
    const int64_t size = block.count * lanes.vecs * kLanes;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Tanh t = tanh_of(div(mul(load(scores + i), scale), softcap));
      store(scores + i, mul(t.value, softcap));
      if (slopes) store(slopes + i, t.slope);
    }
  }

  // `count` elements of a row of the bias; one is given to all lanes.
  BITFUSE_INLINE Vf read_bias(const char* row, int64_t at, int64_t count) const {
    if (call_.bias.mask) {
      uint8_t bytes[kLanes] = {};
      std::memcpy(bytes, row + at, size_t(count));
      const Vi hidden = count == 1 ? set1_dwords(bytes[0]) : spread_bytes(bytes);
      return where_at_least(set1_dwords(0), hidden, set1(-kInfinity));
    }
    alignas(64) float floats[kLanes] = {};
    to_float(element(row, call_.bias.dtype, at), call_.bias.dtype, floats, count);
    return count == 1 ? set1(floats[0]) : load(floats);
  }

  // kLanes keys of kLanes rows at a time, transposed in registers.
  void add_bias(const Lanes& lanes, const Block& block, float* scores) const {
    const int width = lanes.vecs * kLanes;
    const int64_t column = call_.bias.column;
    for (int v = 0; v < width; v += kLanes) {
      for (int64_t j = 0; j < block.count; j += kLanes) {
        const int64_t count = least(kLanes, block.count - j);
        Vi turned[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const char* row = lanes.bias[v + lane];
          if (column == 1 && count > 1) {
            turned[lane] = as_dwords(read_bias(row, block.first + j, count));
          } else {
            alignas(64) float floats[kLanes] = {}, one[kLanes];
            for (int64_t i = 0; i < count; ++i) {
              store(one, read_bias(row, (block.first + j + i) * column, 1));
              floats[i] = one[0];
            }
            turned[lane] = as_dwords(load(floats));
          }
        }
        transpose(turned);
        for (int64_t i = 0; i < count; ++i) {
          float* at = scores + (j + i) * width + v;
          store(at, add(load(at), as_float(turned[i])));
        }
      }
    }
  }

  const AttentionArgs& call_;
  int64_t group_;
  float keep_scale_;
  uint32_t threshold_;
  bool scaled_;
};

// f(std::integral_constant<int, vecs>).
template <class F>
BITFUSE_INLINE void with_vecs(int vecs, F f) {
  if (vecs == kVecs) return f(std::integral_constant<int, kVecs>{});
  if constexpr (kVecs == 4) {
    if (vecs == 3) return f(std::integral_constant<int, 3>{});
    if (vecs == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 1>{});
}

}  // namespace bitfuse::BITFUSE_ISA
