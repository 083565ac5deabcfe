// decode_attention on the CPU: a few queries of each sequence against its cache, and merge_attention.
//
// A task is a span of one sequence's keys and a block of its queries, with all heads: the cache is
// [token][head][dim], so that a span is one stretch of memory (of a page). Units of kUnit tokens are walked
// head by head:
//
//     s[row][token] = K q       a tile of Rows x Tokens = kLanes accumulators, which end as one vector of
//                               lane sums; a vector of K in registers meets Rows rows
//     softmax of each row of s  lanes are tokens; running maximum and sum
//     o[row] += p V             a tile of Rows x 4 vectors of channels; a vector of V meets Rows rows
//
// Rows are the queries of a kv head: all its query heads and all queries of the block, so K and V are read
// from memory once. A unit's K and V of one head (16 KiB each in bfloat16, head_dim 128) stay in L1; while K
// is multiplied, V's lines are asked for, and while V is, the next head's K. Row addresses are looked up once
// a unit, for all heads: pages cost nothing else.
//
// Few bits: K's scales are folded into the queries, a group of tokens at a time, its offsets into q . offset;
// V's scales into the probabilities, its offsets into sums of p * offset. Where the machine multiplies words
// both become int16, the largest product of a row and a group (of a unit for V) 32767, and sums are exact. It
// is the products that are made to fit, not their factors: a channel of K a thousand times the others, of a
// query that is small there, takes no bits from them, nor does a token of few values and much probability.
// Where a product is large itself, so is its share of the sum. The tail of a sequence, in full precision, is
// a task of its own.
//
// Bound by bytes: 2 rows of dim elements a token and kv head. With 4 query heads a kv head and bfloat16 pairs
// that is 512 bytes for some 60 vector instructions. Spans are cut by shapes alone (kTasks of them if they
// are not too short), their outputs are kept in float and merged in order: no bit depends on the threads.
#include <cmath>

#include "cpu/attention/attention_scores.h"
#include "cpu/attention/cache_readers.h"
#include "cpu/attention/rotary.h"
#include "cpu/core/activations.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kUnit = 64;   // tokens
constexpr int64_t kTasks = 16;  // spans that a call is cut into, unless they were shorter than kLeastSpan
constexpr int64_t kLeastSpan = 2 * kUnit;
constexpr int64_t kTile = 4;  // rows of a register tile
constexpr int64_t kPitch = kUnit + kLanes;
constexpr int64_t kDim = kMaxHeadDim;
constexpr int64_t kStateBytes = 256 << 10;  // of a block's outputs, which bounds its queries
constexpr int64_t kMostGroups = kDim / 32;  // of channels
constexpr int64_t kOffsets = kLanes > kMostGroups ? kLanes : kMostGroups;
constexpr int64_t kMostBlock = 128;  // channels of a reader's block
constexpr float kWordLargest = 32767;

// What makes words of products whose largest magnitude is `largest`.
BITFUSE_INLINE float word_factor(float largest) {
  constexpr float kMost = 1.2676506e30f;  // 2^100: neither it nor its inverse is lost
  return kWordLargest / kMost < largest ? kWordLargest / largest : kMost;
}

BITFUSE_INLINE void prefetch_row(const char* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

// Where the rows of a unit's tokens lie: of head 0; a head is `head` bytes further.
struct Unit {
  int64_t first, count;  // positions
  const char *k[kUnit], *v[kUnit];
  int64_t row[kUnit];  // page * page_size + slot, of codes
};

struct RowState {
  float most, sum;
};

// What belongs to one row of scores.
struct RowPlace {
  int64_t query;     // of the call
  int64_t position;  // in the sequence; negative: before its first token
  float slope;
};

// What both readers of a call need of its shapes.
struct Plan {
  int64_t group;             // query heads of a kv head
  int64_t block;             // queries of a task
  int64_t rows, row_slots;   // of a kv head in a whole block; rounded up to tiles
  int64_t q_pitch, o_pitch;  // elements of a row
  int64_t span;              // tokens
};

template <class Reader>
class Span {
  using K = Reader;
  using V = Reader;
  using Element = typename Reader::Element;
  using Acc = typename Reader::Acc;
  static_assert(Reader::kBlock <= kMostBlock);
  static constexpr int kWide = V::kPairs ? 4 : kVecs;                   // vectors of channels in a tile
  static constexpr int64_t kStretch = V::kPairs ? 64 : kVecs * kLanes;  // channels of it

 public:
  static constexpr int64_t q_pitch(int64_t dim) { return round_up(dim, K::kBlock) / (K::kPairs ? 2 : 1); }
  // what q of codes takes, twice, and a vector: no power of two, which rows a page apart would be
  static constexpr int64_t natural_pitch(int64_t dim) { return 2 * round_up(dim, kMostBlock) + kLanes; }
  static constexpr int64_t o_pitch(int64_t dim_v) { return round_up(dim_v, kStretch); }

  struct Space {
    Element* q;      // [kv_heads][row_slots][q_pitch], in the order of K's columns; codes: unscaled floats
    float* natural;  // codes: [kv_heads][row_slots][natural_pitch]: q in the order of channels, and of K's
                     // columns; words: q times a power of two, its largest magnitude below 2, and that
                     // power's inverse
    float* o;        // [kv_heads][row_slots][o_pitch]
    float* offsets;  // codes: [kv_heads][row_slots][kOffsets]: sums of p * offset; group g in each i with i %
                     // padded == g
    RowState* states;
    RowPlace* places;  // [row_slots]
    float* s;          // [row_slots][kPitch]
    float* rescale;    // [row_slots]: of what was before the unit
    Unit* units;       // two
  };

  static void carve(Carver& carver, const KvCache& cache, const Plan& plan, Space& to) {
    const int64_t slots = plan.row_slots * cache.kv_heads;
    to.q = carver.take<Element>(slots * q_pitch(cache.dim));
    to.natural = carver.take<float>(K::kGrouped ? slots * natural_pitch(cache.dim) : 0);
    to.o = carver.take<float>(slots * o_pitch(cache.dim_v));
    to.offsets = carver.take<float>(V::kGrouped ? slots * kOffsets : 0);
    to.states = carver.take<RowState>(slots);
    to.places = carver.take<RowPlace>(plan.row_slots);
    to.s = carver.take<float>(plan.row_slots * kPitch);
    to.rescale = carver.take<float>(plan.row_slots);
    to.units = carver.take<Unit>(2);
  }

  Span(const DecodeArgs& call, const Plan& plan, const Space& space, bool tail)
      : call_(call), cache_(call.cache), plan_(plan), my_(space), tail_(tail) {
    q_pitch_ = q_pitch(cache_.dim);
    used_ = round_up(cache_.dim, kMostBlock);
    natural_pitch_ = natural_pitch(cache_.dim);
    o_pitch_ = o_pitch(cache_.dim_v);
    k_bytes_ = K::bytes_of(cache_.dim);
    v_bytes_ = V::bytes_of(cache_.dim_v);
    k_head_ = tail ? k_bytes_ : cache_.k.head;
    v_head_ = tail ? v_bytes_ : cache_.v.head;
    blocks_ = cache_.dim / K::kBlock;
    rest_ = cache_.dim % K::kBlock;
    if constexpr (V::kGrouped) {
      groups_ = cache_.value_groups();
      padded_ = groups_ <= 2 ? groups_ : groups_ <= 4 ? 4 : groups_ <= 8 ? 8 : kMostGroups;
    }
  }

  // Queries [query, query + queries) against keys [begin, end), all of them seen but for windows and the
  // tree. Writes [query][head][dim_v] outputs, not yet over their sums, and the states of [query][head].
  void run(int64_t sequence, int64_t query, int64_t queries, int64_t begin, int64_t end, float* out,
           RowState* states) {
    b_ = sequence;
    rows_ = queries * plan_.group;
    length_ = call_.length(sequence);
    int64_t low = begin, high = end;
    const int64_t first = query + length_ - call_.queries, last = first + queries - 1;
    if (call_.left >= 0) low = most(low, first - call_.left);
    if (call_.right >= 0) high = least(high, last + call_.right + 1);
    prepare(query);
    if (low < high) {
      locate(low, least(high, (low / kUnit + 1) * kUnit), my_.units[0]);
      for (int u = 0; my_.units[u].count; u ^= 1) {
        const int64_t next = my_.units[u].first + my_.units[u].count;
        locate(next, least(high, next + kUnit), my_.units[u ^ 1]);
        for (int64_t h = 0; h < cache_.kv_heads; ++h) walk(my_.units[u], my_.units[u ^ 1], h);
      }
    }
    finish(query, out, states);
  }

 private:
  // Rows of positions [begin, end), or none.
  void locate(int64_t begin, int64_t end, Unit& to) const {
    to.first = begin;
    to.count = most(0, end - begin);
    if (tail_) {
      const int64_t slots = 2 * cache_.group_size, size = size_of(cache_.dtype);
      for (int64_t i = 0; i < to.count; ++i) {
        const int64_t at = (b_ * slots + (begin + i) % slots) * cache_.kv_heads * size;
        to.k[i] = static_cast<const char*>(cache_.k_tail) + at * cache_.dim;
        to.v[i] = static_cast<const char*>(cache_.v_tail) + at * cache_.dim_v;
      }
      return;
    }
    for (int64_t i = 0; i < to.count;) {
      const int64_t position = begin + i, page = cache_.page_of(b_, position),
                    slot = position % cache_.page_size;
      const int64_t more = least(to.count - i, cache_.page_size - slot);
      const char* k = cache_.k.data + page * cache_.k.page + slot * cache_.k.slot;
      const char* v = cache_.v.data + page * cache_.v.page + slot * cache_.v.slot;
      for (int64_t j = 0; j < more; ++j, ++i) {
        to.k[i] = k + j * cache_.k.slot;
        to.v[i] = v + j * cache_.v.slot;
        to.row[i] = page * cache_.page_size + slot + j;
      }
    }
  }

  // Queries, rotated and in the order of K's columns; states and outputs as of nothing seen.
  void prepare(int64_t query) {
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

  // q times the power of two that makes its largest magnitude 1 to 2; returns the inverse. What is not finite
  // becomes NaN.
  float normalise(float* q) const {
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

  // Channels in the order of K's columns: floats, or the low and the high halves of pairs.
  void reorder(const float* row, float* low, float* high) const {
    for (int64_t at = 0, c = 0; at < q_pitch_; c += K::kBlock)
      for (int j = 0; j < K::kWeights; ++j)
        for (int lane = 0; lane < kLanes; ++lane, ++at) {
          low[at] = row[c + K::column(j, lane)];
          if constexpr (K::kPairs) high[at] = row[c + K::column(j, lane) + K::kWeights];
        }
  }

  void join(const float* low, const float* high, Element* to) const {
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

  void walk(const Unit& now, const Unit& next, int64_t h) {
    const bool last = h + 1 == cache_.kv_heads;
    keys(now, h);
    for (int64_t r = 0; r < rows_; ++r) softmax(now, h, r);
    const Unit& after = last ? next : now;
    values(now, h, after.count ? after.k : nullptr, after.count, last ? 0 : (h + 1) * k_head_);
  }

  void keys(const Unit& now, int64_t h) {
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

  // Offsets of codes less kMiddle.
  static void centre(const float* scale, float* offset, int64_t count) {
    if constexpr (K::kMiddle != 0)
      for (int64_t c = 0; c < count; ++c) offset[c] += K::kMiddle * scale[c];
  }

  // What a group of K's tokens adds to each row's dots, and what multiplies sums of words.
  struct Folded {
    float bias[kTile], unit[kTile];
  };

  // Rows [r, r + rows) times K's scales and offsets.
  void fold_keys(const float* scale, const float* offset, int64_t h, int64_t r, int64_t rows, Element* q,
                 Folded& to) const {
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

  // s of up to kTile rows from row r on and tokens [from, from + count) of the unit.
  void dots(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count, const Element* q,
            const Folded* folded) {
    const int64_t rows = least(kTile, rows_ - r);
    if (rows == 1) return dot<1>(now, h, r, from, count, q, folded);
    if (rows == 2) return dot<2>(now, h, r, from, count, q, folded);
    dot<4>(now, h, r, from, count, q, folded);
  }

  template <int Rows>
  void dot(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count, const Element* q,
           const Folded* folded) {
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
          for (int row = 0; row < Rows; ++row)
            acc[row * Tokens + i] = K::poison(acc[row * Tokens + i], raw[i]);
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

  // Row r of s from products to probabilities, 0 behind the last token.
  void softmax(const Unit& now, int64_t h, int64_t r) {
    float* s = my_.s + r * kPitch;
    const RowPlace& place = my_.places[r];
    const int64_t count = now.count, head = h * plan_.group + r % plan_.group;
    const float scale = call_.scale * (cache_.k_head_scales && !tail_ ? cache_.k_head_scales[h] : 1);
    const int64_t distance = now.first - place.position;  // of the unit's first key
    const bool edge = (call_.left >= 0 && distance < -call_.left) ||
                      (call_.right >= 0 && distance + count - 1 > call_.right);
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

  static BITFUSE_INLINE Vf lane_floats() {
    alignas(64) float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = float(i);
    return load(lanes);
  }

  // Scales and offsets of V, [token][padded groups], tokens behind the unit's end 0; of pairs the even
  // tokens, then the odd.
  struct ValueScales {
    alignas(64) float top[kUnit];  // words: the largest scale of each token
    alignas(64) float scale[kUnit * kMostGroups + kLanes], offset[kUnit * kMostGroups + kLanes];
  };

  void read_scales(const Unit& now, int64_t h, ValueScales& to) const {
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
  void find_tops(ValueScales& v) const {
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

  // p of a row times V's scales, in the order of ValueScales: floats [token][padded], or words of pairs
  // [pair][padded], whose sums `word` multiplies.
  void fold_values(const ValueScales& v, int64_t r, int64_t count, Element* to, float* offsets,
                   float& word) const {
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

  void values(const Unit& now, int64_t h, const char* const* ahead, int64_t ahead_count, int64_t ahead_at) {
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

  struct Ahead {
    const char* const* rows;
    int64_t count, at;
  };

  template <bool Uniform, class... Rest>
  void accumulate_rows(int64_t rows, const Unit& now, Rest... rest) {
    if (rows == 1) return accumulate<1, Uniform>(now, rest...);
    if (rows == 2) return accumulate<2, Uniform>(now, rest...);
    if (rows == 3) return accumulate<3, Uniform>(now, rest...);
    accumulate<4, Uniform>(now, rest...);
  }

  // Uniform: V's channels have one group, so that what multiplies a token is one word for all.
  template <int Rows, bool Uniform>
  void accumulate(const Unit& now, int64_t h, int64_t r, const Element* p, int64_t pitch, const float* units,
                  const Ahead& next) {
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
              for (int row = 0; row < Rows; ++row)
                acc[row][kVec] = V::accumulate(acc[row][kVec], w, own[row]);
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
            token(t, [&](const char* row, int64_t at) __attribute__((always_inline)) {
              return reader_.values(row, at, cache_.dim_v - at);
            });
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

  // Outputs in the order of channels.
  void finish(int64_t query, float* out, RowState* states) {
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

  const DecodeArgs& call_;
  const KvCache& cache_;
  const Plan& plan_;
  const Space& my_;
  const bool tail_;
  Reader reader_;
  int64_t q_pitch_, used_, natural_pitch_, o_pitch_, k_bytes_, v_bytes_, k_head_, v_head_, blocks_, rest_,
      groups_ = 0, padded_ = 0;
  int64_t b_ = 0, rows_ = 0, length_ = 0;
};

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
      return f(CodeFloats<NibbleCode<false>>{});
  }
}

float exp_of(float x) {
  alignas(64) float lanes[kLanes];
  store(lanes, exponential(set1(x)));
  return lanes[0];
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
